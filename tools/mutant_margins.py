"""How far each mutant is beyond the limit of `verify`: multiples of the error budget, on a folder or on packs.

    python -m tools.mutant_margins [FOLDER or PACK ...] [--seed 0]

The packs that ship unless given. Mutants compute in float64, so that what is measured is theirs alone, against the
budget of fp32. The exit code is 1 if one would pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mistral.formats.folder import Folder, read_folder
from mistral.loader.assemble import assemble
from mistral.logprobs import logprobs
from mistral.oracle import mutants, pack
from mistral.oracle.inputs import WeightReader, random_prompts, through
from mistral.oracle.metrics import LIMITS, ErrorStats, Verdict, judge
from mistral.oracle.truth import Truth, error_budget
from mistral.oracle.verify import LENS
from mistral.parameters import OUTPUT

ROWS = 64  # positions whose logits are held in float64 at once, of each draw


@torch.inference_mode()
def margins(found: Folder, prompts: Sequence[Tensor]) -> Iterator[tuple[str, Verdict]]:
    """The verdict on every mutant that can give other numbers on this shape, over these prompts.

    Raises:
        WeightsError: a file that cannot be read.
    """
    args, lens = found.args, [len(p) for p in prompts]
    reading = WeightReader(found)
    truth = Truth(args, prompts)
    budget = error_budget(args, prompts, None, torch.float32, exact=truth)
    for _ in through(reading, [(stream, None) for stream in (truth, *budget)], args.n_layers):
        pass
    norm, output = reading.get("norm.weight"), reading.get(OUTPUT)
    true = [logprobs(logits) for logits in truth.head(norm, output, ROWS)]
    expected = ErrorStats()
    for stream in budget:
        for want, logits in zip(true, stream.head(norm, output, ROWS), strict=True):
            expected.add(want, logits)
    model, _ = assemble(found, device="cpu", dtype="float64", execution="eager")
    for name in mutants.MUTANTS:
        if not mutants.applies(name, args, lens):
            continue
        measure = ErrorStats()
        logits = torch.cat(mutants.logits_with(model, list(prompts), name))
        for want, rows in zip(true, logits.split(ROWS), strict=True):
            # A mutant without BOS has no first row: nothing is held against it there.
            measure.add(want, torch.where(rows.isnan().all(-1, keepdim=True), want, rows))
        yield name, judge(measure.errors(), expected.errors(), LIMITS[torch.float32], lens)


def main() -> int:
    """Measure and print, the least margin first."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutant_margins", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, default=sorted(pack.SHIPPED.glob("*.safetensors")))
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, for folders")
    given = parser.parse_args()
    passing = 0
    for path in given.paths:
        with tempfile.TemporaryDirectory() as nothing:
            if path.is_dir():
                found = read_folder(path)
                prompts = random_prompts(found.args, LENS, given.seed)
            else:
                found, prompts = pack.folder_of(path, Path(nothing)), pack.read(path).prompts
            verdicts = sorted(margins(found, prompts), key=lambda pair: pair[1].ratio)
        print(path)
        for name, verdict in verdicts:
            passing += verdict.passes
            print(f"  {name:26} {verdict.ratio:9.3g} of {verdict.limit:g}{'  PASSES' if verdict.passes else ''}")
    return 1 if passing else 0


if __name__ == "__main__":
    sys.exit(main())
