"""Inspecting: every release known by its headers, wrong copies named, and figures that are those of the real thing."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mistral.args import ModelArgs
from mistral.cache import RollingBufferCache
from mistral.formats import huggingface as hf
from mistral.formats import inspect as inspect_module
from mistral.formats.folder import read_folder
from mistral.formats.inspect import ITEMSIZE, POSITIONS, inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.formats.releases import COMPARED, PARTS, RELEASES, Release, WrongCopy, identify
from mistral.formats.vllm import preflight
from mistral.loader.load import load
from mistral.tekken import PATTERN
from mistral.tokenizer import Tokenizer
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import BUNDLED, PARAMS, ROOT, make_folder, random_state, write_params
from tests.support.tiny import shapes_of

# From the mistral-common wheel, under the names that the releases give them.
TOKENIZERS = {
    "v1": ("tokenizer.model.v1", 32000),
    "v3": ("mistral_instruct_tokenizer_240323.model.v3", 32768),
    "v7": ("mistral_instruct_tokenizer_241114.model.v7", 32768),
    "v3-tekken": ("tekken_240718.json", 131072),
    "v7-tekken": ("tekken_240911.json", 131072),
    **dict.fromkeys(("v11-tekken", "v13-tekken", "v15-tekken"), ("tekken_240911.json", 131072)),
    "mistrallite": ("tokenizer.model.v1", 32000),
}
NESTED = (*PARTS, "tied_embeddings")
PART = 5 * 10**9  # bytes of a file, as in the releases that have several
# As their params.json have them: what the table of releases leaves out is left out here.
WRITTEN: dict[str, dict[str, Any]] = {
    "7B v0.1": {"sliding_window": 4096},
    "Small 3 24B": {"rope_theta": 1e8, "max_seq_len": 32768},
    "Ministral 8B 2410": {"rope_theta": 1e8, "_sliding_window": [None, 32768, 32768, 32768]},
}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def shape_of(release: Release) -> dict[str, Any]:
    return {name: getattr(release, name) for name in COMPARED if name not in ("rope_theta", "sliding_window")}


def args_of(release: Release, **changes: Any) -> ModelArgs:
    return ModelArgs(**{**{name: getattr(release, name) for name in (*COMPARED, *NESTED)}, **changes})


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The releases here are `hollow`, which is a note elsewhere: tests/formats/test_odd_weights.py."""
    monkeypatch.setattr("mistral.formats.folder.unwritten", lambda path: 0)


def hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file with a header and a hole for the tensors: as large as it says, and nothing on disk."""
    size, end, header = {"BF16": 2, "F32": 4}[dtype], 0, {}
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def parts(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    found: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > PART:
            found.append({})
            size = 0
        found[-1][name] = shape
        size += 2 * math.prod(shape)
    return found


def make_release(folder: Path, release: Release, tokenizer: bool = True) -> Path:
    """The folder of a release: its configuration, its tokenizer, and its tensors' headers."""
    args = args_of(release)
    shapes = shapes_of(args)
    stem = "consolidated"
    if release.layout == "mistral":
        written = WRITTEN.get(release.name, {"rope_theta": release.rope_theta})
        nested = {name: getattr(release, name).to_params() for name in PARTS if getattr(release, name) is not None}
        config: dict[str, Any] = {**shape_of(release), **written, **nested, "tied_embeddings": release.tied_embeddings}
        (folder / "params.json").write_text(json.dumps(config))
    else:
        config = {theirs: getattr(release, ours) for theirs, ours in hf.SHAPE.items()}
        config |= {"model_type": "mistral", "rope_theta": release.rope_theta, "sliding_window": release.sliding_window}
        if release.moe is not None:
            config |= {"model_type": "mixtral", "num_local_experts": release.moe.num_experts}
            config["num_experts_per_tok"] = release.moe.num_experts_per_tok
        (folder / "config.json").write_text(json.dumps(config))
        shapes = {hf.to_hf(name): shape for name, shape in shapes.items()}
        stem = "model"
    pieces = parts(shapes)
    for i, piece in enumerate(pieces, 1):
        hollow(folder / f"{stem}-{i:05}-of-{len(pieces):05}.safetensors", piece)
    if tokenizer:
        file, _ = TOKENIZERS[release.template]
        source = Path(str(files("mistral_common") / "data" / file))
        if release.template in ("v11-tekken", "v13-tekken", "v15-tekken"):  # mistral-common has none of these
            told = source.read_text(encoding="utf-8")
            renamed = told.replace('"version": "v3"', f'"version": "{release.tokenizer_version}"')
            assert renamed != told
            (folder / release.tokenizer_file).write_text(renamed, encoding="utf-8")
        else:
            shutil.copy(source, folder / release.tokenizer_file)
    return folder


