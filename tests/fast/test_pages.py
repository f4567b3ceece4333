"""Memory for weights: what is in it, how tensors lie in it, and that it goes away with them."""

from __future__ import annotations

import gc
import mmap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral.fast import pages

HUGE = hasattr(mmap, "MADV_HUGEPAGE")
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int8)
SIZES = st.integers(0, 3 * pages.SMALL)


def extent(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@given(st.lists(st.tuples(SIZES, st.sampled_from(DTYPES)), max_size=12))
def test_tensors_do_not_overlap(asked: list[tuple[int, torch.dtype]]) -> None:
    made = [pages.empty((n,), dtype).fill_(i + 1) for i, (n, dtype) in enumerate(asked)]
    for i, (tensor, (n, dtype)) in enumerate(zip(made, asked, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((n,), dtype, True)
        assert (tensor == i + 1).all()
        assert tensor.nbytes < pages.SMALL or tensor.data_ptr() % pages.LINE == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # or saving one would save all
    ends = sorted(extent(tensor) for tensor in made if tensor.nbytes)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))


def test_one_larger_than_a_chunk() -> None:
    large = pages.empty((pages.CHUNK + 3,), torch.uint8)
    assert len(large) == pages.CHUNK + 3
    large[0] = large[-1] = 7
    assert pages.empty((pages.SMALL,), torch.uint8).nbytes == pages.SMALL


def test_a_copy_is_rounded_once() -> None:
    weight = torch.randn(300, 257)
    assert torch.equal(pages.copied(weight, torch.bfloat16), weight.bfloat16())
    assert torch.equal(pages.copied(weight.T, torch.float32), weight.T)


def test_tensors_are_saved_apart(tmp_path: Path) -> None:
    tensors = {name: pages.copied(torch.randn(256, 256), torch.float32) for name in "ab"}
    save_file(tensors, tmp_path / "x.safetensors")
    assert all(torch.equal(load_file(tmp_path / "x.safetensors")[name], tensors[name]) for name in "ab")


@pytest.mark.skipif(not HUGE, reason="no such memory here")
def test_it_goes_away_with_the_last_of_them() -> None:
    def mapped() -> int:
        return sum(line.startswith("VmSize") and int(line.split()[1]) for line in Path("/proc/self/status").open())

    pages.empty((pages.CHUNK,), torch.uint8)
    before = mapped()
    for _ in range(8):
        pages.empty((pages.CHUNK,), torch.uint8)[0] = 1
    gc.collect()
    assert mapped() - before < 3 * pages.CHUNK // 1024
