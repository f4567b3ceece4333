"""The model that a folder holds, in memory: how it shall run, whether it fits, then its weights one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral.fast.layout import stored_as
from mistral.formats.folder import Folder
from mistral.loader.adapted import Adapted, put_adapters, with_adapters
from mistral.loader.blocks import kept_blocks, load_blocks, put_blocks, reported
from mistral.loader.options import LoadOptions, OptionError
from mistral.loader.sizes import kept_dtype, loses, mixed, narrower, require_memory, too_wide
from mistral.parameters import Parameter, parameters
from mistral.util.english import counted, some_names
from mistral.util.flat import flat
from mistral.util.progress import Bar
from mistral.util.threads import Sharing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mistral.args import ModelArgs
    from mistral.loader.division import Division
    from mistral.loader.runtime import Runtime
    from mistral.model import Transformer
    from mistral.quant.linear import QuantizedLinear


@flat(options=LoadOptions())
def assemble(found: Folder, division: Division | None = None, *, options: LoadOptions) -> tuple[Transformer, Runtime]:
    """The model that a folder holds, or this process's part of it, in memory, and how it runs; see `load`.

    Raises:
        MistralError: a subclass that names what is wrong with the options, the adapter or the memory.
    """
    return assemble_adapted(with_adapters(found, options), division, options)


def assemble_adapted(adapted: Adapted, division: Division | None, options: LoadOptions) -> tuple[Transformer, Runtime]:
    """`assemble` of a folder that has its adapters already."""
    import torch

    found, of_division = adapted.folder, tuple[str, ...]()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if division is not None:
        options = division.options(found, options)
        of_division = division.notes(found.args, options.quant)
        found = division.part(found)
    elif options.parallel > 1:
        those = "complete, interactive, demo, perplexity, serve, batch and finetune"
        raise OptionError(f"parallel {options.parallel} is for {those}: omit it")
    found, run, blocks = _resolved(found, options, division is not None)
    run = replace(run, notes=(*run.notes, *of_division, *adapted.notes), adapter=adapted.text)
    run = replace(reported(found, options, run, blocks), mixed=mixed(found, run, blocks))
    require_memory(found, run, blocks)
    model, run = _without_weights(found.args, run, division, bool(adapted.beside))
    if division is not None:
        division.shape(model)
    zeros = _fill(model, found, run, blocks)
    run = replace(run, notes=(*run.notes, *_of_zeros(zeros)))
    model.kept_in = {run.compute: run.cache}
    if division is not None:
        division.connect(model)
    if adapted.beside:
        put_adapters(model, adapted.beside, run.device, run.compute)
    if run.execution == "bitwise":
        from mistral.fast import bitwise

        bitwise.self_test(model)
    return model, run


def _resolved(found: Folder, options: LoadOptions, divided: bool) -> tuple[Folder, Runtime, dict[str, str]]:
    """How a model runs by the options, and which of its weights stay blocks; the folder as it is then read."""
    run = _runtime(found, options)
    blocks = {} if divided else kept_blocks(found, options, run)  # no part of a row of blocks is read
    if note := too_wide(found, run, blocks):
        found = narrower(found)
        run = _runtime(found, options, stored="bfloat16")
        run = replace(run, notes=(*run.notes, note))
    return found, run, blocks


def _runtime(found: Folder, options: LoadOptions, stored: str | None = None) -> Runtime:
    """How a model runs by the options.

    Args:
        stored: the dtype of its weights as they are read; None: that of most of them.

    Raises:
        OptionError: what the options ask for cannot be had.
    """
    import torch

    from mistral.loader import runtime

    own = found.quant and found.quant.removesuffix("-symmetric")  # what it would be called as an option
    if found.quant is not None and options.quant not in (None, own):
        raise OptionError(f"the weights of {found.path} are already quantized to {found.quant}: omit quant")
    rounded = None if options.quant == "none" else options.quant
    matrices = [tensor for name, tensor in found.tensors.items() if name.endswith(".weight")]
    (most, _), *_ = Counter(t.dtype for t in matrices).most_common()
    (called, _), *_ = Counter(t.dtype_name if t.widened else t.dtype for t in matrices).most_common()
    run = runtime.resolve(
        replace(options, quant=rounded or own),
        stored=getattr(torch, stored or str(most)),
        called=called,
        parameters=found.parameters,
        head_dim=found.args.head_dim,
    )
    return replace(run, quant=rounded if found.quant is None else found.quant)


def _without_weights(
    args: ModelArgs, run: Runtime, division: Division | None, adapted: bool
) -> tuple[Transformer, Runtime]:
    """The model on the meta device, and how it runs where a fast path does not know a part of it.

    Args:
        adapted: whether adapters come beside its weights.

    Raises:
        OptionError: the execution cannot be had so.
    """
    from mistral.fast.known import unknown_module

    model, by_kernels = _on_meta(args, run), run.how.products
    module = unknown_module(model, mixtures=by_kernels, growing=by_kernels) if division is None else division.unknown
    unknown = "adapters beside the weights" if adapted else None if module is None else f"the module {module}"
    if run.how.whole_steps and unknown is not None:
        run = run.standing_aside(unknown)
        model = _on_meta(args, run)
    return model, run


def _on_meta(args: ModelArgs, run: Runtime) -> Transformer:
    import torch

    # Where weights and arithmetic agree the model follows its weights, as `.to()` moves them.
    follows = run.weights == run.compute or (run.how.products and run.how.whole_steps)
    with torch.device("meta"):
        return run.how.transformer()(args, run.attend, None if follows else run.compute)


def _of_zeros(names: list[str]) -> list[str]:
    """A note on matrices that are zeros and nothing else."""
    if not names:
        return []
    what = f"{counted(len(names), 'matrix is', 'matrices are')} all zeros ({some_names(names)})"
    return [f"{what}: a merge or a download that failed, unless the model has blocks that do nothing on purpose"]


def _is_zero(weight: Tensor) -> bool:
    """Whether a matrix is all zeros; of one that is not, a row is looked at, so that this takes no time."""
    return weight.dim() == 2 and not weight[len(weight) // 2].any() and not weight.any()


def _fill(model: Transformer, found: Folder, run: Runtime, blocks: dict[str, str]) -> list[str]:
    """Give a model on the meta device its weights: each is in memory, on its device, before the next is read.

    Returns:
        The matrices that are all zeros; blocks and quantized weights as they are stored are not looked at.
    """
    from mistral.fast.linear import use_kernels
    from mistral.quant import put_quantized, quantize

    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedLinear] = {}
    of_blocks: dict[str, nn.Module] = {}
    expected = parameters(found.args)
    quant = run.quant if found.quant is None else None  # that weights are rounded to here
    # Beside weights that are rounded, those that are not are copied: one page of theirs would keep its whole part of
    # the file in memory.
    own = bool(blocks) or quant is not None
    zeros: list[str] = []
    sharing = Sharing()
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    with Bar("loading", "B", total) as bar:
        for name in found.tensors if found.quant is None else expected:
            with sharing():
                # No name for what is read: its part of the file is let go before the next one is mapped.
                if found.has_quantized(expected[name]):
                    quantized[name] = _as_stored(found, expected[name], run.device, bar.update)
                elif name in blocks:
                    of_blocks |= load_blocks(found, name, bar.update)
                elif quant is not None and expected[name].quantized:
                    weight = found.weights.get(name, bar.update, exact=True)
                    zeros += [name] if _is_zero(weight) else []
                    quantized[name] = quantize(expected[name], weight, quant, run.device)
                    del weight
                else:
                    tensors[name] = _read(found, name, run, own, bar.update)
                    zeros += [name] if _is_zero(tensors[name]) else []
    if quantized:
        tensors |= put_quantized(model, quantized)
        for module in quantized.values():
            module.by_kernels = run.how.products
    put_blocks(model, of_blocks)
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
    model.load_state_dict(tensors, strict=True, assign=True)
    if run.how.products:
        use_kernels(model)
    model.rounds_prompts = run.rounds_prompts
    model.eval()
    return zeros


def _as_stored(
    found: Folder, parameter: Parameter, device: torch.device, progress: Callable[[int], object]
) -> QuantizedLinear:
    """A weight that is quantized in its file."""
    from mistral.quant import from_stored

    assert found.quant is not None
    stored = [found.weights.get(part, progress) for part in stored_as(parameter, found.quant)]
    return from_stored(parameter, found.quant, stored, device)


def _read(found: Folder, name: str, run: Runtime, own: bool, progress: Callable[[int], object]) -> Tensor:
    """A weight in the dtype in which it is kept, on its device.

    Args:
        own: whether it is copied where its file could stay mapped.
    """
    from mistral.fast import pages

    stored = found.weights.tensors[name]
    dtype = kept_dtype(stored, run)
    weight = found.weights.get(name, progress, exact=loses(dtype, stored))
    mapped = weight.dtype == dtype and not own and bool(found.weights.files)
    on_cpu = run.device.type == "cpu" and not mapped
    return pages.copied(weight, dtype) if on_cpu else weight.to(run.device, dtype, copy=own)