# --- releases


BILLIONS = {
    "7B v0.1": 7.2,
    "7B v0.2": 7.2,
    "7B v0.3": 7.2,
    "Nemo 12B 2407": 12.2,
    "Codestral 22B v0.1": 22.2,
    "Small 3 24B": 23.6,
    "Large 2411": 122.6,
    "Large 2407": 122.6,
    "Ministral 8B 2410": 8.0,
    "MistralLite": 7.2,
    "Small 3.1 24B": 23.6,
    "Small 3.2 24B": 23.6,
    "Magistral Small 2509": 23.6,
    "Ministral 3 3B": 3.4,
    "Ministral 3 8B": 8.5,
    "Ministral 3 14B": 13.5,
    "Devstral Small 2 24B": 23.6,
    "Devstral 2 123B": 125.0,
    "Medium 3.5 128B": 125.0,
    "Mixtral 8x7B v0.1": 46.7,
    "Mixtral 8x22B v0.1": 140.6,
    "Mixtral 8x22B v0.3": 140.6,
}


def test_the_table_holds_the_releases() -> None:
    assert [r.name for r in RELEASES] == list(BILLIONS)
    for release in RELEASES:
        assert set(release.md5) <= set(release.variants)
        assert all(len(md5) == 32 for md5 in release.md5.values())
        assert release.tokenizer_file in release.files


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_each_release_is_recognised(tmp_path: Path, release: Release) -> None:
    report = inspect_folder(make_release(tmp_path, release))
    assert report["release"]["name"] == release.name
    assert report["release"]["variants"] == list(release.variants)
    assert report["release"]["template"] == release.template
    assert report["layout"] == release.layout
    assert round(report["parameters"] / 1e9, 1) == BILLIONS[release.name]
    assert report["rope_theta"]["value"] == release.rope_theta
    tokenizer = {"file": release.tokenizer_file, "kind": release.tokenizer_kind, "error": None}
    tokenizer["version"] = report["tokenizer"]["version"]  # mistral-common has no tekken.json of v7
    assert tokenizer["version"] in (release.tokenizer_version, "v3")
    assert report["tokenizer"] == {**tokenizer, "words": TOKENIZERS[release.template][1]}
    odd = [said for said in report["suspicious"] if "_sliding_window" not in said]
    assert odd == []
    assert len(report["suspicious"]) == (release.name == "Ministral 8B 2410")
    assert release.variants[0] in as_text(report)


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_windows_of_each_release(release: Release) -> None:
    known = (release.tokenizer_kind, release.tokenizer_version)
    assert identify(args_of(release), *known) == (release, [])
    # One pattern has many spellings: one window for each layer is what layer_types make of it.
    windows = args_of(release).windows
    assert identify(args_of(release, sliding_window=windows), *known) == (release, [])
    assert identify(args_of(release, sliding_window=(*windows[:-1], 77)))[0] is None


@pytest.mark.parametrize(
    ("release", "copy"),
    [pytest.param(r, c, id=f"{r.name}-{next(iter(c.values))}") for r in RELEASES for c in r.wrong_copies],
)
def test_known_wrong_copies(release: Release, copy: WrongCopy) -> None:
    args = args_of(release, **copy.values)
    before = replace(args)
    found, warnings = identify(args, release.tokenizer_kind, release.tokenizer_version)
    assert found == release
    (name, value), *_ = copy.values.items()
    assert warnings == [f"{name} is {value}: {copy.advice}"]
    assert args == before  # warned about, never overridden


def test_the_stray_window_of_v02_is_used_and_warned_about(tmp_path: Path) -> None:
    v02 = RELEASES[1]
    make_release(tmp_path, v02)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "sliding_window": 4096}))
    report = inspect_folder(tmp_path)
    assert report["release"]["name"] == "7B v0.2"
    assert set(report["window"]["layers"]) == {4096}
    assert report["suspicious"] == [
        "sliding_window is 4096: this release has none, and 4096 is a stray of wrong copies: set it to null"
    ]


