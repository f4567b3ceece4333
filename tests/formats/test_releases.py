"""Every dense release, scaled down: converted both ways, in transformers, in conversation; and the table in docs/."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.chat.conversation import Chat
from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.formats.convert import convert
from mistral.formats.releases import PARTS
from mistral.formats.releases import RELEASES as REGISTRY
from mistral.loader.load import load
from tests.formats.test_huggingface import LENS, RELEASES, assert_same, their_logits
from tests.support.folders import PARAMS, ROOT, make_folder, random_state
from tests.support.tiny import TOLERANCE, distance, ragged, whole

# For each release: the tokenizer of mistral-common that is its own, the file's name in the release, and the template.
TOKENIZERS = {
    "v0.1": ("tokenizer.model.v1", "tokenizer.model", "v1"),
    "instruct-v0.2": ("tokenizer.model.v1", "tokenizer.model", "v1"),
    "v0.3": ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3", "v3"),
    "nemo": ("tekken_240718.json", "tekken.json", "v3-tekken"),
    "codestral": ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3", "v3"),
    "small-3": ("tekken_240911.json", "tekken.json", "v7-tekken"),
    "large": ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model.v7", "v7"),
    "ministral": ("tekken_240911.json", "tekken.json", "v3-tekken"),
    "mistrallite": ("tokenizer.model.v1", "tokenizer.model", "mistrallite"),
    "small-3.1": ("tekken_240911.json", "tekken.json", "v7-tekken"),
}
NAMES = {
    "v0.1": "7B v0.1",
    "instruct-v0.2": "7B v0.2",
    "v0.3": "7B v0.3",
    "nemo": "Nemo 12B 2407",
    "codestral": "Codestral 22B v0.1",
    "small-3": "Small 3 24B",
    "large": "Large 2411",
    "ministral": "Ministral 8B 2410",
    "mistrallite": "MistralLite",
    "small-3.1": "Small 3.1 24B",
}
TABLE = ROOT / "docs" / "releases.md"


def test_every_release_is_here() -> None:
    """One of each shape: those of one shape differ in nothing that is computed. Those with scaled positions or experts
    are in test_family.py and test_moe.py."""
    plain = [release for release in reversed(REGISTRY) if all(getattr(release, part) is None for part in PARTS)]
    shapes = {release.shape: release.name for release in plain}
    assert list(NAMES.values()) == list(reversed(shapes.values()))
    for key, (_, file, template) in TOKENIZERS.items():
        release = next(r for r in REGISTRY if r.name == NAMES[key])
        assert (release.tokenizer_file, release.template) == (file, template)


@pytest.mark.parametrize("release", NAMES)
def test_a_release_converts_both_ways(tmp_path: Path, release: str) -> None:
    """Mistral's layout to Hugging Face's and back, every tensor bit for bit; transformers reads the one in between."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    raw, form = RELEASES[release]
    state = random_state(seed=8, **{k: v for k, v in raw.items() if k in PARAMS})
    source = make_folder(tmp_path / "source", state, form, **{"sliding_window": None, **raw})
    convert(source, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "mistral")
    first, last = (load(f, device="cpu", kernels=False) for f in (source, tmp_path / "back"))
    assert last.args == type(last.args)(**{**vars(first.args), "theta_rule": last.args.theta_rule})
    assert_same(last.model.state_dict(), first.model.state_dict())
    assert_same(last.model.state_dict(), state)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    prompts = ragged(LENS, raw["vocab_size"], seed=5)
    with torch.no_grad():
        assert distance(whole(first.model, prompts), their_logits(other, prompts)) < TOLERANCE


# Of those that share a file and a template, the first.
CHATTED = [next(name for name, its in TOKENIZERS.items() if its == kind) for kind in dict.fromkeys(TOKENIZERS.values())]


