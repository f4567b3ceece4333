"""ModelArgs: what is refused, by which name; the theta rule; a window for each layer."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral.args import ArgsError, ModelArgs
from tests.support.tiny import tiny_args

COUNTS = ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size"]
SCALARS = ["norm_eps", "rope_theta"]
NOT_INTEGERS = [None, "8", 8.0, True, [8], (8,), {}, math.nan]
NOT_NUMBERS = ["1e4", True, False, [1.0], {}]
NOT_POSITIVE = [0, 0.0, -1, -1e-5, math.inf, -math.inf, math.nan]


def test_a_good_shape_passes_and_keeps_its_values():
    args = tiny_args(norm_eps=1, rope_theta=10000)
    assert (args.dim, args.n_heads, args.head_dim) == (24, 4, 8)
    assert args.norm_eps == 1
    assert args.rope_theta == 1e4
    assert isinstance(args.rope_theta, float)
    assert isinstance(args.norm_eps, float)  # a whole number beyond 64 bits is more than PyTorch takes
    assert args.max_batch_size == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.dim = 5
    assert issubclass(ArgsError, ValueError)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_counts_must_be_integers(name, value):
    with pytest.raises(ArgsError, match=rf"^{name} is .*; it must be a whole number"):
        tiny_args(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, -128])
def test_counts_must_be_at_least_one(name, value):
    with pytest.raises(ArgsError, match=rf"^{name} is {value}; it must be at least 1"):
        tiny_args(**{name: value})


@pytest.mark.parametrize("value", [*NOT_INTEGERS, -1], ids=repr)
def test_max_batch_size(value):
    assert tiny_args(max_batch_size=0).max_batch_size == 0
    assert tiny_args(max_batch_size=3).max_batch_size == 3
    with pytest.raises(ArgsError, match="^max_batch_size"):
        tiny_args(max_batch_size=value)


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_scalars_must_be_numbers(name, value):
    with pytest.raises(ArgsError, match=rf"^{name} must be a number"):
        tiny_args(**{name: value})


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=repr)
def test_scalars_must_be_positive_and_finite(name, value):
    with pytest.raises(ArgsError, match=rf"^{name} is .*above 0"):
        tiny_args(**{name: value})


def test_norm_eps_has_no_default():
    with pytest.raises(ArgsError, match="^norm_eps"):
        tiny_args(norm_eps=None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (2, 4), (7, 2), (32, 5)])
def test_kv_heads_must_divide_heads(heads, kv_heads):
    with pytest.raises(ArgsError, match=f"n_kv_heads {kv_heads} does not divide n_heads {heads}"):
        tiny_args(n_heads=heads, n_kv_heads=kv_heads)


@pytest.mark.parametrize("head_dim", [1, 3, 127])
def test_head_dim_must_be_even(head_dim):
    with pytest.raises(ArgsError, match=f"head_dim {head_dim} is odd"):
        tiny_args(head_dim=head_dim)


@pytest.mark.parametrize(
    "window",
    [0, -1, True, False, "4096", 4096.0, [0], [None, 0], [2, -1], [True], ["3", 3], [3.0, 3], [[3], 3], {}],
    ids=repr,
)
def test_windows_must_be_positive_integers_or_none(window):
    with pytest.raises(ArgsError, match="^sliding_window"):
        tiny_args(sliding_window=window)


@pytest.mark.parametrize(("window", "layers"), [([], 2), ((), 2), ([1, 2, 3], 2), ([1, 2], 3), ([None] * 5, 4)])
def test_listed_windows_must_repeat_evenly(window, layers):
    with pytest.raises(ArgsError, match=f"^sliding_window lists {len(window)} windows.*{layers} layers"):
        tiny_args(sliding_window=window, n_layers=layers)


@pytest.mark.parametrize(
    ("window", "layers", "want"),
    [
        (None, 3, (None, None, None)),
        (7, 3, (7, 7, 7)),
        ([7], 3, (7, 7, 7)),
        ([None, 3], 4, (None, 3, None, 3)),
        ((None, 32768, 32768, 32768), 8, (None, 32768, 32768, 32768) * 2),
        ([1, 2, 3], 3, (1, 2, 3)),
    ],
)
def test_a_window_for_each_layer(window, layers, want):
    args = tiny_args(sliding_window=window, n_layers=layers)
    assert args.windows == want
    assert len(args.windows) == layers
    assert hash(args) == hash(tiny_args(sliding_window=window, n_layers=layers))


def test_a_list_given_is_not_kept():
    window = [None, 3]
    args = tiny_args(sliding_window=window)
    window[0] = 1
    assert args.windows == (None, 3)
    assert args == tiny_args(sliding_window=(None, 3))


@pytest.mark.parametrize(
    ("window", "theta"), [(None, 1e6), (5, 1e4), (4096, 1e4), ([None, 3], 1e4), ([None], 1e6), ([None, None], 1e6)]
)
def test_theta_that_nobody_gave(window, theta):
    """Rule 4: 1e4 with a window (7B v0.1), else 1e6 (Mixtral 8x7B); which rule was used can be read back."""
    args = tiny_args(sliding_window=window, rope_theta=None)
    assert args.rope_theta == theta
    assert isinstance(args.rope_theta, float)
    assert "absent" in args.theta_rule
    assert ("no sliding window" in args.theta_rule) == (theta == 1e6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("theta", [1e4, 1e6, 1000000, 5e5])
def test_theta_that_was_given_wins(window, theta):
    args = tiny_args(sliding_window=window, rope_theta=theta)
    assert args.rope_theta == theta
    assert args.theta_rule == "given"


def test_a_rule_given_is_kept_and_does_not_tell_shapes_apart():
    args = tiny_args(rope_theta=1e4, theta_rule="rope_parameters")
    assert args.theta_rule == "rope_parameters"
    assert args == tiny_args(rope_theta=1e4)


@pytest.mark.parametrize("window", [None, 5, [None, 3]], ids=str)
def test_replacing_a_field_checks_again_and_keeps_the_rest(window):
    args = tiny_args(sliding_window=window, rope_theta=None)
    assert dataclasses.replace(args, max_batch_size=4).rope_theta == args.rope_theta
    assert ModelArgs(**dataclasses.asdict(args)) == args
    with pytest.raises(ArgsError, match="^dim"):
        dataclasses.replace(args, dim=0)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.none(), st.integers(-2, 9), st.floats()), max_size=4),
)


@given(st.dictionaries(st.sampled_from([*COUNTS, *SCALARS, "sliding_window", "max_batch_size"]), anything, max_size=3))
def test_anything_else_is_an_args_error_that_names_a_field(changes):
    refused = None
    try:
        args = tiny_args(**changes)
    except ArgsError as error:
        refused = str(error)
    if refused is not None:
        assert any(name in refused for name in changes)
        return
    assert all(type(getattr(args, name)) is int for name in COUNTS)
    assert args.n_heads % args.n_kv_heads == 0
    assert args.head_dim % 2 == 0
    assert all(math.isfinite(getattr(args, name)) and getattr(args, name) > 0 for name in SCALARS)
    assert len(args.windows) == args.n_layers
    assert all(w is None or (type(w) is int and w >= 1) for w in args.windows)


def test_whole_numbers_of_numpy_become_pythons_own() -> None:
    """So that a params.json can be written from them."""
    args = tiny_args(dim=np.int64(24), sliding_window=[np.int32(4), None])
    assert type(args.dim) is int
    assert json.loads(json.dumps(args.to_params()))["sliding_window"] == [4, None]
