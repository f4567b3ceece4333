"""one_file_ref.py against a naive computation written here (no cache, one query at a time, float64), and its command
line. The file is the specification for the library, so nothing of mistral/ is used. Letters as in the file: T, B, ...
"""

import ast
import cmath
import dataclasses
import json
import math
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

import one_file_ref
from mistral.formats.folder import read_folder
from mistral.formats.tokenizers import tokenizer_files
from one_file_ref import Cache, ModelArgs, RMSNorm, Transformer, generate, load, rope_angles, rotate, visible

FILE = Path(one_file_ref.__file__)
LENGTHS = [1, 9, 14, 4]
ORIGINAL_LENGTH = "original_max_position_embeddings"
WINDOWS = [1, 3, 100, None, [None, 3], [2, 5, None]]
SHAPE = {"dim": 20, "n_layers": 3, "head_dim": 6, "hidden_dim": 28, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}


def make_args(window=None, theta=100.0, vocab=40) -> ModelArgs:
    return ModelArgs(**SHAPE, vocab_size=vocab, sliding_window=window, rope_theta=theta)


def make_model(args: ModelArgs, dtype=torch.float64, hot=4.0) -> Transformer:
    """Random weights. hot queries make attention pick, so that a wrong mask or angle shows; norms are not all 1."""
    torch.manual_seed(0)
    model = Transformer(args).to(dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.copy_(torch.rand_like(p) + 0.5)
        if name.endswith("wq.weight"):
            p.mul_(hot)
    return model


def make_prompts(vocab=40, lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def packed(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([i for row in rows for i in row])


def naive(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Logits [n, V] of one sequence, float64: a token, a head and a query at a time."""
    a, w = model.args, {name: t.double() for name, t in model.state_dict().items()}
    windows = a.sliding_window if isinstance(a.sliding_window, list) else [a.sliding_window]
    D, n = a.head_dim, len(ids)

    def norm(x, weight):
        return x / math.sqrt(sum(float(e) ** 2 for e in x) / len(x) + a.norm_eps) * weight

    def turned(x, position):  # one head of one token
        out = []
        for i in range(D // 2):
            frequency = 1.0 / torch.tensor(a.rope_theta) ** torch.tensor(2 * i / D)  # fp32, like the angle
            angle = float(torch.tensor(float(position)) * frequency)
            z = complex(x[2 * i], x[2 * i + 1]) * cmath.exp(1j * angle)
            out += [z.real, z.imag]
        return torch.tensor(out, dtype=torch.float64)

    h = [w["tok_embeddings.weight"][i] for i in ids]
    for layer in range(a.n_layers):
        W, p = windows[layer % len(windows)], f"layers.{layer}."
        normed = [norm(x, w[p + "attention_norm.weight"]) for x in h]
        q, k, v = (
            [(w[f"{p}attention.w{c}.weight"] @ x).reshape(-1, D) for x in normed] for c in "qkv"
        )  # n times [H, D] or [K, D]
        for t in range(n):
            heads = []
            for head in range(a.n_heads):
                kv = head // (a.n_heads // a.n_kv_heads)
                seen = [s for s in range(n) if s <= t and (W is None or t - s < W)]
                scores = [float(turned(q[t][head], t) @ turned(k[s][kv], s)) / math.sqrt(D) for s in seen]
                weights = [math.exp(score - max(scores)) for score in scores]
                heads.append(sum(e * v[s][kv] for e, s in zip(weights, seen, strict=True)) / sum(weights))
            h[t] = h[t] + w[p + "attention.wo.weight"] @ torch.cat(heads)
        for t in range(n):
            x = norm(h[t], w[p + "ffn_norm.weight"])
            gate = w[p + "feed_forward.w1.weight"] @ x
            up = w[p + "feed_forward.w3.weight"] @ x
            h[t] = h[t] + w[p + "feed_forward.w2.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    return torch.stack([w["output.weight"] @ norm(x, w["norm.weight"]) for x in h])


def close(a: list[list[float]], b: list[list[float]], tolerance: float) -> None:
    assert [len(row) for row in a] == [len(row) for row in b]
    assert sum(len(row) for row in a) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=0, atol=tolerance)


# Numbers


@pytest.mark.parametrize("window", WINDOWS)
def test_forward_is_the_naive_computation(window):
    model, prompts = make_model(make_args(window)), make_prompts()
    logits = model(packed(prompts), LENGTHS)
    assert logits.shape == (sum(LENGTHS), 40)
    assert logits.dtype == torch.float64
    # The angles are fp32, and cosines of fp32 numbers differ in their last bit from one routine to another.
    torch.testing.assert_close(logits, torch.cat([naive(model, ids) for ids in prompts]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 50])
def test_generate_is_the_naive_computation(window, chunk):
    model, prompts = make_model(make_args(window)), make_prompts(lengths=[1, 6, 4])
    ids, logprobs = generate(prompts, model, 5, None, chunk)
    assert [len(row) for row in ids] == [5, 5, 5]
    for prompt, new, scores in zip(prompts, ids, logprobs, strict=True):
        logits = naive(model, prompt + new)
        assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        expected = logits.log_softmax(-1)[range(len(prompt) + 4), (prompt + new)[1:]]
        close([scores], [expected.tolist()], 2e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_chunked_is_whole_is_token_by_token(window):
    model, prompts = make_model(make_args(window), torch.float32, hot=1.0), make_prompts()
    ids, whole = generate(prompts, model, 6, None)
    for chunk in (1, 2, 3, 4, 7, 13, 100):
        other_ids, chunked = generate(prompts, model, 6, None, chunk)
        assert ids == other_ids
        close(chunked, whole, 1e-5)
    alone = [generate([prompt], model, 6, None)[1][0] for prompt in prompts]
    close(alone, whole, 1e-5)
    logits = model(packed(prompts), LENGTHS).split(LENGTHS)  # no cache
    scored = [rows.log_softmax(-1)[range(len(p) - 1), p[1:]].tolist() for rows, p in zip(logits, prompts, strict=True)]
    close(scored, [row[: n - 1] for row, n in zip(whole, LENGTHS, strict=True)], 1e-5)


def test_rows_may_bring_any_number_of_tokens_to_a_step():
    model, prompts = make_model(make_args([3, None])), make_prompts()
    cache, left, rows = Cache(model.args, 4, 14, dtype=torch.float64), [list(p) for p in prompts], [[], [], [], []]
    for take in ([0, 4, 1, 0], [1, 0, 9, 2], [0, 5, 0, 1], [0, 0, 4, 1]):
        tokens = [ids[:n] for ids, n in zip(left, take, strict=True)]
        left = [ids[n:] for ids, n in zip(left, take, strict=True)]
        for row, logits in zip(rows, model(packed(tokens), take, cache).split(take), strict=True):
            row.append(logits)
    assert left == [[], [], [], []]
    assert cache.lengths == LENGTHS
    whole = model(packed(prompts), LENGTHS)
    torch.testing.assert_close(torch.cat([logits for row in rows for logits in row]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [2, 5])
def test_reach_is_exactly_layers_times_window_minus_one(window):
    model, ids = make_model(make_args(window)), torch.tensor(make_prompts(lengths=[20])[0])
    changed = ids.clone()
    changed[0] = (changed[0] + 1) % 40
    same = (model(ids, [20]) == model(changed, [20])).all(-1)
    reach = 3 * (window - 1)
    assert same.tolist() == [False] * (reach + 1) + [True] * (19 - reach)


def test_mask_rows_see_w_keys():
    positions = torch.arange(7)
    assert visible(positions, positions, 3).sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3]
    assert visible(positions, positions, None).sum(-1).tolist() == [1, 2, 3, 4, 5, 6, 7]
    slots = torch.tensor([6, 3, -1, 4, 5, 2])
    assert visible(torch.tensor([5]), slots, 3).tolist() == [[False, True, False, True, True, False]]


def test_angles_and_rotation_are_the_originals():
    positions = torch.tensor([0, 1, 4095, 130_000, 2_000_000])
    cos, sin, growth = rope_angles(positions, dataclasses.replace(make_args(), head_dim=128, rope_theta=1e6))
    assert torch.equal(growth, torch.ones(5, 1))
    frequencies = 1.0 / 1e6 ** (torch.arange(0, 128, 2).float() / 128)
    polar = torch.polar(torch.ones(5, 64), torch.outer(positions.float(), frequencies))
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, polar.real, rtol=0, atol=2e-7)
    torch.testing.assert_close(sin, polar.imag, rtol=0, atol=2e-7)
    x = torch.randn(5, 3, 128, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_real(torch.view_as_complex(x.view(5, 3, 64, 2)) * polar[:, None]).flatten(2)
    torch.testing.assert_close(rotate(x, cos, sin), turned, rtol=0, atol=2e-6)
    half = rotate(x.bfloat16(), cos, sin)
    assert torch.equal(half, rotate(x.bfloat16().float(), cos, sin).bfloat16())  # turned in fp32, rounded once


def test_half_precision_rounds_where_the_contract_says():
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(20, 1e-5).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    f = x.float()
    expected = (f * torch.rsqrt((f**2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    assert torch.equal(norm(x), expected)
    prompts = make_prompts()
    for dtype in (torch.bfloat16, torch.float16):
        logits = make_model(make_args(3), dtype)(packed(prompts), LENGTHS)
        assert logits.dtype == torch.float32  # widened, after a product in half precision
        assert torch.equal(logits, logits.to(dtype).float())


def test_gradients_reach_every_weight():
    model = make_model(make_args(3)).requires_grad_(True)
    model(torch.arange(9), [4, 5]).logsumexp(-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# The rest of the family

YARN = {"factor": 16, ORIGINAL_LENGTH: 16384, "beta": 32, "alpha": 1, "apply_scale": False}  # Ministral 3's


def test_stretched_frequencies_are_the_published_ones():
    """Values that transformers 5 has for Ministral 3 and Medium 3.5, which equal the formula in float64."""
    args = ModelArgs(**{**SHAPE, "head_dim": 128}, vocab_size=9, rope_theta=1e6, yarn=YARN)
    found, factor = one_file_ref.frequencies(args)
    golden = {0: 1, 1: 0.8058422, 20: 0.01333521, 21: 0.010153464, 28: 0.00132517959}
    golden |= {36: 4.961135e-5, 37: 2.1238802e-5, 63: 7.755861e-8}
    assert factor == 1.0
    assert [float(found[i]) for i in golden] == pytest.approx(list(golden.values()), rel=5e-7)
    medium = dataclasses.replace(args, yarn={"factor": 64, ORIGINAL_LENGTH: 4096, "beta": 4, "apply_scale": True})
    assert one_file_ref.frequencies(medium)[1] == pytest.approx(1.4158883)


def test_queries_grow_in_steps():
    args = dataclasses.replace(make_args(), llama_4_scaling={ORIGINAL_LENGTH: 16384, "beta": 0.1})
    *_, growth = rope_angles(torch.tensor([0, 16383, 16384, 32768, 262143]), args)
    assert growth[:, 0].tolist() == pytest.approx([1, 1, 1.0693147, 1.1098612, 1.2772589])


def test_a_tied_output_is_the_embeddings(folder):
    tensors = {name: tensor for name, tensor in weights().items() if name != "output.weight"}
    save_file(tensors, folder / "consolidated.safetensors")
    set_params(folder, tied_embeddings=True)
    model = load(folder, dtype=torch.bfloat16)
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    assert torch.equal(model.output.weight, tensors["tok_embeddings.weight"])
    images = {"vision_encoder.x.weight": torch.ones(2), "patch_merger.merging_layer.weight": torch.ones(2)}
    save_file(weights() | images, folder / "consolidated.safetensors")  # an output of its own is what was meant
    own = load(folder, dtype=torch.bfloat16).output.weight
    assert torch.equal(own, weights()["output.weight"])


# The cache


@pytest.mark.parametrize("window", [1, 3, None, [None, 3]])
def test_empty_slots_weigh_nothing(window):
    model, prompts = make_model(make_args(window), torch.float32), make_prompts()
    plain, poisoned = (Cache(model.args, 4, 40) for _ in range(2))
    for buffer in poisoned.k + poisoned.v:
        assert not buffer.any()  # zeroed, not empty
        buffer.fill_(1e4)
    for take in ([1, 1, 2, 0], [0, 8, 1, 1], [0, 0, 11, 3]):
        ids = packed([p[s : s + n] for p, s, n in zip(prompts, plain.lengths, take, strict=True)])
        assert torch.equal(model(ids, take, plain), model(ids, take, poisoned))


def test_position_i_lives_in_slot_i_modulo_slots():
    model = make_model(make_args([5, None, 100]))
    cache = Cache(model.args, 2, 16, dtype=torch.float64)
    assert [buffer.shape for buffer in cache.k] == [(2, 5, 2, 6), (2, 16, 2, 6), (2, 16, 2, 6)]
    model(torch.arange(3, 15), [9, 3], cache)
    assert cache.positions[0].tolist() == [[5, 6, 7, 8, 4], [0, 1, 2, -1, -1]]
    assert cache.positions[1].tolist() == [[*range(9), *[-1] * 7], [0, 1, 2, *[-1] * 13]]
    before = [buffer.clone() for buffer in cache.k]
    with pytest.raises(ValueError, match="17 positions do not fit a cache made for 16"):
        model(torch.arange(8), [8, 0], cache)
    assert cache.lengths == [9, 3]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.k, strict=True))


def test_chunks_bound_the_masks(monkeypatch):
    shapes = []

    def spy(q_pos, k_pos, window):
        shapes.append((len(q_pos), len(k_pos)))
        return visible(q_pos, k_pos, window)

    monkeypatch.setattr(one_file_ref, "visible", spy)
    generate(make_prompts(lengths=[90, 2]), make_model(make_args(4)), 1, None, chunk_size=8)
    assert max(n for n, _ in shapes) == 8
    assert max(keys for _, keys in shapes) == 4 + 8


# Generation


def test_eos_ends_its_row_only():
    model, prompts = make_model(make_args(3)), make_prompts()
    for eos in generate(prompts, model, 8, None)[0][1]:
        prompts[2][3] = eos  # in a prompt it stops nothing
        free_ids, free_logprobs = generate(prompts, model, 8, None)
        cut = [row.index(eos) if eos in row else 8 for row in free_ids]
        if 0 < min(cut) < max(cut) == 8:
            break
    assert 0 < min(cut) < max(cut) == 8
    stopped_ids, stopped = generate(prompts, model, 8, eos)
    assert stopped_ids == [row[:n] for row, n in zip(free_ids, cut, strict=True)]
    close(stopped, [row[: len(p) - 1 + n] for p, row, n in zip(prompts, free_logprobs, cut, strict=True)], 1e-12)


def test_no_new_tokens_scores_the_prompt():
    model, prompts = make_model(make_args(3)), make_prompts()
    ids, logprobs = generate(prompts, model, 0, None, 4)
    assert ids == [[], [], [], []]
    close(logprobs, [row[: n - 1] for row, n in zip(generate(prompts, model, 2, None)[1], LENGTHS, strict=True)], 1e-12)


def test_ties_go_to_the_lowest_id():
    model = make_model(make_args(3))
    model.output.weight[:] = model.output.weight[5]
    assert generate([[4, 5], [6]], model, 3, None)[0] == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([[1], []], (1, 2)),
        ([[1, 40]], (1, 2)),
        ([[-1]], (1, 2)),
        ([], (1, 2)),
        ([[1]], (-1, 2)),
        ([[1]], (1, 2, 0)),
    ],
)
def test_generate_refuses(prompts, options):
    with pytest.raises(ValueError):
        generate(prompts, make_model(make_args(3)), *options)


@pytest.mark.parametrize("seqlens", [[3, 1], [6, -1], [4], []])
def test_forward_refuses_lengths_that_do_not_fit(seqlens):
    with pytest.raises(ValueError, match="do not fit"):
        make_model(make_args(3))(torch.arange(5), seqlens)


# Folders

PIECES = 300


@pytest.fixture(scope="module")
def sp(tmp_path_factory) -> Path:
    """A tiny SentencePiece model in the style of Mistral's first: byte fallback, bos 1, eos 2."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    lines = [f"this is another line {i}, about kings, queens, woods and very good tests" for i in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture
def folder(tmp_path, sp) -> Path:
    """A tiny model as v0.1 is written: a window, no rope_theta, bf16 weights."""
    (folder := tmp_path / "model").mkdir()
    (folder / "params.json").write_text(json.dumps({**SHAPE, "vocab_size": PIECES, "sliding_window": 6}))
    save_file(weights(), folder / "consolidated.safetensors")
    shutil.copy(sp, folder / "tokenizer.model")
    return folder


def weights() -> dict[str, torch.Tensor]:
    return make_model(make_args(6, 1e4, PIECES), torch.bfloat16, hot=1.0).state_dict()


def set_params(folder: Path, **changes) -> None:
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v != "drop"}))


def test_names_are_those_of_the_checkpoints():
    layer = ["attention_norm", "ffn_norm", *(f"attention.w{c}" for c in "qkvo"), *(f"feed_forward.w{i}" for i in "123")]
    names = [f"layers.{i}.{name}.weight" for i in range(3) for name in layer]
    assert sorted(weights()) == sorted([*names, "tok_embeddings.weight", "norm.weight", "output.weight"])


def test_all_weight_files_load_alike(folder):
    expected = weights()
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder, "cpu", torch.float64).parameters()} == {torch.float64}
    (folder / "consolidated.safetensors").unlink()
    names = sorted(expected)

    def check():
        state = load(folder, dtype=torch.bfloat16).state_dict()
        assert sorted(state) == names
        assert all(torch.equal(state[name], expected[name]) for name in names)

    for i in range(3):
        save_file(
            {name: expected[name] for name in names[i::3]}, folder / f"consolidated-0000{i + 1}-of-00003.safetensors"
        )
    check()
    for path in folder.glob("consolidated*"):
        path.unlink()
    torch.save(expected, folder / "consolidated.00.pth")
    check()
    ids = torch.arange(3, 20)
    model = load(folder, dtype=torch.float64)
    torch.testing.assert_close(model(ids, [17]), naive(model, ids.tolist()), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "theta", "windows"),
    [
        ({"sliding_window": 6}, 1e4, [6, 6, 6]),
        ({"sliding_window": "drop"}, 1e6, [None, None, None]),
        ({"sliding_window": None}, 1e6, [None, None, None]),
        ({"sliding_window": [None, None]}, 1e6, [None, None, None]),
        ({"sliding_window": [None, 3]}, 1e4, [None, 3, None]),
        ({"sliding_window": "drop", "_sliding_window": [4, None]}, 1e4, [4, None, 4]),
        ({"sliding_window": "6"}, 1e4, [6, 6, 6]),
        ({"rope_theta": 77.0}, 77.0, [6, 6, 6]),
        ({"rope_theta": None, "max_seq_len": 32768}, 1e4, [6, 6, 6]),
    ],
)
def test_theta_and_window_rules(folder, changes, theta, windows):
    set_params(folder, **changes)
    args = load(folder).args
    assert args.rope_theta == theta
    assert args.windows == windows
    assert (args.theta_rule == "given") == (theta == 77.0)


