"""Files of what a model says that makes a mistake: for tests that have no PyTorch to prove that they would notice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mistral.formats.folder import Folder
from mistral.formats.merge import has_adapter
from mistral.loader.assemble import assemble
from mistral.logprobs import logprobs
from mistral.oracle import mutants
from mistral.oracle.inputs import require_ids
from mistral.oracle.metrics import Progress
from mistral.util.errors import FormatError
from mistral.util.files import reason_of, require_writable, write_atomic


@torch.no_grad()
def write(
    found: Folder,
    prompts: Sequence[Tensor],
    folder: str | PathLike[str],
    mistakes: Sequence[str],
    progress: Progress | None = None,
) -> list[str]:
    """Write an .npz for each mistake that matters on these prompts, and right.npz; return the files' names.

    Args:
        folder: made where it is not there; files of these names in it are replaced.
        progress: told how many were made, and how many there are.

    Raises:
        FormatError: a file cannot be written.
        UsageError: a mistake is unknown.
        UsageError: an id that the model does not know.
    """
    require_ids(prompts, found.args)
    if not os.fspath(folder):
        raise FormatError("the folder to write to has no name")
    place = Path(os.path.expanduser(folder))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{place} cannot be written: {reason_of(error)}") from None
    require_writable(place / "right.npz")
    lens = [len(p) for p in prompts]
    wanted = [name for name in mistakes if mutants.applies(name, found.args, lens, has_adapter(found))]
    model, _ = assemble(found, device="cpu", dtype="float64", execution="eager")
    made = []
    for done, name in enumerate(("right", *wanted), 1):
        scores = model.forward(torch.cat(list(prompts)), lens) if name == "right" else None
        if scores is None:
            making = model
            if mutants.find_mutant(name).loads:
                with mutants.mutated(name):
                    making, _ = assemble(found, device="cpu", dtype="float64", execution="eager")
            scores = torch.cat(mutants.logits_with(making, prompts, name))
        with write_atomic(place / f"{name}.npz") as beside, beside.open("wb") as file:
            np.savez(file, prompt_ids=torch.cat(list(prompts)), prompt_lens=lens, logprobs=logprobs(scores))
        made.append(f"{name}.npz")
        if progress is not None:
            progress(done, 1 + len(wanted))
    return made
