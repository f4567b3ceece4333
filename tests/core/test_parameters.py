"""The description of the weights, against real models: names, shapes, order, and what each role promises."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mistral.args import ModelArgs
from mistral.cache import NoCache
from mistral.formats.mistral import to_args
from mistral.linear import Linear
from mistral.model import RMSNorm, Transformer
from mistral.parameters import EMBEDDINGS, NORM, OUTPUT, parameters
from tests.support.tiny import POISON, TOLERANCE, distance, ragged, tiny_args, tiny_model, whole

SHAPES: dict[str, dict[str, Any]] = {
    "windowed": {},
    "full": {"sliding_window": None},
    "deep": {"n_layers": 12, "sliding_window": [None, 3]},
    "one head": {"n_heads": 1, "n_kv_heads": 1},
    "square": {"dim": 32, "hidden_dim": 32, "vocab_size": 32, "n_kv_heads": 4},
    "tied": {"tied_embeddings": True},
    "tied, square": {"dim": 32, "vocab_size": 32, "tied_embeddings": True},
}


@st.composite
def some_args(draw: st.DrawFn) -> ModelArgs:
    K = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    windows = st.one_of(st.none(), st.integers(1, 40))
    return ModelArgs(
        dim=draw(st.integers(1, 40)),
        n_layers=layers,
        head_dim=2 * draw(st.integers(1, 8)),
        hidden_dim=draw(st.integers(1, 40)),
        n_heads=K * draw(st.integers(1, 3)),
        n_kv_heads=K,
        norm_eps=draw(st.floats(1e-9, 1.0)),
        vocab_size=draw(st.integers(1, 90)),
        sliding_window=draw(st.one_of(windows, st.lists(windows, min_size=layers, max_size=layers).map(tuple))),
        rope_theta=draw(st.floats(1.0, 1e9)),
        tied_embeddings=draw(st.booleans()),
    )


def on_meta(args: ModelArgs) -> Transformer:
    with torch.device("meta"):
        return Transformer(args)


def assert_described(args: ModelArgs) -> None:
    model = on_meta(args)
    found = parameters(args)
    assert [(name, p.shape) for name, p in found.items()] == [(n, tuple(w.shape)) for n, w in model.named_parameters()]
    for name, parameter in found.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert parameter.name == name
        assert parameter.numel == model.get_parameter(name).numel()
        assert parameter.tied == (args.tied_embeddings and module is model.tok_embeddings)
        assert parameter.quantized == (isinstance(module, Linear) or parameter.tied)
        assert (parameter.role == "norm") == isinstance(module, RMSNorm)
        assert (parameter.role == "embedding") == (module is model.tok_embeddings)
        assert (parameter.role == "output") == (module is model.output)
        inside = name.split(".")[0] == "layers"
        assert parameter.layer == (int(name.split(".")[1]) if inside else None)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_names_shapes_and_order_are_the_models(changes: dict[str, Any]) -> None:
    assert_described(tiny_args(**changes))


@settings(max_examples=30)
@given(some_args())
def test_names_shapes_and_order_are_any_models(args: ModelArgs) -> None:
    assert_described(args)


def test_every_role() -> None:
    found = parameters(tiny_args())
    roles = {name.split(".", 2)[-1] if name.startswith("layers") else name: p for name, p in found.items()}
    said = {name: (p.role, p.heads, p.split) for name, p in roles.items()}
    assert said == {
        "tok_embeddings.weight": ("embedding", None, None),
        "attention.wq.weight": ("matrix", 4, "rows"),
        "attention.wk.weight": ("matrix", 2, "rows"),
        "attention.wv.weight": ("matrix", None, "rows"),
        "attention.wo.weight": ("matrix", None, "columns"),
        "feed_forward.w1.weight": ("matrix", None, "rows"),
        "feed_forward.w2.weight": ("matrix", None, "columns"),
        "feed_forward.w3.weight": ("matrix", None, "rows"),
        "attention_norm.weight": ("norm", None, None),
        "ffn_norm.weight": ("norm", None, None),
        "norm.weight": ("norm", None, None),
        "output.weight": ("output", None, "rows"),
    }
    assert {EMBEDDINGS, NORM, OUTPUT} < found.keys()
    assert OUTPUT not in parameters(tiny_args(tied_embeddings=True))


def test_the_description_is_the_callers() -> None:
    parameters(tiny_args()).clear()
    assert parameters(tiny_args())


def test_rows_with_heads_are_those_that_turn() -> None:
    """Whole pairs of rows may change places within a head where `heads` is told, in q and k alike; nowhere else."""
    args = tiny_args(n_layers=1)
    model = tiny_model(args)
    prompts = ragged([9], args.vocab_size)
    want = whole(model, prompts)

    def reversed_pairs(w: Tensor, heads: int) -> Tensor:
        return w.view(heads, -1, 2, w.shape[1]).flip(1).reshape(w.shape)

    state = {name: w.clone() for name, w in model.state_dict().items()}
    for name, parameter in parameters(args).items():
        if parameter.heads is not None:
            state[name] = reversed_pairs(state[name], parameter.heads)
    model.load_state_dict(state)
    model.rope.frequencies = model.rope.frequencies.flip(0)  # each pair turns as it did
    assert distance(whole(model, prompts), want) < TOLERANCE
    state["layers.0.attention.wv.weight"] = reversed_pairs(state["layers.0.attention.wv.weight"], args.n_kv_heads)
    model.load_state_dict(state)
    assert distance(whole(model, prompts), want) > 100 * TOLERANCE


def part_of(w: Tensor, split: str | None, device: int, devices: int) -> Tensor:
    return w if split is None else w.chunk(devices, dim=("rows", "columns").index(split))[device]


def test_a_split_covers_the_model() -> None:
    """Two devices, each with its part of every weight: partial sums of wo and w2, and logits side by side."""
    args = tiny_args(n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=40, vocab_size=62)
    model = tiny_model(args)
    local = dataclasses.replace(args, n_heads=4, n_kv_heads=1, hidden_dim=20)
    ids = ragged([11], args.vocab_size)[0]
    parts = []
    for device in range(2):
        part = on_meta(local)
        described, state = parameters(args), model.state_dict()
        pieces = {name: part_of(state[name], p.split, device, 2) for name, p in described.items()}
        output = pieces.pop(OUTPUT)
        part.load_state_dict(pieces | {OUTPUT: state[OUTPUT]}, assign=True)
        parts.append((part, output))
    assert all(sum(len(p[1]) for p in parts) == args.vocab_size for p in parts)
    keys = NoCache(args, "cpu")
    plan = keys.plan([len(ids)])
    cos, sin = model.rope.cos_sin(plan.positions)
    h = model.tok_embeddings(ids)
    for i, layer in enumerate(model.layers):
        blocks = [part.layers[i] for part, _ in parts]
        x = layer.attention_norm(h)
        h = h + sum(block.attention(x, cos, sin, plan, keys.layer(i)) for block in blocks)
        x = layer.ffn_norm(h)
        h = h + sum(block.feed_forward(x) for block in blocks)
    got = torch.cat([torch.nn.functional.linear(model.norm(h), output) for _, output in parts], dim=-1)
    assert distance([got], whole(model, [ids])) < TOLERANCE


# --- a tied output


def assert_tied(model: Transformer) -> None:
    assert model.output.weight is model.tok_embeddings.weight
    assert [name for name, _ in model.named_parameters()] == list(parameters(model.args))
    assert sum(w.numel() for w in model.parameters()) == sum(p.numel for p in parameters(model.args).values())


def test_a_tied_output_is_one_parameter_whatever_happens() -> None:
    args = tiny_args(tied_embeddings=True)
    model = Transformer(args)
    assert_tied(model)
    assert_tied(model.to(torch.bfloat16))
    assert_tied(copy.deepcopy(model))
    assert_tied(on_meta(args).to_empty(device="cpu"))
    state = {name: torch.full(p.shape, POISON) for name, p in parameters(args).items()}
    for assign in (False, True):
        model = on_meta(args) if assign else Transformer(args)
        model.load_state_dict(state, assign=assign)
        assert_tied(model)
        assert torch.equal(model.output.weight, state[EMBEDDINGS])
        model.load_state_dict(model.state_dict(), assign=assign)
        assert_tied(model)


def test_a_tied_output_must_be_the_embeddings() -> None:
    args = tiny_args(tied_embeddings=True)
    model = tiny_model(args)
    other = {**model.state_dict(), OUTPUT: torch.zeros(args.vocab_size, args.dim)}
    with pytest.raises(ValueError, match="tied"):
        model.load_state_dict(other)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: w for name, w in other.items() if name not in (EMBEDDINGS, OUTPUT)})


def test_a_tied_model_computes_what_an_equal_one_does() -> None:
    tied = tiny_model(tiny_args(tied_embeddings=True), scale=3.0)
    plain = tiny_model(tiny_args())
    plain.load_state_dict(tied.state_dict())
    prompts = ragged([12, 1, 7], plain.args.vocab_size)
    for got, want in zip(whole(tied, prompts), whole(plain, prompts), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(whole(tied, prompts)[0], whole(tiny_model(tiny_args()), prompts)[0])


# --- args out and in again


@settings(max_examples=60)
@given(some_args())
def test_params_read_back_to_equal_args(args: ModelArgs) -> None:
    params = json.loads(json.dumps(args.to_params()))
    assert to_args(params) == args
    assert to_args(params).to_params() == params
    assert math.isclose(params["rope_theta"], args.rope_theta, rel_tol=0)


@settings(max_examples=30)
@given(some_args())
def test_a_repr_fits_a_line_and_tells_shapes_apart(args: ModelArgs) -> None:
    if not isinstance(args.sliding_window, tuple):
        assert len(repr(args)) < 170
    for name in ("dim", "n_layers", "hidden_dim", "vocab_size"):
        other = dataclasses.replace(args, **{name: getattr(args, name) * (args.n_layers + 1)})
        assert repr(other) != repr(args)
    assert repr(dataclasses.replace(args, tied_embeddings=not args.tied_embeddings)) != repr(args)