@pytest.mark.parametrize(
    "changes",
    [
        *({"sliding_window": text} for text in ("6", " 6 ", "null", "None", "")),
        *({"sliding_window": 6, "_sliding_window": 6}, {"sliding_window": None, "_sliding_window": 3}),
        *({key: None} for key in ("moe", "yarn", "vision_encoder", "quantization", "rope_theta", "sliding_window")),
        *({key: False} for key in ("tied_embeddings", "use_biases", "attn_bias", "qk_norm")),
        {"causal": True, "activation": "silu", "model_type": "transformer", "dtype": "bfloat16"},
        {"lora": {"enable": True, "rank": 16, "dropout": 0.0, "scaling": 2.0}, "moe": None},
        {"kv_lora_rank": -1, "qk_nope_head_dim": -1, "tied_embeddings": None},
        {"vision_encoder": {"hidden_size": 1024}, "multimodal": None},
        {"yarn": {"factor": 16, ORIGINAL_LENGTH: 16384, "beta": 32, "alpha": 1, "apply_scale": False}},
        {"yarn": {"factor": 64.0, ORIGINAL_LENGTH: 4096, "beta": 4, "apply_scale": None}},
        {"yarn": {"factor": 2, ORIGINAL_LENGTH: 9, "attention_factor": 1.5}, "llama_4_scaling": None},
        {"llama_4_scaling": {ORIGINAL_LENGTH: 16384, "beta": 0.1}},
    ],
    ids=str,
)
def test_it_accepts_what_the_library_accepts(folder, changes):
    set_params(folder, **changes)
    ours = one_file_ref.ModelArgs.from_folder(folder)
    if changes.get("sliding_window", 0) is not None or "_sliding_window" not in changes:  # the library says they differ
        theirs = read_folder(folder).args
        assert (ours.windows, ours.rope_theta) == (list(theirs.windows), theirs.rope_theta)
        known = theirs.to_params()
        assert bool(ours.tied_embeddings) == theirs.tied_embeddings
        for name in ("yarn", "llama_4_scaling"):
            assert (getattr(ours, name) is None) == (name not in known)
    path = folder / "params.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors write UTF-8
    assert one_file_ref.ModelArgs.from_folder(folder) == ours


