"""The walls of the house: which part may import which. Imports are parsed, so lazy ones count too.

A file at the top of mistral/ is the model. Everything else is a wing; the wings meet in loader/, and nothing below it
looks up. `import mistral` alone is the front door, which anyone may use: it loads what is asked for on demand.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mistral

PACKAGE = Path(mistral.__file__).parent
MODULES = {
    ".".join(("mistral", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What each wing may import, itself aside. "core" is the files at the top.
SITS_ON_LOADER = {"util", "core", "backends", "fast", "quant", "formats", "loader"}
MAY = {
    "util": set(),
    "core": {"util"},
    "backends": {"util", "core"},
    "fast": {"util", "core"},
    "quant": {"util", "core", "fast"},
    "formats": {"util", "core", "fast", "quant"},
    "loader": {"util", "core", "backends", "fast", "quant", "formats"},
    "parallel": SITS_ON_LOADER,
    "chat": SITS_ON_LOADER,
    "eval": SITS_ON_LOADER | {"chat"},
    "train": SITS_ON_LOADER | {"chat"},
    "oracle": SITS_ON_LOADER,
    "serve": SITS_ON_LOADER | {"chat"},
    "batch": SITS_ON_LOADER | {"chat", "serve"},
    "deploy": {"util", "core", "fast", "quant", "formats"},
    "cli": SITS_ON_LOADER | {"parallel", "chat", "eval", "train", "oracle", "serve", "batch", "deploy"},
}
FREE_OF_TORCH = [
    *("args", "window", "parameters", "sampling_params", "thinking"),
    *("loader", "loader.options", "fast", "fast.layout", "train", "train.options"),
    *(name.removeprefix("mistral.") for name in MODULES if name.startswith(("mistral.util", "mistral.cli"))),
]


def wing(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "core"


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it, but not for type checkers alone."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


GRAPH = {name: set(imported(path)) - {name, "mistral"} for name, path in MODULES.items() if name != "mistral"}


@pytest.mark.parametrize("module", GRAPH)
def test_a_file_imports_only_what_its_wing_may(module: str) -> None:
    if module in ("mistral.formats", "mistral.__main__"):  # the old door to `load`, and that to the command line
        return
    here = wing(module)
    beyond = {other for other in GRAPH[module] if wing(other) != here and wing(other) not in MAY[here]}
    assert not beyond


def test_no_imports_in_a_circle() -> None:
    """Also between two files of one wing; a package's face counts as imported by what is in it only if it is."""
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_every_wing_has_a_rule() -> None:
    wings = {wing(name) for name in GRAPH} - {"core"}
    assert wings <= set(MAY)
    assert len(GRAPH) > 80  # the parser found the package


def test_what_is_free_of_torch_stays_so() -> None:
    names = [f"mistral.{name}" for name in FREE_OF_TORCH]
    code = f"import sys\nfor n in {names!r}:\n    __import__(n)\n    assert 'torch' not in sys.modules, n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_parser_sees_lazy_imports_and_none_for_types(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nimport mistral.args as a\n"
        "if TYPE_CHECKING:\n    from mistral.cli import main\n"
        "def f():\n    from mistral import model\n    from mistral.loader.load import load\n"
    )
    assert set(imported(source)) == {"mistral.args", "mistral.model", "mistral.loader.load"}