def test_the_mirror_with_a_wrong_hidden_dim(cli: Command, tmp_path: Path) -> None:
    v01 = RELEASES[0]
    make_release(tmp_path, v01)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "hidden_dim": 4096}))
    error = cli("inspect", tmp_path).error
    assert "layers.0.feed_forward.w1.weight [4096, 4096]" in error
    assert error.endswith("; hidden_dim is 4096: a mirror shipped this by mistake: set it to 14336")
    assert cli("complete", tmp_path, "Hi").error == error
    config = {theirs: getattr(args_of(v01, hidden_dim=4096), ours) for theirs, ours in hf.SHAPE.items()}
    more = {"model_type": "mistral", "head_dim": v01.head_dim, "rope_theta": v01.rope_theta, "sliding_window": 4096}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **more}))
    shapes = {hf.to_hf(name): shape for name, shape in shapes_of(args_of(v01)).items()}
    hollow(tmp_path / "hf" / "model.safetensors", shapes)
    error = cli("inspect", tmp_path / "hf").error
    assert error.endswith("; intermediate_size is 4096: a mirror shipped this by mistake: set it to 14336")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 32002}, "vocab_size 32002 apart, this is 7B v0.1 (which has 32000): a fine-tune or a wrong"),
        ({"rope_theta": 2e4}, "rope_theta 20000 apart, this is 7B v0.1 (which has 10000): a fine-tune or a wrong"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06 apart, this is 7B v0.1 (which has 1e-05): a fine-tune or a wrong copy"),
        ({"n_kv_heads": 4, "dim": 2048}, None),
    ],
)
def test_almost_a_release(change: dict[str, Any], said: str | None) -> None:
    release, warnings = identify(args_of(RELEASES[0], **change))
    assert release is None
    assert len(warnings) == (said is not None)
    assert said is None or warnings[0].startswith(said)


def test_a_fine_tune_with_mistrallites_vocabulary_is_not_mistrallite() -> None:
    v01, lite = RELEASES[0], next(release for release in RELEASES if release.name == "MistralLite")
    assert identify(args_of(v01, vocab_size=lite.vocab_size))[0] is None
    assert identify(args_of(lite))[0] == lite


def test_a_tokenizer_of_the_other_kind() -> None:
    release, warnings = identify(args_of(RELEASES[2]), "tekken")
    assert release == RELEASES[2]
    assert warnings == ["the tokenizer is of kind tekken, but 7B v0.3 has tokenizer.model.v3: it is another model's"]


def test_a_billion_layers_cost_nothing() -> None:
    assert identify(args_of(RELEASES[0], n_layers=2**31 - 1))[0] is None


# --- figures


@pytest.mark.parametrize("window", [None, 5, [None, 300]], ids=str)
def test_memory_is_what_the_model_and_its_cache_take(tmp_path: Path, window: Any) -> None:
    report = inspect_folder(make_folder(tmp_path, sliding_window=window))
    assert [entry["positions"] for entry in report["memory"]["cache"]] == list(POSITIONS)
    for name, size in ITEMSIZE.items():
        dtype = getattr(torch, name)
        assert dtype.itemsize == size
        loaded = load(tmp_path, device="cpu", dtype=dtype)
        assert loaded.runtime.weights == dtype
        assert report["memory"]["weights"][name] == sum(p.nbytes for p in loaded.model.parameters())
        assert report["parameters"] == sum(p.numel() for p in loaded.model.parameters())
        for entry in report["memory"]["cache"]:
            cache = RollingBufferCache(loaded.args, 1, dtype=dtype, positions=entry["positions"])
            assert entry["bytes"][name] == cache.nbytes
            few = RollingBufferCache(loaded.args, 1, dtype=torch.int8, positions=entry["positions"])
            assert entry["bytes"]["int8"] == few.nbytes


