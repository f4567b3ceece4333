"""Hub ids as folders: what is fetched and what is not, from a hub that runs here; offline; every refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants, errors, file_download

from mistral.formats.convert import convert
from mistral.formats.hub import HubError, is_hub_id, locate
from mistral.formats.mistral import ParamsError
from mistral.loader.load import load
from mistral.util.errors import UsageError
from tests.support import hub_server
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import PARAMS, make_folder
from tests.support.hub_server import Hub

MISTRAL = {"params.json", "consolidated.safetensors", "tokenizer.model"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model_hf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    convert(model, folder, "hf", shard_size=600_000, instruct=True)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub believes is the one, an empty cache, and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub_server.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        close_session()
        yield server
        close_session()


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(folder: str) -> str:
    with pytest.raises(HubError) as raised:
        locate(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- what is a hub id


@pytest.mark.parametrize(
    "word",
    [
        "a/b",
        "mistralai/Mistral-7B-v0.1",
        "own_er/na.me",
        "a/b@main",
        "a/b@refs/pr/1",
        "a/b@x--y",
        "1/2",
        "a/b:Q4_K_M",
        "a/b@main:q4_0",
    ],
)
def test_ids(word: str) -> None:
    assert is_hub_id(word)


@pytest.mark.parametrize(
    "word",
    [
        *("", "a", "a/", "/a", "a/b/", "a/b/c", "./a", "../a", "~/a", "a/.b", ".a/b", "a/b.git", "a--b/c", "a/b..c"),
        *("-a/b", "a/b@", "a b/c", "a/b c", "a/b@x y", "a\\b/c", "C:/a", "é/a", "a/b\n", "a" * 97 + "/b"),
        *("a/b.gguf", "a/b.safetensors", "a/b.jsonl"),
    ],
)
def test_no_ids(word: str) -> None:
    assert not is_hub_id(word)
    assert locate(word) == Path(word)


def test_a_path_is_itself(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to("nowhere")
    hub.repos["owner/name"] = {}
    for path in ("owner/name", "other/link"):
        assert locate(path) == Path(path)
    assert locate(Path("no/path")) == Path("no/path")
    assert hub.asked == []


def test_what_may_be_a_path_is_not_fetched(hub: Hub, model: Path, cli: Command, tmp_path: Path) -> None:
    hub.add("owner/name", model)
    (tmp_path / "owner").mkdir()
    assert refused("owner/name").startswith("no such folder: owner/name; it is not looked for on the hub")
    error = cli("complete", "--folder", "owner/name", stdin="never read").error
    assert error == "no such folder: owner/name"
    assert hub.asked == []


# --- what is fetched


def test_one_layout_and_no_code(hub: Hub, model: Path, model_hf: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("owner/name", model_hf)
    hub.repos["owner/name"]["main"] |= {
        **{path.name: path.read_bytes() for path in model.iterdir()},
        **dict.fromkeys(("pytorch_model.bin", "model.gguf", "modeling.py", ".gitattributes", "a/tokenizer.json"), b"x"),
        **{n: n.encode() for n in ("README.md", "LICENSE.txt", "tokenizer_config.json", "chat_template.jinja")},
    }
    folder = locate("owner/name")
    assert folder.name == hub.commit("owner/name")
    expected = MISTRAL | {"config.json", "README.md", "LICENSE.txt", "tokenizer_config.json", "chat_template.jinja"}
    expected |= {"tokenizer.json"}
    assert names(folder) == hub.sent() == expected
    weights = (model / "consolidated.safetensors").read_bytes()
    assert (folder / "consolidated.safetensors").read_bytes() == weights
    assert [name for _, name, _ in hub.asked][-1] == "consolidated.safetensors"
    assert re.fullmatch(r"fetching owner/name: 8 files, \d+\.\d [kM]B", caplog.messages[0])
    assert len(caplog.messages) == 1


def test_hugging_faces_layout(hub: Hub, model_hf: Path) -> None:
    hub.add("owner/name", model_hf)
    parts = {name for name in names(model_hf) if name.startswith("model-")}
    assert len(parts) > 1
    small = {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert names(locate("owner/name")) == small | parts


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        ("params.json consolidated.safetensors consolidated.00.pth", "consolidated.safetensors"),
        ("params.json consolidated.00.pth config.json model.safetensors", "consolidated.00.pth"),
        ("params.json consolidated.00.pth consolidated.01.pth config.json model.safetensors", "model.safetensors"),
        ("consolidated.safetensors config.json model.safetensors", "model.safetensors"),
        ("params.json config.json model.safetensors pytorch_model.bin", "model.safetensors"),
        ("config.json pytorch_model.bin", "pytorch_model.bin"),
        (
            "config.json pytorch_model-1-of-2.bin pytorch_model-2-of-2.bin pytorch_model.bin.index.json",
            "pytorch_model-1-of-2.bin pytorch_model-2-of-2.bin pytorch_model.bin.index.json",
        ),
        (
            "params.json consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors",
            "consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors",
        ),
        (
            "params.json consolidated-00001-of-00002.safetensors config.json model-1-of-1.safetensors",
            "model-1-of-1.safetensors",
        ),
        (
            "config.json model.safetensors model.safetensors.index.json model-1-of-1.safetensors",
            "model.safetensors.index.json model-1-of-1.safetensors",
        ),
        ("config.json model.safetensors model.safetensors.index.json", "model.safetensors"),
    ],
)
def test_the_layout_chosen(hub: Hub, model: Path, model_hf: Path, files: str, weights: str) -> None:
    shapes = {"params.json": model, "config.json": model_hf}
    content = {name: (shapes[name] / name).read_bytes() if name in shapes else b"x" for name in files.split()}
    hub.repos["owner/name"] = {"main": content}
    assert names(locate("owner/name")) - set(shapes) == set(weights.split())


def test_a_revision(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model, README__md="new")
    hub.add("owner/name", model, "refs/pr/1", README__md="old")
    for revision in ("refs/pr/1", hub.commit("owner/name", "refs/pr/1")):
        assert (locate(f"owner/name@{revision}") / "README.md").read_text() == "old"
    assert (locate("owner/name") / "README.md").read_text() == "new"
    assert [name for method, name, _ in hub.asked if method == "GET"].count("consolidated.safetensors") == 1


def test_what_is_there_is_not_fetched_again(hub: Hub, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("owner/name", model)
    folder = locate("owner/name")
    hub.asked.clear()
    caplog.clear()
    assert locate("owner/name") == folder
    assert (hub.sent(), caplog.messages) == (set(), [])
    hub.add("owner/name", model, README__md="new")
    (folder / "params.json").unlink()
    locate("owner/name")
    assert hub.sent() == {"README.md"}
    assert caplog.messages == ["fetching owner/name: 1 file, 3 B"]


def test_a_shape_that_is_not_supported_is_refused_before_its_weights(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model, params__json=json.dumps({**PARAMS, "moe": {"num_experts": 8}}))
    with pytest.raises(ParamsError, match="experts"):
        locate("owner/name")
    assert hub.sent() == {"params.json"}


# --- offline, and broken connections


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_offline_the_cache_is_used(
    hub: Hub,
    model: Path,
    model_hf: Path,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.add("owner/name", model if layout == "mistral" else model_hf)
    hub.add("owner/name", model, "old")
    folder, old = locate("owner/name"), locate("owner/name@old")
    hub.asked.clear()
    offline(monkeypatch)
    caplog.clear()
    assert locate("owner/name") == folder
    assert caplog.messages == ["the hub cannot be reached (HF_HUB_OFFLINE is set): owner/name is taken from the cache"]
    assert locate("owner/name@old") == old == locate(f"owner/name@{old.name}")
    assert "the cache" not in refused("owner/name@other")
    assert hub.asked == []


@pytest.mark.parametrize(("down", "reason"), [(503, "it answers 503"), (429, "it answers 429"), (200, "is no hub")])
def test_a_hub_that_is_down(hub: Hub, model: Path, down: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("owner/name", model)
    folder = locate("owner/name")
    hub.down = down
    assert locate("owner/name") == folder
    assert reason in caplog.messages[-1]
    assert reason in refused("owner/other")


def test_no_network(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("owner/name", model)
    folder = locate("owner/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody answers
    assert locate("owner/name") == folder
    assert caplog.messages[-1].startswith("the hub cannot be reached (")
    assert refused("owner/other").endswith(
        f"{constants.HF_HUB_CACHE} has no owner/other: check the name, or try again with a network"
    )


def test_a_part_of_a_model_does_not_do_offline(hub: Hub, model_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", model_hf)
    folder = locate("owner/name")
    max(folder.glob("model-*")).unlink()
    offline(monkeypatch)
    assert "has only part of owner/name: unset it" in refused("owner/name")


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("owner/name", model)
    hub.cut["consolidated.safetensors"] = 1
    folder = locate("owner/name")
    weights = (model / "consolidated.safetensors").read_bytes()
    assert (folder / "consolidated.safetensors").read_bytes() == weights
    ranges = [asked for method, name, asked in hub.asked if (method, name) == ("GET", "consolidated.safetensors")]
    assert ranges == ["", f"bytes={len(weights) // 2 // 1000 * 1000}-"]


@pytest.mark.parametrize("kind", [errors.HTTPError, RuntimeError, OSError])
def test_a_lost_connection_keeps_what_is_complete(
    hub: Hub, model: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/name", model)
    http_get = file_download.http_get

    def lost(url: str, *args: Any, **kwargs: Any) -> None:
        if url.endswith("safetensors"):
            raise kind("peer closed connection")
        http_get(url, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", lost)
        message = "owner/name was not fetched to its end (peer closed connection): run this again; "
        assert refused("owner/name").startswith(message)
    hub.asked.clear()
    assert names(locate("owner/name")) == MISTRAL
    assert hub.sent() == {"consolidated.safetensors"}


# --- refusals


def test_no_such_repository(hub: Hub) -> None:
    assert refused("owner/name") == (
        "no such folder: owner/name, and no model of that name on the hub that you may see: check the name; "
        "for one that is private, run `hf auth login`, or set HF_TOKEN"
    )


def test_a_gated_repository(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    hub.gated.add("owner/name")
    assert refused("owner/name") == (
        f"owner/name is gated: accept its conditions on {hub.url}/owner/name, then run `hf auth login`, or set HF_TOKEN"
    )


def test_no_such_revision(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    assert refused("owner/name@v2").startswith("owner/name has no revision v2: give a branch, a tag or a full commit")


def test_forbidden(hub: Hub) -> None:
    hub.down = 403
    assert "the hub does not give you owner/name (403): run `hf auth login`" in refused("owner/name")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("config.json pytorch_model-00001-of-00002.bin", "no model"),
        (
            "adapter_config.json adapter_model.safetensors",
            "a PEFT adapter, not a model: give its base model",
        ),
        ("params.json consolidated.00.pth consolidated.01.pth", ".pth files in several parts"),
        ("a b c d e", "it has a, b, c and 2 more"),
        ("model.safetensors README.md", "it has README.md, model.safetensors"),
        ("config.json model-00001-of-00002.safetensors", "it has config.json, model-00001-of-00002.safetensors"),
        ("", "it has no files"),
    ],
)
def test_a_repository_without_a_model(hub: Hub, files: str, said: str) -> None:
    hub.repos["owner/name"] = {"main": dict.fromkeys(files.split(), b"x")}
    message = refused("owner/name")
    assert said in message
    assert "expected consolidated.safetensors with params.json, or model.safetensors with config.json" in message
    assert hub.sent() == set()


# --- GGUF files


PARTS = ("b/a-F16-00001-of-00002.gguf", "b/a-F16-00002-of-00002.gguf")
GGUFS = ("a.Q4_K_M.gguf", "a.Q8_0.gguf", "mmproj-a-f16.gguf", *PARTS)


@pytest.mark.parametrize(
    ("kind", "files"),
    [("Q4_K_M", ("a.Q4_K_M.gguf",)), ("q8_0", ("a.Q8_0.gguf",)), ("f16", PARTS)],
)
def test_a_gguf_file_by_its_type(
    hub: Hub, kind: str, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["owner/name"] = {"main": {name: name.encode() * 9 for name in (*GGUFS, "README.md", "config.json")}}
    found = locate(f"owner/name:{kind}")
    assert found.as_posix().endswith(files[0])
    assert hub.sent() == set(files)
    assert found.read_bytes() == files[0].encode() * 9
    assert caplog.messages[0].startswith(f"fetching owner/name: {len(files)} file")
    offline(monkeypatch)
    assert locate(f"owner/name:{kind}") == found
    assert locate("owner/name") == found  # the only one that is here
    assert "no GGUF file of type Q2_K" in refused("owner/name:Q2_K")


def test_the_only_gguf_file_needs_no_type(hub: Hub) -> None:
    hub.repos["owner/name"] = {"main": {"model.gguf": b"GGUF", "README.md": b""}, "old": {"m-Q4_0.gguf": b"old"}}
    assert locate("owner/name").name == "model.gguf"
    assert locate("owner/name@old").read_bytes() == b"old"
    assert locate("owner/name@old:Q4_0").read_bytes() == b"old"


def test_which_gguf_file_is_meant_must_be_clear(hub: Hub, model: Path) -> None:
    hub.repos["owner/name"] = {"main": dict.fromkeys(GGUFS, b"x")}
    said = refused("owner/name")
    assert said == "owner/name has several GGUF files: say which, as in owner/name:Q4_K_M (it has F16, Q4_K_M, Q8_0)"
    assert "no GGUF file of type Q3_K_S: say which, as in owner/name:" in refused("owner/name:Q3_K_S")
    hub.repos["owner/name"]["main"] = dict.fromkeys([*GGUFS[:4], "c-Q8_0.gguf"], b"x")
    assert "has 1 of the 2 parts of b/a-F16.gguf" in refused("owner/name:F16")
    assert "several GGUF files" in refused("owner/name:Q8_0")
    hub.add("owner/plain", model)
    assert "it has" in refused("owner/plain:Q8_0")
    assert hub.sent() == set()


def test_a_disk_with_too_little_room(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", model)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert re.match(
        r"owner/name needs \d+\.\d kB more in .*cache, but its disk has 1\.0 kB free: free some, or set HF_HOME",
        refused("owner/name"),
    )
    assert hub.sent() == {"params.json"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    locate("owner/name")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    locate("owner/name")  # nothing to fetch, no room needed


def test_a_cache_that_cannot_be_written(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", model)
    (Path(constants.HF_HUB_CACHE)).write_text("a file")
    assert re.match(r".*cache: (Not a directory|File exists): make it writable, or set HF_HOME", refused("owner/name"))


def test_a_disk_that_fills_up(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert refused("owner/name").endswith(
        "cache: No space left on device: free some of it, or set HF_HOME to another folder"
    )


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refused("owner/name") == (
        "no such folder: owner/name; to have it fetched from the Hugging Face hub, "
        "pip install huggingface_hub (or mistral-oracle-ref[hub])"
    )


# --- the commands


def test_every_command_takes_an_id(hub: Hub, model: Path, cli: Command, tmp_path: Path) -> None:
    hub.add("owner/name", model)
    options = ("--max_tokens", 4, "--temperature", 0)
    plain = cli("complete", model, "The king", *options).text
    assert cli("complete", "owner/name", "The king", *options).text == plain
    assert cli("complete", "--folder", "owner/name", *options, stdin="The king").text == plain
    assert cli("complete", "--folder", "owner/name@main", *options, stdin="The king").text == plain
    assert plain in cli("interactive", "owner/name", *options, stdin="The king\n").text
    assert cli("demo", "owner/name", "--max_tokens", 1).text.count("=====") > 0
    report = json.loads(cli("inspect", "owner/name", "--json").text)
    assert report["folder"].endswith(f"snapshots/{hub.commit('owner/name')}")
    assert report["suspicious"] == json.loads(cli("inspect", model, "--json").text)["suspicious"]
    assert cli("convert", "owner/name", tmp_path / "out", "--to", "hf").code == 0
    assert cli("complete", tmp_path / "out", "The king", *options).text == plain


def test_mistakes_of_a_command_line_cost_no_download(hub: Hub, model: Path, cli: Command, tmp_path: Path) -> None:
    hub.add("owner/name", model)
    assert "no prompt" in cli("complete", "--folder", "owner/name").error
    assert "no layout is called 'gguf'" in cli("convert", "owner/name", tmp_path / "out", "--to", "gguf").error
    assert hub.asked == []
    assert "no model of that name on the hub" in cli("inspect", "owner/other").error


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For a process to which the hub is the one, and whose cache is empty at first."""
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")} | ours


