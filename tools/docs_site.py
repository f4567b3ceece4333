"""What mkdocs.yml asks of this project while the site is built: help texts as they are, and equations without a script.

A code block that is one line, `$ python -m main COMMAND --help` or `>>> help(NAME)`, gets what that prints; elsewhere
the page still says how to see it. Equations between dollar signs (which arithmatex has marked) become MathML, which
browsers draw by themselves.
"""

from __future__ import annotations

import html
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
HELP = re.compile(r"^(```\n\$ python -m main ((?:[\w-]+ )?)--help\n)```$", re.MULTILINE)
DOCUMENTED = re.compile(r"^(```python\n>>> help\((\w+)\)\n)```$", re.MULTILINE)
EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def help_text(command: str) -> str:
    """What `python -m main COMMAND --help` prints; "" is the list of commands."""
    words = [sys.executable, "-m", "main", *command.split(), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def docstring(name: str) -> str:
    """What is written about a name of the package `mistral`."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return inspect.getdoc(getattr(importlib.import_module("mistral"), name)) or ""


def with_help(markdown: str) -> str:
    """A page with help texts and docstrings put in."""
    markdown = HELP.sub(lambda found: f"{found[1]}{help_text(found[2])}```", markdown)
    return DOCUMENTED.sub(lambda found: f"{found[1]}{docstring(found[2])}\n```", markdown)


def with_mathml(page: str) -> str:
    """A page with its equations as MathML."""

    def draw(found: re.Match[str]) -> str:
        block = found["tag"] == "div"
        drawn = convert(html.unescape(found["tex"]).strip(), display="block" if block else "inline")
        return f'<div class="equation">{drawn}</div>' if block else drawn

    return EQUATION.sub(draw, page)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return with_help(markdown)


def on_page_content(html: str, **_: Any) -> str:
    return with_mathml(html)
