"""Angles bit for bit as the released models have them, and a rotation that is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.args import ModelArgs
from mistral.rope import Rope, inverse_frequencies, rotate

SHAPES = [(128, 1e4), (128, 1e6), (64, 1e4), (8, 1e4), (2, 5e5)]
FAR = [130_000, 131_071, 131_072, 200_003, 1_000_003, 2**24 - 1]


def rope(head_dim: int, theta: float) -> Rope:
    return Rope(ModelArgs(8, 1, head_dim, 8, 1, 1, 1e-5, 8, rope_theta=theta))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 4 - 2).to(dtype)


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
def test_frequencies_are_the_contracts_bit_for_bit(head_dim, theta):
    got = inverse_frequencies(head_dim, theta)
    assert torch.equal(got, 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    assert got.dtype == torch.float32
    assert got.shape == (head_dim // 2,)
    exact = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    np.testing.assert_allclose(got.double().numpy(), exact, rtol=5e-7)


def test_another_spelling_would_show():
    exponent = torch.arange(0, 128, 2).float() / 128
    for other in (1e4**-exponent, torch.exp(-exponent * math.log(1e4))):
        assert not torch.equal(inverse_frequencies(128, 1e4), other)


@pytest.mark.parametrize("head_dim", [2, 8, 128])
def test_theta_is_used(head_dim):
    small, large = rope(head_dim, 1e4), rope(head_dim, 1e6)
    assert small.frequencies[0] == large.frequencies[0] == 1
    assert (small.frequencies[1:] > large.frequencies[1:]).all()
    if head_dim > 2:
        positions = torch.arange(100)
        assert not torch.allclose(small.cos_sin(positions)[0], large.cos_sin(positions)[0], atol=0.1)


def test_everything_is_made_on_the_cpu_in_fp32():
    with torch.device("meta"):
        turning = rope(8, 1e4)
    assert turning.frequencies.device.type == "cpu"
    for x in turning.cos_sin(torch.arange(5)):
        assert (x.device.type, x.dtype, tuple(x.shape)) == ("cpu", torch.float32, (5, 4))


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
def test_equal_to_transformers_bit_for_bit(head_dim, theta):
    mistral = pytest.importorskip("transformers.models.mistral.modeling_mistral", reason="needs transformers")
    from transformers import MistralConfig

    config = MistralConfig(
        head_dim=head_dim,
        hidden_size=3 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    theirs = mistral.MistralRotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(head_dim, theta), theirs.inv_freq)
    positions = torch.tensor([0, 1, 2, 3, 31, 32, 4095, 4096, 127_999, *FAR])
    cos, sin = rope(head_dim, theta).cos_sin(positions)
    # Theirs repeats the D/2 angles, because it turns halves instead of pairs.
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    assert torch.equal(torch.cat((cos, cos), -1), their_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), their_sin[0])


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_far_positions_against_the_exact_cosine_of_the_fp32_angle(theta):
    turning = rope(128, theta)
    frequencies = turning.frequencies
    positions = torch.tensor(FAR)
    cos, sin = turning.cos_sin(positions)
    for row, position in enumerate(FAR):
        # One fp32 product; numpy rounds it by the same standard.
        angle = np.float32(position) * frequencies.numpy()
        assert angle.dtype == np.float32
        for i, a in enumerate(angle):
            assert abs(float(cos[row, i]) - math.cos(float(a))) < 1.2e-7
            assert abs(float(sin[row, i]) - math.sin(float(a))) < 1.2e-7
    # An angle made in float64 is another angle: the test above tells them apart.
    other = np.cos(np.outer(np.array(FAR, dtype=np.float64), frequencies.double().numpy()))
    assert np.abs(other - cos.double().numpy()).max() > 1e-4


def test_positions_are_not_looked_up_in_a_table():
    """Any order, repeats, and rows computed one by one give the same bits."""
    turning = rope(16, 1e4)
    positions = torch.tensor([131_072, 5, 5, 0, 2**24 - 1, 7])
    together = turning.cos_sin(positions)
    for i, position in enumerate(positions):
        for whole, single in zip(together, turning.cos_sin(position[None]), strict=True):
            assert torch.allclose(whole[i], single[0], rtol=0, atol=1.2e-7)
    assert torch.equal(together[0][1], together[0][2])


def test_adjacent_pairs_turn():
    """Pair (2i, 2i+1) turns by angle i: (1, 0) becomes (cos, sin), (0, 1) becomes (-sin, cos)."""
    cos, sin = rope(6, 1e4).cos_sin(torch.tensor([3]))
    for i in range(3):
        for j, (even, odd) in enumerate([(cos[0, i], sin[0, i]), (-sin[0, i], cos[0, i])]):
            x = torch.zeros(1, 1, 6)
            x[0, 0, 2 * i + j] = 1
            want = torch.zeros(6)
            want[2 * i], want[2 * i + 1] = even, odd
            assert torch.equal(rotate(x, cos, sin)[0, 0], want)


def test_equal_to_complex_multiplication():
    """As the original code has it, spelled with complex numbers."""
    positions = torch.tensor([0, 1, 9, 4096, 130_000])
    cos, sin = rope(8, 1e4).cos_sin(positions)
    x = random(5, 3, 8)
    turns = torch.complex(cos, sin)[:, None, :]
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
    assert torch.allclose(rotate(x, cos, sin), want, rtol=0, atol=1e-6)


@given(position=st.integers(0, 2**24), seed=st.integers(0, 1000), pairs=st.integers(1, 16))
def test_rotation_preserves_norms(position, seed, pairs):
    x = random(1, 3, 2 * pairs, seed=seed, dtype=torch.float64)
    cos, sin = rope(2 * pairs, 1e4).cos_sin(torch.tensor([position]))
    got = rotate(x, cos, sin)
    assert got.shape == x.shape
    # cos and sin are fp32 values, so their squares sum to 1 only to fp32.
    assert torch.allclose(got.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1), rtol=3e-7)


@given(q=st.integers(0, 3000), k=st.integers(0, 3000), shift=st.integers(0, 3000), seed=st.integers(0, 1000))
def test_only_the_distance_matters(q, k, shift, seed):
    """The product of a query and a key depends on q - k alone, up to the rounding of fp32 angles."""
    x, y = random(1, 1, 8, seed=seed, dtype=torch.float64), random(1, 1, 8, seed=seed + 1, dtype=torch.float64)
    turning = rope(8, 1e4)

    def product(q: int, k: int) -> float:
        a, b = (rotate(v, *turning.cos_sin(torch.tensor([p]))) for v, p in ((x, q), (y, k)))
        return float((a * b).sum())

    # Angles up to 6000 are rounded to 2.4e-4 of a radian; the vectors' norms are at most 6.
    assert abs(product(q, k) - product(q + shift, k + shift)) < 1e-2


def test_position_zero_changes_nothing_and_others_do():
    x = random(3, 2, 8)
    got = rotate(x, *rope(8, 1e4).cos_sin(torch.tensor([0, 1, 2])))
    assert torch.equal(got[0], x[0])
    assert not torch.allclose(got[1:], x[1:], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rotates_wide_and_casts_back_at_the_end(dtype):
    x = random(7, 2, 8, dtype=dtype)
    cos, sin = rope(8, 1e4).cos_sin(torch.arange(7) + 130_000)
    got = rotate(x, cos, sin)
    assert got.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(got, rotate(x.to(wide), cos.to(wide), sin.to(wide)).to(dtype))


def test_the_rotation_is_differentiable():
    x = random(4, 2, 6, dtype=torch.float64).requires_grad_()
    cos, sin = rope(6, 1e4).cos_sin(torch.arange(4))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
