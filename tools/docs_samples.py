"""Run the samples of README and docs again, and write what they print now beneath them.

    python -m tools.docs_samples [PAGE ...]        (PAGE: README.md and docs/*.md)

A sample is a code block marked `console`: commands after `$ `, and their output. They run in a copy of the repository,
one page in one shell session after the other, with stderr where the reader sees it too. Blocks without that mark are
records of long runs, with their date beside them, and are left alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = re.compile(r"(^```console\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "site", "out")


def commands_of(block: str) -> list[str]:
    return re.findall(r"^\$ (.*)$", block, re.MULTILINE)


def printed(command: str, folder: Path) -> str:
    """What a command prints, `python` being this one."""
    words = re.sub(r"\bpython -m", f"{sys.executable} -m", command)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run(
        ["bash", "-c", words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"  {command} (exit code {run.returncode})")
    if run.returncode not in (0, 1):  # 1: checks that failed, which a sample may show
        raise SystemExit(f"{command}\n{run.stdout}")
    output = run.stdout.replace(f"{folder}/", "")
    return output if output.endswith("\n") or not output else f"{output}\n"


def refresh(page: Path, folder: Path) -> None:
    """Rewrite the samples of one page."""

    def again(found: re.Match[str]) -> str:
        return found[1] + "".join(f"$ {c}\n{printed(c, folder)}" for c in commands_of(found[2])) + found[3]

    print(page.relative_to(ROOT))
    page.write_text(SAMPLE.sub(again, page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    pages = [page.resolve() for page in parser.parse_args().pages]
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        for page in pages:
            refresh(page, folder)


if __name__ == "__main__":
    main()