@pytest.mark.parametrize(("key", "value"), [("use_biases", True), ("causal", False), ("activation", "gelu")])
def test_it_refuses_what_is_another_model(folder, key, value):
    set_params(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"unknown keys: \['{key}'\]"):
        one_file_ref.ModelArgs.from_folder(folder)


# The command line


def cli(capsys, monkeypatch, *options: object, file: Path = FILE) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m one_file_ref`, in this process: starting torch takes seconds."""
    monkeypatch.setattr(sys, "argv", ["one_file_ref.py", *map(str, options)])
    try:
        runpy.run_path(str(file), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def expected_output(folder: Path, sp: Path, prompts: list[str], max_tokens: int) -> str:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(sp))
    model, text = load(folder), ""
    for prompt in prompts:
        ids = [1, *tokenizer.encode(prompt)]
        for _ in range(max_tokens):
            token = int(model(torch.tensor(ids), [len(ids)])[-1].argmax())
            if token == 2:
                break
            ids.append(token)
        text += f"{tokenizer.decode(ids)}\n=====================\n"
        assert text.count(prompt) == 1
    return text


ORIGINAL = ["This is a test", "This is another test", "This is a third test, mistral AI is very good at testing. "]


@pytest.mark.long
def test_command_in_a_process_of_its_own(folder, sp):
    command = [sys.executable, "-m", "one_file_ref", str(folder)]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=FILE.parent, env=env, capture_output=True, timeout=120)
    assert run.stdout.decode() == expected_output(folder, sp, ORIGINAL, 35)
    assert run.returncode == 0
    assert len(run.stderr.decode().splitlines()) == 1
    bad = subprocess.run([*command, "--dtype", "int3"], cwd=FILE.parent, env=env, capture_output=True, timeout=120)
    assert (bad.returncode, bad.stdout) == (2, b"")
    assert bad.stderr.startswith(b"error: ")
    assert bad.stderr.count(b"\n") == 1


def test_command_says_what_it_loaded(folder, sp, capsys, monkeypatch):
    code, out, err = cli(capsys, monkeypatch, folder, "--max_tokens", 7, "--chunk_size", 3, "--dtype", "float64")
    assert code == 0
    assert out == expected_output(folder, sp, ORIGINAL, 7)
    assert err.count("\n") == 1
    rule = "chosen: no rope_theta and a sliding window declared"
    for part in (str(folder), "consolidated.safetensors", "cpu", "float64", "window 6", f"rope_theta 10000 ({rule})"):
        assert part in err


def test_nothing_is_printed_from_eos_on(folder, sp, capsys, monkeypatch):
    tensors = weights()
    tensors["output.weight"] *= 0
    tensors["output.weight"][2] = 1  # eos: the hidden state is all ones, and stays so
    tensors["norm.weight"].fill_(1)
    tensors["tok_embeddings.weight"].fill_(1)
    for name, tensor in tensors.items():
        if "attention.wo" in name or "w2" in name:
            tensor.zero_()
    save_file(tensors, folder / "consolidated.safetensors")
    code, out, _ = cli(capsys, monkeypatch, folder)
    assert code == 0
    assert out == "".join(f"{prompt}\n=====================\n" for prompt in ORIGINAL)


def test_without_a_folder_the_bundled_model_next_to_the_file(folder, sp, tmp_path, capsys, monkeypatch):
    prompts = json.loads((FILE.parent / "mistral" / "bundled" / "prompts.json").read_text(encoding="utf-8"))
    assert len(prompts) == 3
    shutil.copy(FILE, tmp_path / "one_file_ref.py")
    shutil.copytree(folder, bundled := tmp_path / "mistral" / "bundled")
    (bundled / "prompts.json").write_text(json.dumps(prompts))
    code, out, err = cli(capsys, monkeypatch, "--max_tokens", 3, file=tmp_path / "one_file_ref.py")
    assert code == 0
    assert out == expected_output(folder, sp, prompts, 3)
    assert err.count("\n") == 1
    assert "bundled" in err


def test_texts_begin_with_bos(folder, sp):
    encode, decode, n_words, eos = one_file_ref.load_tokenizer(folder)
    ids = encode(ORIGINAL[2])
    assert ids == [1, *sentencepiece.SentencePieceProcessor(model_file=str(sp)).encode(ORIGINAL[2])]
    assert (decode(ids), n_words, eos) == (ORIGINAL[2], PIECES, 2)


def test_tekken_tokenizers_are_read(folder):
    installed = Path(pytest.importorskip("mistral_common").__file__).parent
    tekken = json.loads((installed / "data" / "tekken_240718.json").read_text(encoding="utf-8"))
    tekken["vocab"] = tekken["vocab"][:1000]  # all of it takes seconds
    tekken["config"]["default_vocab_size"] = 2000
    (folder / "tekken.json").write_text(json.dumps(tekken))  # beside tokenizer.model: the later kind is taken
    encode, decode, n_words, eos = one_file_ref.load_tokenizer(folder)
    ids = encode("This is a test")
    assert ids[0] == 1
    assert len(ids) > 2
    assert (decode(ids), n_words, eos) == ("This is a test", 2000, 2)


def test_a_backup_is_no_tokenizer(folder, sp):
    """Known names only, the newest kind first, as the library has them."""
    for name in ("tokenizer.model.bak", "tokenizer.model.v3.old", "tekken_old.json", "tokenizer.model.sha256"):
        (folder / name).write_bytes(b"nothing")
    assert one_file_ref.load_tokenizer(folder)[2] == PIECES
    assert [p.name for p in tokenizer_files(folder)] == ["tokenizer.model"]
    for name in ("tokenizer.model.v3", "tokenizer.model.v1", "tokenizer.model.v7", "tokenizer.model.v7m1"):
        shutil.copy(sp, folder / name)
    known = [name for name in one_file_ref.TOKENIZERS if (folder / name).is_file()]
    assert known == [p.name for p in tokenizer_files(folder)]
    (folder / known[0]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tokenizer\.model\.v7m1 cannot be read"):
        one_file_ref.load_tokenizer(folder)


class Mischief:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in weights().items() if key != name}


def save_pth(folder: Path, content: object) -> None:
    (folder / "consolidated.safetensors").unlink()
    torch.save(content, folder / "consolidated.00.pth")


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "consolidated.safetensors")


BREAK = {
    "no folder is at": lambda f: shutil.rmtree(f),
    "no folder is at /": lambda f: (shutil.rmtree(f), f.touch()),  # as a .gguf file is
    "no params.json": lambda f: (f / "params.json").unlink(),
    "params.json: no JSON object, or not all of it: fetch it again": lambda f: (f / "params.json").write_text("{"),
    "params.json: no JSON object": lambda f: (f / "params.json").write_text("[1]"),
    "no JSON object, or not all of it": lambda f: (f / "params.json").write_bytes(b"\xff\xfe{}"),
    "'abc'": lambda f: set_params(f, sliding_window="abc"),
    "a mixture of experts (Mixtral) is more than this file has": lambda f: set_params(f, moe={"num_experts": 8}),
    "unknown keys: ['quantization', 'rope_scaling']": lambda f: set_params(f, quantization={}, rope_scaling={}),
    "{} must have factor and original_max_position_embeddings": lambda f: set_params(f, yarn={}),
    "must have beta and original_max_position_embeddings": lambda f: set_params(f, llama_4_scaling={"beta": 0.1}),
    "'mscale'": lambda f: set_params(f, yarn={"factor": 2, "original_max_position_embeddings": 9, "mscale": 1}),
    "all above 0": lambda f: set_params(f, yarn={"factor": 0, "original_max_position_embeddings": 9}),
    "params.json: '>' not supported": lambda f: set_params(f, llama_4_scaling={ORIGINAL_LENGTH: 9, "beta": "x"}),
    "missing keys: ['dim', 'norm_eps']": lambda f: set_params(f, dim="drop", norm_eps="drop"),
    "unknown keys: ['_sliding_window']": lambda f: set_params(f, _sliding_window=3),
    "n_layers must be a positive integer, not '3'": lambda f: set_params(f, n_layers="3"),
    "sliding_window must be a positive integer, not 0": lambda f: set_params(f, sliding_window=[None, 0]),
    "sliding_window must be a positive integer, not True": lambda f: set_params(f, sliding_window=True),
    "empty list": lambda f: set_params(f, sliding_window=[]),
    "rope_theta must be a positive number, not -1.0": lambda f: set_params(f, rope_theta=-1.0),
    "norm_eps must be a positive number, not 'x'": lambda f: set_params(f, norm_eps="x"),
    "n_heads no multiple": lambda f: set_params(f, n_kv_heads=3),
    "head_dim odd": lambda f: set_params(f, head_dim=5),
    "layers.1.feed_forward.w2.weight is torch.bfloat16 [20, 28], params.json says [20, 14]": lambda f: set_params(
        f, hidden_dim=14
    ),
    "layers.2.attention.wk.weight is unknown": lambda f: set_params(f, n_layers=2),
    "layers.3.attention.wk.weight is missing": lambda f: set_params(f, n_layers=4),
    "lora_A is unknown": lambda f: save_weights(f, weights() | {"lora_A": torch.zeros(2)}),
    "output.weight is missing": lambda f: save_weights(f, without("output.weight")),
    "norm.weight is torch.int8": lambda f: save_weights(
        f, weights() | {"norm.weight": torch.ones(20, dtype=torch.int8)}
    ),
    "norm.weight is there twice": lambda f: save_file(
        {"norm.weight": torch.ones(20)}, f / "consolidated-00001-of-00001.safetensors"
    ),
    "safetensors was not loaded": lambda f: (f / "consolidated.safetensors").write_bytes(b"nothing"),
    "no consolidated*.safetensors or": lambda f: (f / "consolidated.safetensors").unlink(),
    "holds more than tensors": lambda f: save_pth(f, weights() | {"x": Mischief(f / "harm")}),
    "pth was not loaded": lambda f: save_pth(f, [torch.ones(3)]),
    "model is unknown": lambda f: save_pth(f, {"model": weights()}),
    "norm.weight is unknown": lambda f: save_pth(f, weights() | {"norm.weight": "text"}),
    "no tokenizer.model or": lambda f: (f / "tokenizer.model").unlink(),
    "tokenizer.model cannot be read": lambda f: (f / "tokenizer.model").write_bytes(b"nothing"),
}


@pytest.mark.parametrize("message", BREAK)
def test_a_broken_folder_is_one_line_and_exit_code_2(message, folder, capsys, monkeypatch):
    BREAK[message](folder)
    code, out, err = cli(capsys, monkeypatch, folder)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "harm").exists()


def test_an_old_pickle_is_refused_before_it_runs(folder, capsys, monkeypatch):
    (folder / "consolidated.safetensors").unlink()
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Mischief(folder / "harm")))
    code, out, err = cli(capsys, monkeypatch, folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (folder / "harm").exists()


@pytest.mark.parametrize(
    "option", ["--oops", "--max_token=3", "--max_tokens=x", "--max_tokens=-1", "--chunk_size=0", "--device=tpu", "more"]
)
def test_wrong_options_are_one_line_and_exit_code_2(option, folder, capsys, monkeypatch):
    code, out, err = cli(capsys, monkeypatch, folder, option)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert err.count("error:") == 1
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(folder, capsys, monkeypatch):
    code, out, err = cli(capsys, monkeypatch, folder, "--device", "cuda")
    assert (code, out, err.count("\n")) == (2, "", 1)


# The file itself


def test_the_file_stands_alone_and_is_short():
    source = FILE.read_text(encoding="utf-8")
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add((node.module or "").partition(".")[0])
    assert modules - sys.stdlib_module_names == {"torch", "safetensors", "sentencepiece", "mistral_common"}
    assert len(source.splitlines()) <= 400