def test_sizes_add_up(tmp_path: Path) -> None:
    report = inspect_folder(make_folder(tmp_path, form="parts"))
    assert [f["name"] for f in report["files"]] == sorted(p.name for p in tmp_path.iterdir())
    assert all(f["bytes"] == (tmp_path / f["name"]).stat().st_size for f in report["files"])
    assert report["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert sum(d["parameters"] for d in report["dtypes"].values()) == report["parameters"]
    assert sum(d["tensors"] for d in report["dtypes"].values()) == 2 * 9 + 3
    roles = [f["role"] for f in report["files"]]
    assert (roles.count("weights"), roles.count("shape"), roles.count("tokenizer"), len(roles)) == (3, 1, 1, 5)


KEYS = {
    "folder": str,
    "release": (dict, type(None)),
    "layout": str,
    "files": list,
    "bytes": int,
    "parameters": int,
    "dtypes": dict,
    "shape": dict,
    "parts": dict,
    "active_parameters": int,
    "window": dict,
    "rope_theta": dict,
    "trained_length": (int, type(None)),
    "tokenizer": dict,
    "ends": list,
    "template": dict,
    "memory": dict,
    "suspicious": list,
    "serve": dict,
}


def test_json_has_the_same_keys_always(cli: Command, tmp_path: Path) -> None:
    v03 = RELEASES[2]
    for folder in ((), (make_release(tmp_path, v03, tokenizer=False),)):
        (line,) = cli("inspect", *folder, "--json").text.splitlines()
        report = json.loads(line)
        assert list(report) == list(KEYS)
        for key, kind in KEYS.items():
            assert isinstance(report[key], kind), key
        assert {key for f in report["files"] for key in f} == {"name", "bytes", "role"}
        assert set(report["window"]) == {"text", "layers", "rule"}
        assert len(report["window"]["layers"]) == report["shape"]["n_layers"]
        assert set(report["rope_theta"]) == {"value", "rule"}
        assert set(report["tokenizer"]) == {"file", "kind", "version", "words", "error"}
        assert set(report["memory"]) == {"weights", "quantized", "blocks", "cache"}
        assert set(report["memory"]["quantized"]) == {"int8", "int4"}
        assert set(report["parts"]) == {"yarn", "llama_4_scaling", "moe", "tied_embeddings"}
        assert set(report["memory"]["weights"]) == set(ITEMSIZE)
        assert set(report["serve"]) == {"commands", "convert_first", "refused", "notes"}
        if folder:
            keys = {"name", "variants", "template", "tokenizer", "files", "md5"}
            assert set(report["release"]) == keys


# --- headers only

MEASURED = """
import json, sys
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
def read(): return int(open("/proc/self/io").read().split()[1])  # rchar: bytes of read calls
def kilobytes(name): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
def measure(call):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    calls, pages = read(), kilobytes("VmRSS")
    result = call()
    return read() - calls, 1024 * (kilobytes("VmHWM") - pages), result
inspect_folder()  # whatever is imported late is imported now
calls, pages, report = measure(lambda: inspect_folder(sys.argv[1]))
_, touched, _ = measure(lambda: read_folder(sys.argv[1]).weights.readers["tok_embeddings.weight"]().sum())
print(json.dumps([calls, pages, touched, report["bytes"]]))
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_of_a_14_gb_file_only_the_header_is_read(tmp_path: Path) -> None:
    v01 = RELEASES[0]
    shapes = shapes_of(args_of(v01))
    hollow(tmp_path / "consolidated.safetensors", shapes)
    (tmp_path / "params.json").write_text(json.dumps({**shape_of(v01), "sliding_window": 4096}))
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    words = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    calls, pages, touched, total = json.loads(done.stdout)
    assert total > 14e9
    assert 0 < calls < 1e6  # read
    assert pages < 32e6  # mapped and touched
    assert touched > 200e6  # one tensor would have been noticed


IMPORTED = """
import json, sys
from pathlib import Path
from mistral.cli import main
code = main(["inspect", sys.argv[1], "--json"])
slow = [name for name in ("torch", "numpy", "mistral_common", "safetensors", "tqdm") if name in sys.modules]
counts, status = Path("/proc/self/io"), Path("/proc/self/status")
read = int(counts.read_text().split()[1]) if counts.exists() else 0
peak = 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]) if status.exists() else 0
print(json.dumps([code, slow, read, peak]))
"""


def inspected(folder: Path) -> tuple[dict[str, Any], list[str], int, int]:
    """The report of a process of its own, what it imported of the slow libraries, bytes read, and memory."""
    words = [sys.executable, "-c", IMPORTED, str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report, facts = done.stdout.splitlines()
    code, *rest = json.loads(facts)
    assert code == 0
    return json.loads(report), *rest


@pytest.mark.parametrize("name", ["7B v0.1", "Nemo 12B 2407", "MistralLite"])
def test_pytorch_and_mistral_common_are_not_imported(tmp_path: Path, name: str) -> None:
    (release,) = (r for r in RELEASES if r.name == name)
    report, slow, *_ = inspected(make_release(tmp_path, release))
    assert (report["release"]["name"], slow) == (name, [])
    assert report["tokenizer"]["words"] == TOKENIZERS[release.template][1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes as Linux does")
def test_of_a_file_far_larger_than_memory_next_to_nothing_is_read(tmp_path: Path) -> None:
    (large,) = (r for r in RELEASES if r.name == "Large 2411")
    make_release(tmp_path, large)
    for part in tmp_path.glob("*.safetensors"):
        part.unlink()
    hollow(tmp_path / "consolidated.safetensors", shapes_of(args_of(large)))
    assert (tmp_path / "consolidated.safetensors").stat().st_size > 240e9
    report, _, read, memory = inspected(tmp_path)
    assert report["release"]["name"] == "Large 2411"
    assert report["memory"]["weights"]["bfloat16"] > 240e9
    assert 0 < read < 40e6  # most of it is Python's own modules
    assert 0 < memory < 200e6


# --- what looks wrong


def suspicious(folder: Path) -> str:
    return "\n".join(inspect_folder(folder)["suspicious"])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with nothing odd about it."""
    folder = make_folder(tmp_path / "tiny", random_state(dtype=torch.bfloat16), rope_theta=1e4)
    assert suspicious(folder) == ""
    return folder


