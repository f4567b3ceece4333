"""GGUF files: read as the `gguf` package reads them, and broken ones refused in one line."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from mistral.formats import gguf_header
from mistral.formats.gguf import BlockReader, args_of, ignored, is_tied, name_of, open_gguf, to_mistral
from mistral.formats.gguf_header import GgufError, StringArray, _shortest, is_gguf, read_gguf
from mistral.formats.gguf_tokenizer import byte_level, sentencepiece_model
from mistral.formats.weights import WeightsError, check_tensors
from mistral.model import Transformer
from mistral.parameters import OUTPUT, parameters
from mistral.util.errors import FormatError
from tests.support.gguf_files import gguf_args, shape_keys, write_gguf
from tests.support.tiny import tiny_args, tiny_model

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def model_of(path: Path) -> Transformer:
    """The model in a file, in fp32."""
    gguf = read_gguf(path)
    weights = open_gguf(gguf)
    args, _ = args_of(gguf.metadata, tied=is_tied(weights))
    shapes = {name_of(name): parameter.shape for name, parameter in parameters(args).items()}
    check_tensors(weights.tensors, shapes, path.name, "the metadata")
    model = Transformer(args)
    model.load_state_dict({name: weights.get(name_of(name)).float() for name in parameters(args)}, assign=True)
    return model


# --- sound files


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    held = write_gguf(path, kind)
    assert is_gguf(path)
    gguf = read_gguf(path)
    args, _ = args_of(gguf.metadata)
    assert args == gguf_args()
    weights = open_gguf(gguf)
    assert {to_mistral(name) for name in weights.tensors} == set(parameters(args)) == set(held)
    for name, expected in held.items():
        stored, found = weights.tensors[name_of(name)], weights.get(name_of(name))
        assert stored.shape == found.shape == expected.shape
        assert stored.dtype == str(found.dtype).removeprefix("torch.")
        assert stored.dtype_name == (kind if len(expected.shape) > 1 else "F32")
        assert torch.equal(found.float(), torch.from_numpy(expected))
        if isinstance(reader := weights.readers[name_of(name)], BlockReader):
            assert torch.equal(reader.first(), found[0])
            assert len(reader.raw()) == stored.nbytes
        assert stored.nbytes == gguf.tensors[name_of(name)].nbytes
    seen: list[int] = []
    for name in weights.readers:
        weights.get(name, seen.append)
    assert sum(seen) == sum(stored.nbytes for stored in weights.tensors.values())


def test_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model(gguf_args(), seed=3)
    write_gguf(tmp_path / "m.gguf", state=model.state_dict())
    ids = torch.arange(23) % 61
    with torch.no_grad():
        assert torch.equal(model_of(tmp_path / "m.gguf")(ids, [11, 12]), model(ids, [11, 12]))


def test_headers_as_the_package_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    extra = {
        "tokenizer.ggml.tokens": ["<s>", "é", "▁the", ""],
        "tokenizer.ggml.scores": [0.5, -1.0, 2.0, 1e-3],
        "tokenizer.ggml.token_type": [3, 1, 1, -4],
        "a.bool": True,
        "a.text": "naïve\n",
        "a.flags": [True, False],
    }
    write_gguf(path, "Q8_0", extra=extra)
    theirs, ours = GGUFReader(path), read_gguf(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(ours.metadata)
    for key, value in ours.metadata.items():
        found = value.decode() if isinstance(value, StringArray) else value
        if isinstance(found, float):
            assert np.float32(found) == np.float32(fields[key])
        else:
            assert (list(found) if isinstance(fields[key], list) else found) == fields[key]
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.begin, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.kind.number == tensor.tensor_type


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    held = write_gguf(path, "Q4_0")
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    weights = open_gguf(read_gguf(path))
    assert all(torch.equal(weights.get(name_of(n)).float(), torch.from_numpy(w)) for n, w in held.items())
    small = build([("general.alignment", 4, struct.pack("<I", 4))], [tensor("x", [3], 0, 0)], align=4)
    assert read_gguf(save(tmp_path, small + b"\0" * 12)).tensors["x"].shape == (3,)


def test_tied_output(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = tiny_model(gguf_args(tied_embeddings=True), seed=4)
    write_gguf(path, args=model.args, state=model.state_dict(), without=(OUTPUT,))
    assert is_tied(open_gguf(read_gguf(path)))
    found, ids = model_of(path), torch.arange(9)
    assert found.args == model.args
    with torch.no_grad():
        assert torch.equal(found(ids, [9]), model(ids, [9]))
    write_gguf(path)
    assert not is_tied(open_gguf(read_gguf(path)))


def test_files_in_parts(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "m.gguf", "Q8_0", split=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-{i:05}-of-00004.gguf" for i in range(1, 5)]
    for given in (*parts, tmp_path):
        gguf = read_gguf(given)
        assert list(gguf.files) == parts
        args, _ = args_of(gguf.metadata)
        weights = open_gguf(gguf)
        assert all(torch.equal(weights.get(name_of(n)).float(), torch.from_numpy(w)) for n, w in held.items())
        assert len(weights.tensors) == len(parameters(args))
    parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(GgufError, match="1 of 4 parts are missing beside .*: m-00002-of-00004.gguf"):
        read_gguf(parts[0])
    with pytest.raises(GgufError, match="other.gguf is part 1 of 4 by its contents"):
        read_gguf(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(parts[2].read_bytes())
    (tmp_path / "other.gguf").rename(parts[1])
    with pytest.raises(GgufError, match="m-00002-of-00004.gguf is part 2 of 4"):
        read_gguf(parts[0])


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"holds no \.gguf file"):
        read_gguf(tmp_path)
    assert not is_gguf(tmp_path)
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    assert read_gguf(tmp_path).files == (tmp_path / "m.gguf",)
    write_gguf(tmp_path / "n.gguf")
    with pytest.raises(GgufError, match=r"several models \(m.gguf, n.gguf\): give one file"):
        read_gguf(tmp_path)
    with pytest.raises(GgufError, match="no-such.gguf cannot be read: No such file"):
        read_gguf(tmp_path / "no-such.gguf")


def test_floats_are_the_shortest_that_are_meant() -> None:
    assert _shortest(struct.unpack("<f", struct.pack("<f", 1e-5))[0]) == 1e-5
    bits = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    for number in bits.view(np.float32)[np.isfinite(bits.view(np.float32))]:
        assert _shortest(float(number)) == float(str(number))
    largest = float(np.finfo(np.float32).max)
    assert np.float32(_shortest(largest)) == np.float32(largest)


def test_without_torch() -> None:
    code = "import sys, mistral.formats.gguf_header\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- shapes


def keys(**changes: Any) -> dict[str, Any]:
    """Metadata of the small model, changed; None leaves a key out, `general_x` is `general.x`."""
    found: dict[str, Any] = {"general.architecture": "llama", **shape_keys(gguf_args())}
    for name, value in changes.items():
        name = name.replace("__", ".")
        found[name if name.startswith("general") else f"llama.{name}"] = value
    return {key: value for key, value in found.items() if value is not None}


REFUSED = {
    "architecture 'qwen2'": keys(general__architecture="qwen2"),
    "lacks general.architecture": keys(general__architecture=None),
    "a LoRA adapter, not a model": keys(general__type="adapter"),
    "the file has 0 of 8 experts for a token": keys(expert_count=8),
    "the file has 9 of 8 experts for a token": keys(expert_count=8, expert_used_count=9),
    "lacks llama.block_count, llama.embedding_length": keys(block_count=None, embedding_length=None),
    "n_layers is '2'; it must be a whole number": keys(block_count="2"),
    "n_kv_heads 3 does not divide n_heads 4": keys(attention__head_count_kv=3),
    "llama.attention.value_length is 32, but heads are 24 wide": keys(attention__value_length=32),
    "llama.rope.dimension_count is 16, but heads are 24 wide": keys(rope__dimension_count=16),
    "4 heads do not divide 62": keys(attention__key_length=None, embedding_length=62),
    "scaled rotary positions of the kind 'linear'": keys(rope__scaling__type="linear"),
    "scaled positions that cannot be": keys(rope__scaling__type="yarn"),
    "llama.attention.scale is 0.5": keys(attention__scale=0.5),
    "has 'llama.logit_scale', which is not known here": keys(logit_scale=16.0),
    "lacks llama.vocab_size, and has no tokenizer": keys(vocab_size=None),
    "norm_eps is inf": keys(attention__layer_norm_rms_epsilon=float("inf")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_of_another_kind(message: str) -> None:
    with pytest.raises(GgufError) as error:
        args_of(REFUSED[message])
    assert message in str(error.value)


def test_what_older_files_leave_out() -> None:
    sparse = keys(
        attention__key_length=None,
        attention__value_length=None,
        rope__freq_base=None,
        rope__dimension_count=None,
        attention__head_count_kv=None,
        tensor_data_layout="Meta AI original pth",
        rope__scaling__type="none",
    )
    args, _ = args_of(sparse)
    assert (args.head_dim, args.n_kv_heads, args.rope_theta) == (16, 4, 1e4)
    assert args.theta_rule == "absent from the file, which means llama.cpp's default"


V01 = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
V01 |= {"vocab_size": 32000, "rope_theta": 1e4, "sliding_window": None}
WINDOWS = [
    ({}, 4096, "sliding window 4096: that of 7B v0.1; the file does not give the sliding window"),
    ({"rope_theta": 1e6}, None, "sliding window none: that of 7B v0.2;"),
    ({"rope_theta": 1e6, "vocab_size": 32768}, None, "that of 7B v0.3;"),
    ({"vocab_size": 32002}, 4096, "4096: that of 7B v0.1, which this is but for its words;"),
    ({"rope_theta": 1e6, "vocab_size": 32002}, None, "none: that of 7B v0.2, which this is but for its words;"),
    ({"rope_theta": 1e6, "vocab_size": 32003}, 16384, "16384: that of MistralLite;"),
    ({"rope_theta": 5e5, "vocab_size": 128256}, None, "the shape is that of no release that is known here; give one"),
    ({"norm_eps": 1e-6}, None, "give one with --sliding_window"),
    (
        {"n_layers": 36, "hidden_dim": 12288, "vocab_size": 131072, "rope_theta": 1e8},
        (None, 32768, 32768, 32768),
        "none x9 + 32768 x27 layers: that of Ministral 8B 2410;",
    ),
]


@pytest.mark.parametrize(("changes", "window", "note"), WINDOWS)
def test_the_window_of_a_release(changes: dict[str, Any], window: Any, note: str, tmp_path: Path) -> None:
    given = tiny_args(**{**V01, **changes})
    metadata = {"general.architecture": "llama", **shape_keys(given)}
    args, notes = args_of(metadata)
    assert args.sliding_window == window
    assert note in notes[0]
    assert args.rope_theta == given.rope_theta


def test_a_window_that_is_given() -> None:
    metadata = {"general.architecture": "llama", **shape_keys(tiny_args(**V01))}
    assert args_of(metadata, None)[0].sliding_window is None
    args, notes = args_of(metadata, 128, max_batch_size=3)
    assert (args.sliding_window, args.max_batch_size) == (128, 3)
    assert notes == ["sliding window 128: as requested"]
    own = {**metadata, "llama.attention.sliding_window": 77}
    assert args_of(own)[0].sliding_window == 77
    assert args_of(own)[1] == ["sliding window 77: as the file gives it"]
    assert args_of(own, 128)[0].sliding_window == 128
    with pytest.raises(GgufError, match="sliding_window is 0"):
        args_of(metadata, 0)


def test_rotary_factors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for factor in (1.0, 2.0):
        state = {**tiny_model(gguf_args()).state_dict(), "rope_freqs.weight": torch.ones(12)}
        state["rope_freqs.weight"][5] = factor
        write_gguf(path, state=state)
        gguf = read_gguf(path)
        if factor == 1:
            assert ignored(gguf) == ["rope_freqs.weight ignored: factors of rotary frequencies, all 1"]
            assert to_mistral("rope_freqs.weight") is None
            open_gguf(gguf)
        else:
            with pytest.raises(WeightsError, match="scales the rotary frequencies"):
                open_gguf(gguf)


def test_a_type_that_is_not_read(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.IQ2_XXS
    raw = build([], [tensor("token_embd.weight", [256], int(kind), 0)]) + b"\0" * 66
    weights = open_gguf(read_gguf(save(tmp_path, raw)))
    with pytest.raises(WeightsError, match="is IQ2_XXS; weights are"):
        check_tensors(weights.tensors, {"token_embd.weight": (256,)}, "m.gguf", "the metadata")


# --- broken files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    sizes = b"".join(struct.pack("<Q", n) for n in dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def build(
    pairs: list[tuple[str, int, bytes]], tensors: list[bytes], version: int = 3, align: int = 32, **counts: int
) -> bytes:
    """A header by hand, filled up to where the tensors begin."""
    raw = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("n_tensors", len(tensors)), counts.get("n_keys", len(pairs))
    )
    raw += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs) + b"".join(tensors)
    return raw + b"\0" * (-len(raw) % align)


def save(folder: Path, raw: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return path


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


ARRAY = 9
BROKEN = {
    "it does not begin with GGUF": b"GGML" + b"\0" * 40,
    "Git LFS leaves in its place": b"version https://git-lfs.github.com/spec/v1\n",
    "it has 20 bytes, and its counts alone take 24": build([], [])[:20],
    "it has version 1, and 2 and 3 are read": build([], [], version=1),
    "it has version 4, ": build([], [], version=4),
    "its numbers are big-endian": build([], [], version=3 << 24),
    "18,446,744,073,709,551,615 tensors": build([], [], n_tensors=2**64 - 1),
    "9,223,372,036,854,775,808 keys": build([], [], n_keys=2**63),
    "key 0 would take 8 bytes": build([], [], n_keys=3)[:24],
    "the value of 'a' would take 4,611,686,018,427,387,904 bytes": build([("a", 8, u64(2**63))], []),
    "the value of 'a' would take 8,000,000,000,000 bytes": build([("a", ARRAY, struct.pack("<IQ", 8, 10**12))], []),
    "the value of 'b' would take": build([("b", ARRAY, struct.pack("<IQ", 8, 1) + u64(2**63))], []),
    "the value of 'c' would take 4,000,000 bytes": build([("c", ARRAY, struct.pack("<IQ", 4, 10**6))], []),
    "the value of 'd' is an array of type 9": build([("d", ARRAY, struct.pack("<IQ", 9, 1))], []),
    "the value of 'e' has type 13, which is none": build([("e", 13, b"")], []),
    "the value of 'f' is neither true nor false": build([("f", 7, b"\2")], []),
    "the value of 'g' is not UTF-8": build([("g", 8, u64(2) + b"\xff\xfe")], []),
    "key 1 is 'h' again": build([("h", 0, b"\1"), ("h", 0, b"\1")], []),
    "key 0 is '', empty": build([("", 0, b"\1")], []),
    "general.alignment is 0": build([("general.alignment", 4, struct.pack("<I", 0))], []),
    "general.alignment is 3": build([("general.alignment", 4, struct.pack("<I", 3))], []),
    "general.alignment is 'x'": build([("general.alignment", 8, text("x"))], []),
    "'t' has 5 dimensions; at most 4": build([], [tensor("t", [1] * 5, 0, 0)]),
    "has 4294967295 dimensions": build([], [text("t") + struct.pack("<I", 2**32 - 1)]),
    "the shape of tensor 't' is [0]": build([], [tensor("t", [0], 0, 0)]),
    "the shape of tensor 't' is [4294967296, 4294967296]": build([], [tensor("t", [2**32, 2**32], 0, 0)]),
    "'t' has type 99, which is none": build([], [tensor("t", [4], 99, 0)]),
    "'t' has type 4, Q4_2, which no program reads": build([], [tensor("t", [4], 4, 0)]),
    "'t' has rows of 33 weights, and Q4_0 comes in blocks of 32": build([], [tensor("t", [33], 2, 0)]),
    "'t' begins at byte 4, which is no multiple of 32": build([], [tensor("t", [4], 0, 4)]) + b"\0" * 99,
    "ends at byte": build([], [tensor("t", [100], 0, 0)]) + b"\0" * 399,
    "'u' begins inside the tensor before it": build([], [tensor("t", [9], 0, 0), tensor("u", [4], 0, 32)]) + b"\0" * 99,
    "it has 't' twice": build([], [tensor("t", [8], 0, 0), tensor("t", [8], 0, 32)]) + b"\0" * 64,
    "tensor '' would take 4 bytes from byte 32 of 32 that there are": build([], [], n_tensors=1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files(message: str, tmp_path: Path) -> None:
    path = save(tmp_path, BROKEN[message])
    tracemalloc.start()
    with pytest.raises(GgufError) as error:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value)
    assert_one_line(error.value)
    assert peak < 300_000


def assert_one_line(error: BaseException) -> None:
    line = str(error)
    assert line.isprintable()
    assert 10 < len(line) < 900


def test_a_header_may_not_be_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "LONGEST", 200)
    path = save(tmp_path, build([("a", 8, text("x" * 200))], []))
    with pytest.raises(GgufError, match="would take 200 bytes from byte 45 of 200 that are read"):
        read_gguf(path)


def mutated(rng: random.Random, good: bytes, header: int) -> bytes:
    """A file with its header broken in one to three places, or cut short."""
    raw = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header)
        match rng.randrange(6):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.randrange(256)
            case 2:
                raw[at : at + 8] = u64(rng.choice((0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, len(good))))
            case 3:
                raw[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2, 8, 9, 30, 12, 2**31, 2**32 - 1)))
            case 4:
                del raw[at : at + rng.randint(1, 40)]
            case 5:
                raw = raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.3 else raw
                header = max(1, min(header, len(raw)))
    return bytes(raw)


def use(path: Path) -> None:
    """All that a program does with a file."""
    gguf = read_gguf(path)
    args_of(gguf.metadata)
    for rebuild in (byte_level, sentencepiece_model):
        try:
            rebuild(gguf.metadata)
        except FormatError as error:
            assert_one_line(error)
    weights = open_gguf(gguf)
    for name in weights.readers:
        weights.get(name)


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_fuzz(tokenizer: str, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(8)] if tokenizer == "llama" else list("abcdefgh")
    extra = {
        "tokenizer.ggml.model": tokenizer,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *words, "ab"],
        "tokenizer.ggml.scores": [0.0] * 12,
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 9],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ x }}",
    }
    path = tmp_path / "m.gguf"
    write_gguf(path, "Q4_0", extra=extra)
    good = path.read_bytes()
    gguf = read_gguf(path)
    header = min(tensor.begin for tensor in gguf.tensors.values())
    use(path)
    rng = random.Random(tokenizer)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        raw = mutated(rng, good, header)
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            use(path)
            outcomes["read"] += 1
        except FormatError as error:
            assert_one_line(error)
            outcomes["refused"] += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(good) + 300_000
    assert min(outcomes.values()) > 20