def test_stderr_says_what_is_fetched_and_has_no_bars(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("owner/name", model)
    words = [sys.executable, "-m", "main", "inspect", "owner/name"]
    env = environment(hub, tmp_path)
    first = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (first.returncode, first.stderr) == (0, "fetching owner/name: 2 files, 894.4 kB\n")
    env["HF_HUB_OFFLINE"] = "1"
    second = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert second.stderr == "the hub cannot be reached (HF_HUB_OFFLINE is set): owner/name is taken from the cache\n"


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGINT to send")
def test_ctrl_c_keeps_what_is_complete(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("owner/name", model)
    hub.stall = "consolidated.safetensors"
    words = [sys.executable, "-m", "main", "inspect", "owner/name"]
    env = environment(hub, tmp_path)
    with subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert hub.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    hub.stall = ""
    hub.go_on.set()
    hub.asked.clear()
    again = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stderr) == (0, "fetching owner/name: 1 file, 830.3 kB\n")
    assert hub.sent() == {"consolidated.safetensors"}


def test_the_library_is_not_imported_for_a_path(model: Path) -> None:
    code = (
        "import sys; from mistral.formats.inspect import inspect_folder; inspect_folder(sys.argv[1]); "
        "from mistral.formats import load; load(sys.argv[1]); print('huggingface_hub' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(model)], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize("what", [5, b"folder", ["folder"]])
def test_what_is_no_path_is_named(what: Any) -> None:
    with pytest.raises(UsageError, match="must be a path or a hub id"):
        load(what)
