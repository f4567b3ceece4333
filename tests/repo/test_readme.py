"""README and docs are true: the tree, the samples, the links, the flags, the pictures, and that the site builds."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral.cli.commands import COMMANDS
from tests.support.commands import Command, in_process
from tools.draw_ideas import DRAWINGS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
IGNORED = {"__pycache__", "site", "build", "dist", "out"}
# Folders that are named, and not listed.
WHOLE = {"tests", "tools", "benchmarks", "docs", "deploy", "notebooks"}
WHOLE |= {"mistral/bundled", "mistral/fast/csrc", "mistral/oracle/packs", "mistral/deploy/templates"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str = "") -> list[str]:
    return [body for found, body in BLOCK.findall(text_of(page)) if found == language]


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 180


# --- the tree


def tree_lines() -> list[tuple[int, list[str], str]]:
    """Of each line of the tree: how far it is indented, the names, and what is said of them."""
    (tree,) = [block for block in blocks(README) if block.startswith("main.py ")]
    lines = []
    for line in tree.splitlines():
        names, _, said = line.strip().partition("  ")
        lines.append((len(line) - len(line.lstrip()), names.split(), said.strip()))
    return lines


def named_in_the_tree() -> Iterator[str]:
    folders: list[str] = []
    for indent, names, _ in tree_lines():
        assert indent % 2 == 0
        folders = folders[: indent // 2]
        for name in names:
            path = "/".join([*folders, name.rstrip("/")])
            assert (ROOT / path).is_dir() == name.endswith("/"), f"{path}: a folder's name ends with a slash"
            yield path
        folders.append(names[0].rstrip("/"))


def on_disk() -> set[str]:
    found = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") for part in parts[:-1]) or parts[0] in (".git", ".mypy_cache")
        if hidden or IGNORED & set(parts) or any(part.endswith(".egg-info") for part in parts):
            continue
        name = "/".join(parts)
        if name in WHOLE or (path.is_file() and not inside_a_whole_folder(name) and path.name != "__init__.py"):
            found.add(name)
    return found


def inside_a_whole_folder(name: str) -> bool:
    return any(name.startswith(f"{folder}/") for folder in WHOLE)


def tracked(names: set[str]) -> set[str]:
    """Those that git has or would take, where there is git: what lies about in a clone is not the project's."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    files = set(run.stdout.splitlines())
    return {name for name in names if name in files or name in WHOLE}


def test_the_tree_names_every_file_and_no_other() -> None:
    named = list(named_in_the_tree())
    assert len(named) == len(set(named))
    folders = {name for name in named if (ROOT / name).is_dir() and name not in WHOLE}
    assert set(named) - folders == tracked(on_disk())
    assert folders == {str(file.parent.relative_to(ROOT)) for file in (ROOT / "mistral").rglob("__init__.py")}, (
        "folders of the package"
    )


def test_what_the_tree_says_is_short() -> None:
    for _, names, said in tree_lines():
        assert len(said.split()) <= 8, names
        assert all(len(word) <= 40 for word in names)


# --- samples


def samples(page: Path) -> list[tuple[str, str]]:
    """Command lines after `$ `, and what is printed beneath them (`python -m tools.docs_samples` writes it)."""
    found = []
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed))
    return found


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def test_the_readme_shows_what_its_commands_print(run: Command) -> None:
    shown = samples(README)
    assert shown
    for command, printed in shown:
        assert command.startswith("python -m main "), command
        words = re.findall(r'"([^"]*)"|(\S+)', command.removeprefix("python -m main ").removesuffix(" 2>/dev/null"))
        assert run(*[quoted or word for quoted, word in words]).text == printed


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "python.md"], ids=lambda page: page.stem)
def test_the_python_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page one after the other, as somebody would try them; but those that need other weights."""
    shown = [block for block in blocks(page, "python") if ">>>" not in block]
    names: dict[str, object] = {}
    ran = 0
    for block in shown:
        if "mistral-7B" in re.sub(r"#.*", "", block):
            continue
        exec(compile(block, str(page), "exec"), names)
        ran += 1
    assert ran == len(shown) - (page.stem == "python")  # one shows a conversion of 7B
    assert capsys.readouterr().out


# --- flags


def parameters(command: str) -> set[str]:
    """The flags of a command, with short forms and those that every command has."""
    own = set(inspect.signature(COMMANDS[command]).parameters)
    return own | {"help", "quiet", "verbose"} | ({"deterministic"} if "execution" in own else set())


def command_lines(page: Path) -> Iterator[tuple[str, set[str]]]:
    """Of each `python -m main COMMAND ..` on a page: the command, and the flags after it."""
    for line in text_of(page).splitlines():
        for part in re.findall(r"python -m main ([^`|>#&]*)", line):
            words = re.sub(r'"[^"]*"', '""', part).split()
            flags = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
            yield (words[0] if words else ""), flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_flags_exist(page: Path) -> None:
    for command, flags in command_lines(page):
        if command in ("--help", "COMMAND", ""):
            continue
        assert command in COMMANDS, command
        assert flags <= parameters(command), command


OTHERS = {"generation_config", "plant", "prompts", "max_tokens", "json", "keep", "model", "enforce_eager"}
OTHERS |= {"apply_chat_template", "rough", "state"}  # of lm-eval; of benchmarks.quality; of benchmarks.endurance


def test_flags_in_sentences_exist() -> None:
    known = {name for command in COMMANDS for name in parameters(command)} | OTHERS
    for page in PAGES:
        for flag in re.findall(r"`--([a-z][\w-]*)[^`]*`", text_of(page)):
            assert flag.replace("-", "_") in known, f"{page.name}: --{flag}"


def test_every_command_has_its_section() -> None:
    page = text_of(ROOT / "docs" / "command-line.md")
    shown = re.findall(r"^\$ python -m main (\w+) --help$", page, re.MULTILINE)
    assert sorted(shown) == sorted(COMMANDS)


# --- links and pictures


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site write them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text_of(page))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


def test_the_pictures_are_what_is_drawn() -> None:
    images = ROOT / "docs" / "images"
    drawn = {f"{draw.__name__.removeprefix('draw_')}.svg": str(draw()) for draw in DRAWINGS}
    assert drawn == {file.name: text_of(file) for file in images.iterdir()}, "python -m tools.draw_ideas draws them"
    shown = {name for page in PAGES for name in re.findall(r"\(\S*images/(\w+\.svg)\)", text_of(page))}
    assert shown == set(drawn)


# --- the site


def test_the_site_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("latex2mathml") is None:
        pytest.skip("mkdocs is not installed: pip install -r requirements-docs.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    commands = text_of(tmp_path / "command-line.html")
    assert all(f"usage: python -m main {name}" in commands for name in COMMANDS)
    contract = text_of(tmp_path / "contract.html")
    assert contract.count("<math") > 14
    assert "arithmatex" not in contract
    assert (tmp_path / "search" / "search_index.json").exists()
    pages = [text_of(file) for file in tmp_path.rglob("*.html")]
    elsewhere = re.compile(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"?https?://|unpkg|googleapis")
    assert not any(elsewhere.search(page) for page in pages), "a reader without a network gets all of it"
