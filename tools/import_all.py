"""Import every module of the package, as somebody without the optional libraries would.

    python -m tools.import_all [--without xformers,transformers]

Libraries named by --without are made to look as if they were not installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# Modules that are nothing without an optional library: whoever wants them gets that with them.
NEED = {"mistral.serve.app": "starlette", "mistral.serve.guard": "starlette", "mistral.eval.lm_eval": "lm_eval"}
PACKAGE = Path(__file__).resolve().parent.parent / "mistral"


def hide(names: set[str]) -> None:
    """Have the import system answer for these top-level modules as if they were not installed."""

    class Without(PathFinder):
        @classmethod
        def find_spec(
            cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            return None if fullname.partition(".")[0] in names else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]


def modules(package: Path = PACKAGE) -> list[str]:
    """Names of all modules of the package, from its files, so that none is missed for want of an __init__.py."""
    names = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", default="", help="comma-separated top-level modules to hide")
    hide(set(filter(None, parser.parse_args().without.split(","))))
    for name in modules():
        if name in NEED and importlib.util.find_spec(NEED[name]) is None:
            print(f"{name} needs {NEED[name]}", file=sys.stderr)
            continue
        importlib.import_module(name)
        print(name)


if __name__ == "__main__":
    main()
