"""Recipes: those of the repository are what the command writes, and any folder's can be read by what reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mistral.deploy.plan import Deployment, Wanted, plan
from mistral.deploy.recipes import TARGETS, as_text, recipes, write
from mistral.util.errors import FormatError
from tests.support.commands import Command, in_process
from tests.support.folders import BUNDLED, ROOT, make_folder
from tools.make_recipes import made


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def deployment(**changes: Any) -> Deployment:
    from dataclasses import replace

    return replace(plan(str(BUNDLED), Wanted()), **changes)


def documents(made: dict[str, str]) -> dict[str, Any]:
    return {name: yaml.safe_load(text) for name, text in made.items() if ".yaml" in name}


def arguments(script: str, tmp_path: Path, *more: str) -> list[str]:
    """What a script gives vLLM."""
    stub = tmp_path / "vllm"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["sh", "-s", "--", *more], input=script, capture_output=True, text=True, env={"PATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_repositorys_recipes_are_what_the_command_writes() -> None:
    rooms = made()
    assert set(rooms) == {"vllm", "kubernetes", "skypilot"}
    for room, files in rooms.items():
        for name, text in files.items():
            assert (ROOT / "deploy" / room / name).read_text(encoding="utf-8") == text, "python -m tools.make_recipes"
        assert {path.name for path in (ROOT / "deploy" / room).iterdir()} == set(files)


def test_every_recipe_gives_vllm_the_same_flags(tmp_path: Path) -> None:
    one = deployment(gpus=2, hub_id="owner/name", folder=None)
    flags = [*one.flags, "--port", "8000"]
    script = arguments(recipes("vllm", one)["serve.sh"], tmp_path, "--seed", "7")
    assert script == ["serve", "owner/name", *one.flags, "--host", "127.0.0.1", "--port", "8000", "--seed", "7"]
    docker = recipes("compose", one)["Dockerfile"]
    command = docker.partition("\nCMD ")[2].replace("\\\n", "")
    assert json.loads(command) == ["owner/name", *flags]
    found = documents(recipes("kubernetes", one))["deployment.yaml"]["spec"]["template"]["spec"]["containers"][0]
    assert (found["command"], found["args"]) == (["vllm", "serve"], ["owner/name", *flags])
    for document in documents(recipes("skypilot", one)).values():
        line = document["run"].replace("~/vllm/bin/vllm", "vllm")
        assert arguments(line, tmp_path) == ["serve", "owner/name", *flags]


def test_what_a_recipe_promises() -> None:
    docker = recipes("compose", deployment())["Dockerfile"].splitlines()
    assert docker[[line.split(" ")[0] for line in docker].index("FROM")] == "FROM vllm/vllm-openai:v0.33.0"
    assert [line for line in docker if line.startswith("USER")][-1] == "USER 2000:0"
    assert "ARG MAX_JOBS=4" in docker
    assert "http://127.0.0.1:8000/health" in next(line for line in docker if line.lstrip().startswith("CMD"))
    service = documents(recipes("compose", deployment()))["compose.yaml"]["services"]["vllm"]
    assert service["build"]["args"] == {"MAX_JOBS": "${MAX_JOBS:-4}"}
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    parts = documents(recipes("kubernetes", deployment(gpus=4)))
    assert [part["kind"] for part in parts.values()] == ["PersistentVolumeClaim", "Deployment", "Service", "Secret"]
    pod = parts["deployment.yaml"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [probe["httpGet"] for probe in probes] == [{"path": "/health", "port": "http"}] * 3
    assert probes[0]["failureThreshold"] * probes[0]["periodSeconds"] >= 1800
    single, service = documents(recipes("skypilot", deployment(gpu="H100", gpus=2))).values()
    assert single["resources"]["accelerators"] == {"H100": 2}
    assert "service" not in single
    assert service["service"]["replica_policy"]["max_replicas"] == 3
    assert service["service"]["readiness_probe"]["path"] == "/health"
    assert {name: value for name, value in service.items() if name != "service"} == single


def test_a_hubs_model_is_fetched_and_a_folder_is_brought() -> None:
    for one, token in ((deployment(hub_id="a/b", folder=None), True), (deployment(), False)):
        for target in ("compose", "kubernetes", "skypilot"):
            text = as_text(recipes(target, one))
            assert ("HF_TOKEN" in text) == token
            assert ("HF_HUB_OFFLINE" in text) != token
            assert ("/models/bundled" in text) != token


@settings(max_examples=15)  # each runs a shell
@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20))
@example("a b'\"$HOME$$`id`\\ #{{x}}%: é")
def test_any_folders_name_arrives(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    one = deployment(folder=f"/{name}", about=f"odd {name}\nuser: root")
    script = recipes("vllm", one)["serve.sh"]
    assert arguments(script, tmp_path_factory.getbasetemp())[1] == f"/{name}"
    mounted = documents(recipes("compose", one))["compose.yaml"]["services"]["vllm"]["volumes"][0]["source"]
    assert mounted.replace("$$", "\0").count("$") == 0
    assert mounted.replace("$$", "$") == f"/{name}"
    for document in documents(recipes("skypilot", one)).values():
        assert document["file_mounts"] == {"/models/bundled": f"/{name}"}
    assert documents(recipes("kubernetes", one))["service.yaml"]["kind"] == "Service"


# --- the command


@pytest.mark.parametrize("target", TARGETS)
def test_printed_and_written_are_the_same(cli: Command, tmp_path: Path, target: str) -> None:
    printed = cli("deploy", BUNDLED, "--target", target)
    written = cli("deploy", BUNDLED, "--target", target, "-o", tmp_path / "new" / "out")
    assert printed.text == as_text({path: (tmp_path / "new" / "out" / path).read_text() for path in TARGETS[target]})
    assert written.text == ""
    assert "6.3 M parameters, window 64: 12.7 MB of weights in bfloat16" in printed.err
    assert "note: params.json does not say how long sequences may be: 32768 is assumed" in printed.err
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == set(TARGETS[target])


def test_kubernetes_can_be_piped(cli: Command) -> None:
    found = list(yaml.safe_load_all(cli("deploy", BUNDLED, "--target", "kubernetes").text))
    assert [part["kind"] for part in found] == ["PersistentVolumeClaim", "Deployment", "Service"]


def test_other_files_are_overwritten_if_somebody_says_so(cli: Command, tmp_path: Path) -> None:
    words = ("deploy", BUNDLED, "--target", "skypilot", "-o", tmp_path)
    (tmp_path / "single.yaml").write_text("mine")
    with mock.patch("mistral.cli.terminal.is_interactive", return_value=True):
        refused = cli(*words, stdin="n\n")
        assert "single.yaml in" in refused.err
        assert refused.code == 2
        assert [path.name for path in tmp_path.iterdir()] == ["single.yaml"]
        assert (tmp_path / "single.yaml").read_text() == "mine"
        assert cli(*words, stdin="y\n").code == 0
        assert "will be overwritten" not in cli(*words, stdin="n\n").err  # they are what would be written
    (tmp_path / "file").touch()
    assert "cannot be written" in cli(*words[:-1], tmp_path / "file").err


def test_a_script_can_be_run(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "two words")
    text = cli("deploy", folder, "--target", "vllm", "--name", "mine", "--max_model_len", 99, "--gpus", 2).text
    got = arguments(text, tmp_path)
    assert got[:2] == ["serve", str(folder)]
    flags = dict(zip(got[2::2], got[3::2], strict=True))
    assert flags == {
        "--tokenizer-mode": "mistral",
        "--config-format": "mistral",
        "--load-format": "mistral",
        "--served-model-name": "mine",
        "--dtype": "float32",
        "--max-model-len": "99",
        "--tensor-parallel-size": "2",
        "--gpu-memory-utilization": "0.9",
        "--generation-config": "vllm",
        "--host": "127.0.0.1",
        "--port": "8000",
    }


def test_pytorch_is_not_imported() -> None:
    code = (
        "import sys; from mistral.cli import main; "
        f"code = main(['deploy', {str(BUNDLED)!r}, '--target', 'compose']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_a_script_can_be_run_and_nothing_is_left_of_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write(recipes("vllm", deployment()), tmp_path / "there")
    assert os.access(tmp_path / "there" / "serve.sh", os.X_OK)
    with (
        mock.patch("mistral.deploy.recipes.write_atomic", side_effect=FormatError("the disk is full")),
        pytest.raises(FormatError),
    ):
        write(recipes("vllm", deployment()), tmp_path / "full")
    assert not (tmp_path / "full").exists()
