"""Which columns of a weight matter: how large their inputs are in a text, for int4 that errs less where it counts.

The error of a product is a sum over the columns: the weight's error times the input. Where inputs are independent, a
column counts by the mean square of its inputs (as in llama.cpp's importance matrix). Knows nothing about rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mistral.formats.folder import Folder
from mistral.formats.tokenizers import load_tokenizer
from mistral.loader.assemble import assemble
from mistral.loader.options import LoadOptions
from mistral.parameters import parameters
from mistral.tokenizer import encode, outside
from mistral.util.english import counted
from mistral.util.errors import UsageError
from mistral.util.files import decode_text, reason_of
from mistral.util.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from mistral.model import Transformer

LEAST = 256  # tokens: what fewer say about columns is chance
SEQUENCE = 2048  # tokens of the text that are one sequence
FLOOR = 0.01  # of the mean, added to all columns: none counts for nothing


def calibrate(found: Folder, file: Path) -> tuple[dict[str, Tensor], str]:
    """What a text says about the weights of a model, which is loaded for it, on the CPU.

    Args:
        found: the model, not yet quantized.
        file: text, UTF-8; each 2,048 tokens of it are a sequence.

    Returns:
        `mean_squares`, and a note.

    Raises:
        MistralError: a file that cannot be read or is too short, no tokenizer, or a model that does not fit.
    """
    try:
        text = decode_text(file.read_bytes(), str(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {reason_of(error)}") from None
    tokenizer = load_tokenizer(found.words, found.args.vocab_size, found.path)
    ids = encode(tokenizer, text)
    if (what := outside(ids, tokenizer, found.args.vocab_size)) is not None:
        raise UsageError(f"{file} has {what}: remove that token from the text")
    if len(ids) < LEAST:
        raise UsageError(
            f"{file} has {counted(len(ids), 'token')}, and calibration needs {LEAST} or more: give a longer text"
        )
    model, _ = assemble(found, options=LoadOptions(device="cpu"))
    with Bar("calibrating", "token", len(ids)) as bar:
        columns = mean_squares(model, ids, bar.update)
    missing = sum(p.role == "matrix" and name not in columns for name, p in parameters(found.args).items())
    unseen = (
        f"; {counted(missing, 'matrix', 'matrices')} had no input, and there all columns count the same"
        if missing
        else ""
    )
    return columns, f"int4 was calibrated on the {len(ids):,} tokens of {file}{unseen}"


def mean_squares(
    model: Transformer, ids: Sequence[int], progress: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """The mean square of each input of every matrix in the layers: [in_features] fp32 by the weight's name.

    Raises:
        UsageError: inputs that are no numbers.
    """
    import torch

    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            if len(rows):
                sums[name] = sums.get(name, 0) + rows.square().sum(0)
                counts[name] = counts.get(name, 0) + len(rows)

        return note

    names = [name for name, parameter in parameters(model.args).items() if parameter.role == "matrix"]
    hooks = [model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(watch(n)) for n in names]
    try:
        with torch.inference_mode():
            for first in range(0, len(ids), SEQUENCE):
                piece = torch.tensor(ids[first : first + SEQUENCE])
                if len(piece) > 1:  # a fast path takes single tokens through no module
                    model.forward_partial(piece, [len(piece)])
                if progress is not None:
                    progress(len(piece))
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: total / counts[name] for name, total in sums.items()}
    for name, mean in means.items():
        if not mean.isfinite().all():
            raise UsageError(f"the inputs of {name} are NaN or infinite on this text: the weights are broken")
    return {name: (mean + FLOOR * mean.mean()).clone() for name, mean in means.items()}