def test_a_tokenizer_that_is_missing_broken_or_anothers(tiny: Path) -> None:
    shutil.copy(str(files("mistral_common") / "data" / "tokenizer.model.v1"), tiny / "tokenizer.model")
    assert suspicious(tiny) == "tokenizer.model has 32000 words, but the model knows 4096: it is another model's"
    (tiny / "tokenizer.model").write_bytes(b"nothing")
    assert suspicious(tiny) == f"{tiny}/tokenizer.model is not a SentencePiece model: fetch it again"
    assert inspect_folder(tiny)["tokenizer"]["file"] == "tokenizer.model"
    (tiny / "tokenizer.model").unlink()
    assert suspicious(tiny).startswith(f"no tokenizer in {tiny}: expected tokenizer.model")
    assert "\ntokenizer   none\n" in as_text(inspect_folder(tiny))


def test_a_tokenizer_smaller_than_the_model(tmp_path: Path) -> None:
    make_folder(tmp_path, random_state(dtype=torch.bfloat16, vocab_size=4100), rope_theta=1e4, vocab_size=4100)
    assert (
        suspicious(tmp_path) == "tokenizer.model has 4096 words, but the model knows 4100: the ids above have no text"
    )


def test_a_template_that_is_none(tiny: Path) -> None:
    pytest.importorskip("jinja2")
    (tiny / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    assert suspicious(tiny) == ""
    (tiny / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    assert suspicious(tiny).startswith("the template of chat_template.jinja is no Jinja: ")
    (tiny / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    assert suspicious(tiny) == f"{tiny}/chat_template.jinja cannot be read: it is not UTF-8"


def test_added_tokens_have_text(tmp_path: Path) -> None:
    make_folder(tmp_path, random_state(dtype=torch.bfloat16, vocab_size=4100), rope_theta=1e4, vocab_size=4100)
    added = {f"<|extra_{i}|>": 4096 + i for i in range(4)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    assert "have no text" not in suspicious(tmp_path)
    del added["<|extra_3|>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    said = "tokenizer.model has 4096 words and tokens added up to id 4098, but the model knows 4100: the ids above"
    assert said in suspicious(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": "llama"}, "model_type is llama in config.json, which has none"),
        ({"model_type": "llama", "sliding_window": 4}, "model_type is llama in config.json, which has none"),
        ({"model_type": "ministral3"}, "absent from config.json, which means none"),
        ({"model_type": "mistral"}, "absent from config.json, which means 4096"),
        ({"model_type": "mistral", "sliding_window": 4}, "given in config.json"),
    ],
)
def test_the_rule_of_a_window_that_a_config_does_not_give(changes: dict[str, Any], rule: str) -> None:
    config = {theirs: PARAMS.get(ours, 0) for theirs, ours in hf.SHAPE.items()}
    layout = hf.HuggingFaceLayout()
    raw = {**config, "head_dim": 8, "rope_theta": 1e4, **changes}
    assert layout.window_rule(raw) == rule
    args, notes = layout.to_args(raw)
    assert args.window_text == {"4096": "4096", "none": "none"}.get(rule.split()[-1], "4")
    assert any("model_type is llama" in note for note in notes) == (changes["model_type"] == "llama")


def tekken(**changes: Any) -> dict[str, Any]:
    config = {"default_vocab_size": 4096, "default_num_special_tokens": 1000, "pattern": PATTERN}
    return {"config": {**config, **changes}, "vocab": [{"rank": i} for i in range(3096)]}


@pytest.mark.long
def test_words_of_a_tekken_are_those_of_mistral_common(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    shutil.copy(str(files("mistral_common") / "data" / "tekken_240911.json"), path)
    for words in (131072, 100_000):
        raw = json.loads(path.read_text())
        raw["config"]["default_vocab_size"] = words
        path.write_text(json.dumps(raw))
        assert inspect_module._words_and_version(path) == (Tokenizer(path).n_words, "v3")
        assert Tokenizer(path).n_words == words


@pytest.mark.parametrize(
    "broken",
    [
        tekken(default_vocab_size=4097),  # more than the words that are there
        tekken(default_vocab_size="4096"),
        tekken(default_vocab_size=True),
        tekken(default_vocab_size=0),
        tekken(default_num_special_tokens=0),
        tekken(default_num_special_tokens=4096),
        {**tekken(), "config": None},
        {**tekken(), "config": {}},
        {**tekken(), "vocab": 3096},
        {**tekken(), "special_tokens": False},
        {**tekken(), "special_tokens": 0},
        {},
        [],
        "{",
    ],
    ids=lambda broken: json.dumps(broken)[:90],
)
def test_a_tekken_that_is_broken(tiny: Path, broken: Any) -> None:
    (tiny / "tokenizer.model").unlink()
    (tiny / "tekken.json").write_text(json.dumps(tekken()))
    facts = {"file": "tekken.json", "kind": "tekken", "version": None, "words": 4096, "error": None}
    assert inspect_folder(tiny)["tokenizer"] == facts
    (tiny / "tekken.json").write_text(broken if isinstance(broken, str) else json.dumps(broken))
    assert suspicious(tiny).startswith(f"{tiny}/tekken.json is not a tekken tokenizer")
    assert suspicious(tiny).endswith("fetch it again")
    assert inspect_folder(tiny)["tokenizer"]["words"] is None


def test_several_tokenizers(tiny: Path) -> None:
    shutil.copy(tiny / "tokenizer.model", tiny / "tokenizer.model.v3")
    assert suspicious(tiny) == ""  # as in the releases of v0.3: the same twice
    with (tiny / "tokenizer.model").open("ab") as file:
        file.write(b"\x18\x00")
    assert suspicious(tiny).startswith("several tokenizers: tokenizer.model.v3 is read, tokenizer.model ignored")


def test_a_guessed_theta(tmp_path: Path) -> None:
    make_folder(tmp_path, random_state(dtype=torch.bfloat16))
    said = "rope_theta is absent, and a sliding window is declared: no release tells whether 10000 is right"
    assert suspicious(tmp_path) == said


def test_leftovers(tiny: Path) -> None:
    (tiny / "pytorch_model.bin").write_bytes(bytes(2000))
    (tiny / "model.onnx").write_bytes(bytes(500))
    (tiny / "consolidated.safetensors.part").write_bytes(b"x")
    (tiny / "gone.json").symlink_to("nowhere")
    assert suspicious(tiny).splitlines() == [
        "not read, 2.5 kB: model.onnx and 1 more",
        "a download that has not ended: consolidated.safetensors.part",
        "gone.json is a link to a file that is gone",
    ]


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, "twice"), (torch.float64, "four times")])
def test_wide_and_mixed_dtypes(tmp_path: Path, dtype: torch.dtype, times: str) -> None:
    state = random_state(dtype=torch.bfloat16)
    state["norm.weight"] = state["norm.weight"].to(dtype)
    name = str(dtype).removeprefix("torch.")
    (said,) = suspicious(make_folder(tmp_path / "norm", state, rope_theta=1e4)).splitlines()
    assert {f"1 {name}", "20 bfloat16"} == set(said.partition(": ")[2].split(", "))
    state = {name: t if name == "norm.weight" else t.to(dtype) for name, t in random_state().items()}
    said = suspicious(make_folder(tmp_path / "all", state, rope_theta=1e4)).splitlines()[-1]
    assert said == f"stored as {name}, {times} the size of bfloat16, which is what the releases have"


def hf_config(**changes: Any) -> dict[str, Any]:
    config = {theirs: PARAMS[ours] for theirs, ours in hf.SHAPE.items()}
    more = {"model_type": "mistral", "head_dim": PARAMS["head_dim"], "rope_theta": 1e4, "sliding_window": 5}
    return {**config, **more, **changes}


def test_both_layouts(tiny: Path) -> None:
    (tiny / "config.json").write_text(json.dumps(hf_config()))
    assert suspicious(tiny) == ""
    (tiny / "config.json").write_text(json.dumps(hf_config(sliding_window=None, rope_theta=1e6)))
    (tiny / "model.safetensors").write_bytes(bytes(100))
    report = inspect_folder(tiny)
    assert report["layout"] == "mistral"
    assert report["suspicious"] == [
        "the folder holds several layouts: Mistral's was read, Hugging Face's was ignored",
        "params.json, which was read, and config.json differ: rope_theta 10000 and 1e+06, window 5 and none",
        "not read, 100 B: model.safetensors",
    ]
    (tiny / "config.json").write_text("{")
    assert "config.json is there too, ignored, and wrong: " in suspicious(tiny)


@pytest.mark.parametrize(
    ("params", "text", "rule"),
    [
        ({"sliding_window": 5}, "5", "given in params.json"),
        ({"sliding_window": None}, "none", "given in params.json"),
        ({"_sliding_window": [None, 5]}, "none x1 + 5 x1 layers", "given as _sliding_window in params.json"),
        ({}, "none", "absent from params.json, which means none"),
    ],
)
def test_the_window_and_its_rule(tiny: Path, params: dict[str, Any], text: str, rule: str) -> None:
    kept = {name: value for name, value in PARAMS.items() if name != "sliding_window"}
    (tiny / "params.json").write_text(json.dumps({**kept, "rope_theta": 1e4, **params}))
    report = inspect_folder(tiny)
    assert (report["window"]["text"], report["window"]["rule"]) == (text, rule)
    assert f"window      {text}" in as_text(report)


# --- vLLM


def test_the_command_for_mistrals_layout(tiny: Path) -> None:
    options = "--tokenizer_mode mistral --config_format mistral --load_format mistral --generation_config vllm"
    serve = inspect_folder(tiny)["serve"]
    assert serve == {
        "commands": [f"vllm serve {tiny} {options}"],
        "convert_first": None,
        "refused": [],
        "notes": [],
    }


def test_a_pth_folder_is_converted_first(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "two words", form="pth")
    serve = inspect_folder(folder)["serve"]
    convert, vllm = (shlex.split(command) for command in serve["commands"])
    assert convert == ["python", "-m", "main", "convert", str(folder), f"{folder}-converted", "--to", "mistral"]
    assert vllm[:3] == ["vllm", "serve", f"{folder}-converted"]
    assert serve["convert_first"] == "vLLM does not read .pth files"


def test_commands_for_hugging_faces_layout(tmp_path: Path) -> None:
    state = random_state(dtype=torch.bfloat16)
    save_file({hf.to_hf(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    options = "--config_format hf --load_format safetensors --generation_config vllm"
    assert inspect_folder(tmp_path)["suspicious"] == []
    assert inspect_folder(tmp_path)["serve"]["commands"] == [
        f"vllm serve {tmp_path} --tokenizer_mode mistral {options}"
    ]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert inspect_folder(tmp_path)["serve"]["commands"] == [f"vllm serve {tmp_path} {options}"]
    types = {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(**types)))
    report = inspect_folder(tmp_path)
    assert report["window"] == {"text": "none x1 + 5 x1 layers", "layers": [None, 5], "rule": report["window"]["rule"]}
    assert report["window"]["rule"] == "given by layer_types in config.json"
    assert [command.split()[0] for command in report["serve"]["commands"]] == ["python", "vllm"]


def plain_folder(path: Path, form: str = "single", **params: Any) -> Path:
    """A folder in Mistral's layout of which vLLM changes nothing."""
    folder = make_folder(path, random_state(dtype=torch.bfloat16), form=form)
    write_params(folder, {**PARAMS, "rope_theta": 1e4, **params})
    return folder


REFUSED: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("single", "{{ messages }}", {}, "template"),
    ("single", "", {"rope_theta": None, "sliding_window": None}, "theta"),
    ("single", "", {"sliding_window": [5, 3]}, "window"),
    ("single", "", {"sliding_window": "5"}, "window"),
    ("single", "", {}, ""),
    ("pth", "{{ messages }}", {}, ""),
    ("pth", "", {"sliding_window": "5"}, ""),
    ("pth", "", {"sliding_window": [5, 3]}, "window"),
)


@pytest.mark.parametrize(("form", "template", "params", "word"), REFUSED)
def test_what_deploy_refuses_is_not_offered(
    tmp_path: Path, form: str, template: str, params: dict[str, Any], word: str
) -> None:
    folder = plain_folder(tmp_path / "m", form, **params)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    report = inspect_folder(folder)
    text = as_text(report)
    refused = preflight(read_folder(folder), report)
    if not word:
        assert not [finding for finding in refused if not finding.mended]
        assert "\nserved by vLLM" in text
        assert text.splitlines()[-1].endswith("--generation_config vllm")
        return
    assert word in {finding.what for finding in refused}
    assert report["serve"]["commands"] == []
    assert "vllm serve" not in text
    heading = text.splitlines().index("not served by vLLM as it is")
    assert text.splitlines()[heading + 1 : heading + 1 + len(refused)] == [f"  {f.text}" for f in refused]
    assert text.endswith(f"--target vllm --accept {word}") == (not any(f.fatal for f in refused))


def test_a_folder_that_is_converted_for_its_template_is_one_that_deploy_takes(tmp_path: Path, cli: Command) -> None:
    folder = plain_folder(tmp_path / "m", "pth")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    convert, vllm = (shlex.split(command) for command in inspect_folder(folder)["serve"]["commands"])
    assert cli(*convert[3:]).code == 0
    after = inspect_folder(vllm[2])["serve"]
    assert [shlex.split(command) for command in after["commands"]] == [vllm]


# --- the command


def test_the_model_that_ships(cli: Command) -> None:
    out = cli("inspect")
    assert out.err == ""
    lines = out.text.splitlines()
    assert "parameters  6.3 M, stored as bfloat16" in lines
    assert "window      64 in every layer (given in params.json)" in lines
    assert "tokenizer   tokenizer.model: SentencePiece, 4096 words" in lines
    assert lines[lines.index("suspicious") + 1] == "  nothing"
    assert lines[-1].startswith("  vllm serve ")
    assert json.loads(cli("inspect", "--json").text)["release"] is None


def test_the_docs_show_what_is_printed(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = f"$ python -m main inspect\n{cli('inspect').text}```\n"
    assert shown in (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def test_columns_are_aligned(cli: Command, tmp_path: Path) -> None:
    lines = cli("inspect", make_release(tmp_path, RELEASES[2])).text.splitlines()
    table = lines[lines.index("") + 1 : lines.index("files") - 1]
    assert len(table) == 4 + 2 * len(POSITIONS)  # the cache in int8 has a row of its own
    assert len({len(line) for line in table}) == 1
    listed = lines[lines.index("files") + 1 : lines.index("suspicious") - 1]
    assert len({line.rindex("B  ") for line in listed}) == 1


def test_names_of_files_cannot_garble_the_output(cli: Command, tiny: Path) -> None:
    for name in (b"new\nline", b"\xff.bin", "größe.txt".encode()):
        try:
            Path(os.fsdecode(os.fsencode(tiny) + b"/" + name)).write_bytes(b"x")
        except OSError:
            pytest.skip("this file system takes no such names")
    text = cli("inspect", tiny).text
    assert r"new\nline" in text
    assert r"\udcff.bin" in text
    assert "größe.txt" in text
    names = [f["name"] for f in json.loads(cli("inspect", tiny, "--json").text)["files"]]
    assert {"new\nline", "größe.txt"} < set(names)


def test_errors_are_one_line(cli: Command, tiny: Path, tmp_path: Path) -> None:
    assert cli("inspect", tmp_path / "none").error == f"no such folder: {tmp_path / 'none'}"
    assert cli("inspect", tiny / "params.json").error.endswith("is a file: give the folder that it is in")
    assert cli("inspect", tmp_path).error.startswith("no params.json and no config.json and no .gguf file in")
    assert cli("inspect", tiny, "--jsn").error == "no flag --jsn; did you mean --json?"
    weights = (tiny / "consolidated.safetensors").read_bytes()
    (tiny / "consolidated.safetensors").write_bytes(weights[:-1])
    assert "is not a complete safetensors file" in cli("inspect", tiny).error
    (tiny / "params.json").write_text(json.dumps({**PARAMS, "kv_lora_rank": 512}))
    assert cli("inspect", tiny).error.startswith("params.json has 'kv_lora_rank': latent attention")


def test_the_template_is_told_of_unknown_models_too(tmp_path: Path) -> None:
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    for i, (source, name, template) in enumerate(
        (
            ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model", "v3"),
            ("tokenizer.model.v1", "tokenizer.model", "v1"),
            ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model.v7", "v7"),
            ("tekken_240911.json", "tekken.json", "v3-tekken"),
        )
    ):
        rule = ("assumed from the control tokens of tokenizer.model", f"by {name}")[i > 1]
        rule = "assumed, as tokenizer.model has no control token [INST]" if template == "v1" else rule
        folder = make_folder(tmp_path / str(i), tokenizer=False, vocab_size=131072, dim=8, n_layers=2)
        assert inspect_folder(folder)["template"] is None
        shutil.copy(data / source, folder / name)
        report = inspect_folder(folder)
        assert report["release"] is None
        assert report["template"] == {"name": template, "rule": rule}
        assert f"template    {template}, {rule}" in as_text(report)


def test_a_folder_without_a_tokenizer_has_no_command_that_serves_it(tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    report = inspect_folder(tmp_path / "model")
    assert report["serve"]["commands"] == []
    (refused,) = report["serve"]["refused"]
    assert (refused["what"], refused["fatal"]) == ("tokenizer", True)
    heading, reason = as_text(report).splitlines()[-2:]
    assert heading == "not served by vLLM as it is"
    assert reason.startswith("  it has no tokenizer: no tokenizer in")
