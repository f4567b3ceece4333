"""What a user installs: pins, ranges, the wheel's contents, and imports without the optional libraries."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mistral
from tools.import_all import modules

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("xformers", "transformers", "matplotlib", "prompt_toolkit", "huggingface_hub", "pytest", "hypothesis")
OPTIONAL += ("uvicorn", "openai", "ray", "llguidance", "lm_eval")
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300)


def pins(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def applying(requirements: list[Requirement], version: str) -> dict[str, Requirement]:
    """Those for this Python on Linux x86_64, by name; two for one name would contradict each other."""
    where = {"python_version": version, "platform_system": "Linux", "platform_machine": "x86_64"}
    chosen = [r for r in requirements if r.marker is None or r.marker.evaluate(where)]
    by_name = {canonicalize_name(r.name): r for r in chosen}
    assert len(by_name) == len(chosen)
    return by_name


# --- imports


def test_every_module_imports_without_the_optional_libraries() -> None:
    result = python("-m", "tools.import_all", "--without", ",".join(OPTIONAL))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [name for name in modules() if name != "mistral.eval.lm_eval"]
    assert {"mistral", "mistral.model", "mistral.cache", "mistral.attention"} <= set(modules())


def test_hiding_a_library_hides_it() -> None:
    code = (
        "import importlib.util, tools.import_all as t; t.hide({'pytest'}); "
        "assert importlib.util.find_spec('pytest') is None; import packaging; import pytest"
    )
    result = python("-c", code)
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'pytest'" in result.stderr


def test_the_bare_package_does_not_import_torch() -> None:
    result = python("-c", "import sys, mistral; print(mistral.__version__, 'torch' in sys.modules)")
    assert result.stdout.split() == [mistral.__version__, "False"], result.stderr


def imported(file: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_what_is_imported_is_what_is_declared(project: dict[str, Any]) -> None:
    used = set()
    for file in [*(ROOT / "mistral").rglob("*.py"), *(ROOT / name for name in ("main.py", "one_file_ref.py"))]:
        used |= {canonicalize_name(name) for name in imported(file) - set(sys.stdlib_module_names)}
    groups = [project["dependencies"], *(v for k, v in project["optional-dependencies"].items() if k != "dev")]
    declared = {canonicalize_name(Requirement(text).name) for group in groups for text in group}
    assert used - {"mistral"} <= declared
    assert {canonicalize_name(Requirement(text).name) for text in project["dependencies"]} <= used


# --- pins and ranges


@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.parametrize("kind", ["run", "dev", "docs"])
def test_pins_lie_within_the_ranges(project: dict[str, Any], kind: str, version: str) -> None:
    file, ranges = {
        "run": ("requirements.txt", project["dependencies"]),
        "dev": ("requirements-dev.txt", project["optional-dependencies"]["dev"]),
        "docs": ("requirements-docs.txt", project["optional-dependencies"]["docs"]),
    }[kind]
    pinned = applying(pins(file), version)
    ranged = applying([Requirement(text) for text in ranges], version)
    assert set(pinned) == set(ranged)
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        if name in ranged:
            assert ranged[name].specifier.contains(pin.version), (requirement, ranged[name])


def test_xformers_is_asked_for_on_linux_x86_64_only(project: dict[str, Any]) -> None:
    asked = [r for r in [*pins("requirements.txt"), *map(Requirement, project["dependencies"])] if r.name == "xformers"]
    assert len(asked) == 2
    for requirement in asked:
        assert requirement.marker is not None
        assert requirement.marker.evaluate({"platform_system": "Linux", "platform_machine": "x86_64"})
        assert not requirement.marker.evaluate({"platform_system": "Linux", "platform_machine": "aarch64"})
        assert not requirement.marker.evaluate({"platform_system": "Windows", "platform_machine": "AMD64"})
        assert not requirement.marker.evaluate({"platform_system": "Darwin", "platform_machine": "x86_64"})


def test_the_console_script_collides_with_none_installed(project: dict[str, Any]) -> None:
    assert len(project["scripts"]) == 1
    (script,) = project["scripts"]
    for entry in importlib.metadata.entry_points(group="console_scripts", name=script):
        assert entry.dist is not None
        assert entry.dist.name == project["name"]


# --- the wheel


def test_the_wheel_holds_the_package_and_nothing_else(project: dict[str, Any], tmp_path: Path) -> None:
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for folder in ("mistral", "tests", "tools"):
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "LICENSE"):
        shutil.copy(file, source)

    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = python(*command, "--wheel-dir", str(tmp_path), str(source))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
        (dist_info,) = {name.partition("/")[0] for name in inside if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{dist_info}/METADATA"))
        scripts = archive.read(f"{dist_info}/entry_points.txt").decode()

    expected = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "mistral").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in inside if not name.startswith(dist_info)} == expected
    assert {"mistral/py.typed", "mistral/bundled/params.json", "mistral/bundled/tokenizer.model"} <= expected
    assert f"{dist_info}/licenses/LICENSE" in inside
    assert (metadata["Name"], metadata["Version"]) == (project["name"], mistral.__version__)
    ((script, target),) = project["scripts"].items()
    assert f"{script} = {target}" in scripts


# --- make


@pytest.mark.parametrize("target", ["demo", "test", "lint", "imports", "clean"])
def test_the_makefile_has_the_targets_the_readme_names(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_make_demo_and_test_run_what_they_say() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # `make test` runs this test: what it hands down to a make below it would change what that one prints.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    for target, last in {"demo": "-m main demo", "test": "-m pytest"}.items():
        command = ["make", "--dry-run", "--always-make", target, "TORCH_INDEX=https://example.invalid/cpu"]
        printed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        said = printed.splitlines()
        assert last in said[-1], printed
        installs = [line for line in said if "-m pip install" in line]
        # torch alone and from the index that was named; the others from where pip looks by itself.
        assert installs[0].endswith("--index-url https://example.invalid/cpu torch==2.13.0")
        assert len(installs) >= 2
        assert all("--index-url" not in line for line in installs[1:])


def test_the_first_token_imports_nothing_heavy_beside_torch() -> None:
    """Each of these would add a large part of a second to every command."""
    script = (
        "import sys; from mistral.cli import main; code = main(['complete', 'hi', '--max_tokens', '1']); "
        "heavy = {'torch._dynamo', 'sympy', 'mistral_common', 'xformers', 'transformers', 'numba', 'matplotlib'}; "
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stdout.splitlines()[-1] == "0 []", run.stderr
