"""`verify` on random models of odd shapes, all of them right: what multiples of the error budget they have.

    python -m tools.odd_shapes [--models 400] [--seed 0]

Widths, heads, windows, vocabularies and layers of few and many, weights in three dtypes and on four scales, up to one
that makes scores of thousands. A variant beyond its limit is printed, and the exit code is then 1: the limit is wrong,
or the library is. Numbers that a dtype cannot hold are counted apart.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mistral.args import ModelArgs
from mistral.formats.folder import read_folder
from mistral.formats.mistral import to_args
from mistral.oracle.metrics import short
from mistral.oracle.verify import Row, verify
from mistral.parameters import parameters


def write_model(folder: Path, seed: int) -> None:
    """Write a folder of a random shape, params.json and weights; the same seed gives the same on every machine."""
    choose = random.Random(seed).choice
    heads = choose([1, 2, 3])
    params: dict[str, Any] = {
        "dim": choose([3, 8, 10, 16, 24, 48, 96]),
        "n_layers": choose([2, 3, 5, 8]),
        "head_dim": choose([2, 4, 6, 8, 16, 32]),
        "hidden_dim": choose([1, 5, 16, 40, 130]),
        "n_heads": heads * choose([1, 2, 3, 4]),
        "n_kv_heads": heads,
        "norm_eps": 1e-5,
        "vocab_size": choose([3, 17, 60, 300, 1000]),
        "sliding_window": choose([None, 1, 2, 5, 16, 64, 100]),
        "rope_theta": choose([1e4, 1e6]),
    }
    scale, dtype = choose([0.02, 0.3, 2.0, None]), choose([torch.float32, torch.bfloat16, torch.float16])
    weights = {name: w.to(dtype) for name, w in draw_weights(to_args(params), scale, seed).items()}
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    save_file(weights, folder / "consolidated.safetensors")


def draw_weights(args: ModelArgs, scale: float | None, seed: int) -> dict[str, Tensor]:
    """Weights by name in fp32: matrices normal, of that deviation (None: the root of their width), norms around 1."""
    numbers = np.random.default_rng(seed)  # torch.randn differs between CPU capability levels
    weights = {}
    for name, parameter in parameters(args).items():
        *rows, width = parameter.shape
        drawn = torch.from_numpy(numbers.standard_normal((*rows, width), dtype=np.float32))
        weights[name] = drawn * (scale or width**-0.5) if rows else 1 + 0.3 * drawn
    return weights


def main() -> int:
    """Verify all of them, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.odd_shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others have the numbers after it")
    given = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    beyond: list[tuple[int, Row]] = []
    overflows = 0
    for seed in tqdm(range(given.seed, given.seed + given.models), desc="verifying", disable=None, leave=False):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), seed)
            report = verify(read_folder(Path(folder)))
        for row in report.rows:
            if row.overflows:
                overflows += 1
                continue
            ratios.setdefault(short(row.dtypes[1]), []).append(row.verdict.ratio)
            if not row.verdict.passes:
                beyond.append((seed, row))
    print(f"{'':4}  {'variants':>8}  {'median':>6}  {'most':>6}")
    for dtype, found in sorted(ratios.items()):
        print(f"{dtype}  {len(found):8,}  {statistics.median(found):6.2f}  {max(found):6.2f}")
    print(f"{overflows} variants whose dtype cannot hold their numbers; {len(beyond)} beyond their limit")
    for seed, row in beyond:
        print(f"seed {seed}: {row.name}, {row.attention}, {short(row.dtypes[1])}: {row.verdict.ratio:.1f}")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
