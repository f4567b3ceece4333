"""Adapters beside a product: each row has what its own adapter adds, whatever rows are around it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.adapters import BASE, AdaptedLinear, Adapters, LoraPair
from mistral.linear import Linear
from mistral.util.errors import UsageError

NAMES = ("a", "b.c", "other matrices")


def adapted(seed: int = 0) -> AdaptedLinear:
    """A product of 6 to 5 with adapters of ranks 2 and 3; the third changes other matrices."""
    generator = torch.Generator().manual_seed(seed)
    of = Linear(6, 5).requires_grad_(False)
    of.weight.copy_(torch.rand(5, 6, generator=generator) - 0.5)
    pairs = {
        name: LoraPair(torch.rand(rank, 6, generator=generator), torch.rand(5, rank, generator=generator), rank / 2)
        for name, rank in (("a", 2), ("b.c", 3))
    }
    return AdaptedLinear(of, Adapters(NAMES), pairs)


@given(st.lists(st.tuples(st.sampled_from([BASE, *NAMES]), st.integers(0, 4)), min_size=1, max_size=6))
def test_each_row_has_its_own(runs: list[tuple[str, int]]) -> None:
    product = adapted()
    names, counts = [name for name, _ in runs], [count for _, count in runs]
    x = torch.rand(sum(counts), 6, generator=torch.Generator().manual_seed(1)) - 0.5
    with product.adapters.of(names, counts):
        got = product(x)
    assert got.shape == (sum(counts), 5)
    plain = product.of(x)
    weights = {name: product.of.weight.double() for name in (BASE, *NAMES)}
    for name, pair in zip(("a", "b.c"), product.pairs, strict=True):
        weights[name] = weights[name] + pair.scale * pair.b.double() @ pair.a.double()
    row = 0
    for name, count in runs:
        for _ in range(count):
            want = weights[name] @ x[row].double()
            assert (got[row].double() - want).abs().max() < 1e-6
            if name not in ("a", "b.c"):
                assert torch.equal(got[row], plain[row])
            row += 1


def test_what_is_declared_ends_with_its_block_and_is_its_threads() -> None:
    product = adapted()
    x = torch.rand(3, 6)
    plain = product(x)
    with pytest.raises(ZeroDivisionError), product.adapters.of(["a"], [3]):  # noqa: PT012
        assert not torch.equal(product(x), plain)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(product, x).result(), plain)
        _ = 1 // 0
    assert torch.equal(product(x), plain)


def test_the_default_is_the_only_one() -> None:
    assert Adapters(["x"]).default == Adapters(["x"]).find(None) == "x"
    assert Adapters(["x", "y"]).default == BASE
    assert Adapters(["x", "y"]).find("y") == "y"
    assert Adapters(["x"]).find(BASE) == BASE
    with pytest.raises(UsageError, match="no adapter is called 'z'; there are x, y"):
        Adapters(["x", "y"]).find("z")
    with pytest.raises(UsageError, match="the adapter x changes experts"):
        Adapters(["x"], mixes=False).find(BASE)


def test_gradients_reach_the_pairs_of_the_rows() -> None:
    product = adapted()
    for pair in product.pairs:
        pair.a.requires_grad_(True)
        pair.b.requires_grad_(True)
    with product.adapters.of(["a", BASE], [2, 2]):
        product(torch.rand(4, 6)).sum().backward()
    assert product.pairs[0].a.grad is not None
    assert product.pairs[1].a.grad is None