@pytest.mark.parametrize("release", [pytest.param(n, marks=[] if n in CHATTED else pytest.mark.long) for n in NAMES])
def test_a_release_chats(tmp_path: Path, release: str) -> None:
    """With its own tokenizer, in its own template; the second turn takes in only what is new."""
    mistral_common = pytest.importorskip("mistral_common")
    data, file, template = TOKENIZERS[release]
    small = {"dim": 16, "n_layers": 4, "hidden_dim": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4}
    raw = {
        **RELEASES[release][0],
        **small,
        "vocab_size": next(r.vocab_size for r in REGISTRY if r.name == NAMES[release]),
    }
    raw.pop("max_seq_len", None)
    folder = make_folder(tmp_path / "model", tokenizer=False, **{"sliding_window": None, **raw})
    source = Path(mistral_common.__file__).parent / "data" / data
    if template == "v7-tekken":  # mistral-common brings none of this version: it is that of v3 under another number
        told = json.loads(source.read_text(encoding="utf-8"))
        told["config"]["version"] = "v7"
        told.pop("image", None)
        (folder / file).write_text(json.dumps(told), encoding="utf-8")
    else:
        shutil.copy(source, folder / file)
    loaded = load(folder, device="cpu")
    found = find_template(loaded.tokenizer, release="mistrallite" if template == "mistrallite" else None)
    assert found.name == template
    system = "" if template == "mistrallite" else "Be brief."
    chat = Chat(loaded.model, loaded.tokenizer, found, system=system, temperature=0, max_tokens=5)
    for question in ("Hi", "Bye"):
        text = "".join(piece.text for piece in chat.answer(question))
        assert text == chat.messages[-1].content == loaded.tokenizer.decode(chat.messages[-1].ids)
    ids = found.encode_chat([Message("system", system), *chat.messages])
    before = found.encode_chat([Message("system", system), *chat.messages[:2], Message("user", "Bye")])
    assert chat.prefilled_tokens + chat.cached_tokens == len(before)
    # From v2 to v3 the system prompt moves to the newest turn, so that all after the first [INST] is new.
    moved = template in ("v3", "v3-tekken")
    assert chat.cached_tokens == (2 if moved else len(before) - chat.prefilled_tokens) > 0
    if not moved:
        assert chat.prefilled_tokens < len(before) / 2 + 2
    assert ids[: len(before)] == before


def assert_quantized(folder: Path, scratch: Path) -> None:
    """A folder runs in int8 and int4, close to what it was made from, and as it does when it was converted before."""
    ids = torch.arange(5, 25)
    with torch.inference_mode():
        want = load(folder, device="cpu").model.forward(ids, [20])
        for quant, limit in (("int8", 0.2), ("int4", 3.0)):
            got = load(folder, device="cpu", quant=quant).model.forward(ids, [20])
            assert 0 < (got - want).abs().max() < limit * want.std()
            convert(folder, scratch / quant, "mistral", quant=quant)
            assert torch.equal(load(scratch / quant, device="cpu").model.forward(ids, [20]), got)


@pytest.mark.parametrize("release", NAMES)
def test_a_release_is_quantized(tmp_path: Path, release: str) -> None:
    raw, form = RELEASES[release]
    state = random_state(seed=8, **{k: v for k, v in raw.items() if k in PARAMS})
    folder = make_folder(tmp_path / "model", state, form, **{"sliding_window": None, **raw})
    assert_quantized(folder, tmp_path)


# --- the table in docs/


def rows_of_table() -> list[list[str]]:
    """Cells of each line of each table, without heads."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    heads = {i - 1 for i, line in enumerate(lines) if set(line) <= set("|- ")}
    body = [line for i, line in enumerate(lines) if i not in heads and not set(line) <= set("|- ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def test_every_release_has_a_row() -> None:
    first = [row[0] for row in rows_of_table()]
    known = {name for row in first for name in re.split(r", | and ", row)}
    missing = [release.name for release in REGISTRY if release.name not in known]
    assert missing == ["Large 2407"]  # but for its tokenizer that of Large 2411


def test_every_cell_names_a_test_that_is_there() -> None:
    """Functions by name, their parameters as they are spelled in the tests, and files."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    tests: dict[str, str] = {}
    for path, source in sources.items():
        for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE):
            tests[name] = tests.get(name, "") + str(path)
    text = TABLE.read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)(?:\[([^\]`]+)\])?`", text)
    assert len(named) > 60
    spelled = "".join(sources.values()) + "".join(f'"{release.name}"' for release in REGISTRY)
    for name, parameter in named:
        assert name in tests, name
        if parameter:
            parts = [parameter, *parameter.split("-")]
            assert any(f'"{part}"' in spelled for part in parts), f"{name}[{parameter}]"
    for path in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path


def test_the_table_names_tests_that_are_there() -> None:
    """docs/releases.md: a row for each release, and each cell's test exists for it."""
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][: 1 + len(NAMES)]
    assert [row[0] for row in body] == list(NAMES.values())
    for key, row in zip(NAMES, body, strict=True):
        cells: dict[str, Any] = dict(zip(head, row, strict=True))
        assert len(cells) == len(head) == 7
        for cell in row[1:]:
            name, parameter = re.fullmatch(r"`(\w+)\[([\w.-]+)\]`", cell).groups()  # type: ignore[union-attr]
            assert parameter == key
            sources = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
            assert any(f"def {name}(" in source for source in sources), name
