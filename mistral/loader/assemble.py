"""The model that a folder holds, in memory: how it shall run, whether it fits, then its weights one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral.fast.layout import bytes_of, stored_as
from mistral.formats.folder import Folder
from mistral.formats.weights import Stored, some_names
from mistral.loader.adapted import Adapted, put_adapters, with_adapters
from mistral.loader.blocks import blocks_bytes, kept_blocks, load_blocks, put_blocks, reported
from mistral.loader.options import LoadOptions, OptionError
from mistral.parameters import parameters
from mistral.util import memory
from mistral.util.english import counted
from mistral.util.flat import flat
from mistral.util.progress import Bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mistral.loader.division import Division
    from mistral.loader.runtime import Runtime
    from mistral.model import Transformer


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

    from mistral.fast.known import unknown_module
    from mistral.loader import runtime

    found = adapted.folder
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if division is not None:
        options = division.options(found, options)
    elif options.parallel > 1:
        those = "complete, interactive, demo, perplexity, serve, batch and finetune"
        raise OptionError(f"parallel {options.parallel} is for {those}: omit it")
    about = () if division is None else division.notes(found.args, options.quant)
    found = found if division is None else division.part(found)
    args = found.args
    matrices = [tensor for name, tensor in found.tensors.items() if name.endswith(".weight")]
    (stored, _), *_ = Counter(t.dtype for t in matrices).most_common()
    (called, _), *_ = Counter(t.dtype_name if t.widened else t.dtype for t in matrices).most_common()
    rounded = None if options.quant == "none" else options.quant
    asked = found.quant and found.quant.removesuffix("-symmetric")  # what it would be called as an option
    if found.quant is not None and options.quant not in (None, asked):
        raise OptionError(f"the weights of {found.path} are already quantized to {found.quant}: omit quant")

    def resolve(stored: str) -> Runtime:
        run = runtime.resolve(
            replace(options, quant=rounded or asked),
            stored=getattr(torch, stored),
            called=called,
            parameters=found.parameters,
            head_dim=args.head_dim,
        )
        return replace(run, quant=rounded if found.quant is None else found.quant)

    run = resolve(stored)
    kept = kept_blocks(found, options, run) if division is None else {}  # no part of a row of blocks is read
    if note := _too_wide(found, run, kept):
        found = _narrower(found)
        run = resolve("bfloat16")
        run = replace(run, notes=(*run.notes, note))
    run = replace(run, notes=(*run.notes, *about, *adapted.notes), adapter=adapted.text)
    run = replace(reported(found, run, kept), mixed=_mixed(found, run, kept))
    _require_memory(found, run, kept)

    def build(run: Runtime) -> Transformer:
        # Where weights and arithmetic agree the model follows its weights, as `.to()` moves them.
        follows = run.weights == run.compute or (run.how.products and run.how.whole_steps)
        with torch.device("meta"):
            return run.how.transformer()(args, run.attend, None if follows else run.compute)

    model = build(run)
    by_kernels = run.how.products
    module = unknown_module(model, mixtures=by_kernels, growing=by_kernels)
    if division is not None:
        module = "layers.0.attention.wo (Summed)"
    unknown = "adapters beside the weights" if adapted.beside else None if module is None else f"the module {module}"
    if run.how.whole_steps and unknown is not None:
        run = run.standing_aside(unknown)
        model = build(run)
    if division is not None:
        division.shape(model)
    _fill(model, found, run, kept)
    model.kept_in = {run.compute: run.cache}
    if division is not None:
        division.connect(model)
    if adapted.beside:
        put_adapters(model, adapted.beside, run.device, run.compute)
    if run.execution == "bitwise":
        from mistral.fast import bitwise

        bitwise.self_test(model)
    return model, run


def _too_wide(found: Folder, run: Runtime, kept: dict[str, str]) -> str | None:
    """A note where weights that come from blocks of few bits would take too much memory in float32."""
    from mistral.loader.runtime import WIDEN_SHARE

    left, needed = memory.available(run.device), _size_in_memory(found, run, kept)
    wide = run.weights.itemsize > 2 and any(t.widened and name not in kept for name, t in found.tensors.items())
    if not wide or left is None or needed <= WIDEN_SHARE * left:
        return None
    return (
        f"the weights, blocks of few bits in their file, are rounded to bfloat16: in float32 they need "
        f"{memory.as_text(needed)}, and {memory.as_text(left)} are left"
    )


def _narrower(found: Folder) -> Folder:
    """The same folder, with bfloat16 as what comes of blocks of few bits."""
    tensors = {n: replace(t, dtype="bfloat16") if t.widened else t for n, t in found.weights.tensors.items()}
    return replace(found, weights=replace(found.weights, tensors=tensors))


def _require_memory(found: Folder, run: Runtime, kept: dict[str, str]) -> None:
    """Refuse weights that do not fit, with advice on what would."""
    import torch

    smaller = ["--dtype bfloat16"] if run.weights.itemsize > 2 and not run.quant and not kept else []
    can_quantize = run.device.type == "cuda" or (run.how.products and run.compute == torch.float32)
    smaller += ["--quant int8"] if can_quantize and not run.quant else []
    memory.require(
        _size_in_memory(found, run, kept),
        run.device,
        f"the weights in {run.quant or '+'.join(run.blocks) or str(run.weights).removeprefix('torch.')}",
        f"use {', '.join([*smaller, 'another --device'])}, or a smaller model",
    )


def _size_in_memory(found: Folder, run: Runtime, kept: dict[str, str]) -> int:
    """Bytes of the weights once they are loaded."""
    if run.quant is None:
        known = parameters(found.args)
        wide = {
            n: tensor.parameters * _kept(tensor, run).itemsize for n, tensor in found.tensors.items() if n not in kept
        }
        return sum(wide.values()) + sum(blocks_bytes(known[name], kind) for name, kind in kept.items())
    return sum(
        bytes_of(w, run.quant if found.quant is None or found.has_quantized(w) else None, run.weights.itemsize)
        for w in parameters(found.args).values()
    )


def _kept(tensor: Stored, run: Runtime) -> torch.dtype:
    """The dtype in which a tensor is kept: where weights stay as they are stored, each has its own, up to that of the
    arithmetic; a checkpoint may mix them."""
    import torch

    own: torch.dtype = getattr(torch, str(tensor.dtype))
    fits = run.weights != run.compute and torch.promote_types(own, run.compute) == run.compute
    return own if fits else run.compute


def _mixed(found: Folder, run: Runtime, kept: dict[str, str]) -> tuple[str, ...]:
    """The dtypes of weights that stay as they are stored, where there are several: what most numbers have comes first.

    Beside blocks of few bits those of matrices and tables; norms and routers always stay as they are.
    """
    if run.quant is not None:
        return ()
    known, counts = parameters(found.args), Counter[str]()
    for name, tensor in found.tensors.items():
        if name not in kept and not (kept and known[name].role in ("norm", "router")):
            counts[str(_kept(tensor, run)).removeprefix("torch.")] += tensor.parameters
    return tuple(name for name, _ in counts.most_common()) if kept or len(counts) > 1 else ()


def _is_narrower(dtype: torch.dtype, tensor: Stored) -> bool:
    """Whether a dtype rounds what a tensor's own has: the tensor is then wanted before it is rounded to its own."""
    import torch

    return torch.promote_types(getattr(torch, str(tensor.dtype)), dtype) != dtype


def narrowed(found: Folder, run: Runtime) -> tuple[str, ...]:
    """A note where some tensors, not all, are wider than the arithmetic: nobody chose to round those."""
    import torch

    wider = []
    for name, tensor in found.tensors.items():
        own, kept = getattr(torch, str(tensor.dtype)), _kept(tensor, run)
        if own.is_floating_point and torch.promote_types(own, kept) != kept:
            wider.append(name)
    if not wider or len(wider) == len(found.tensors):
        return ()
    to = str(run.compute).removeprefix("torch.")
    return (f"rounded to {to}, but stored in more: {counted(len(wider), 'tensor')} ({some_names(wider)})",)


def _fill(model: Transformer, found: Folder, run: Runtime, kept: dict[str, str]) -> None:
    """Give a model on the meta device its weights: each is in memory, on its device, before the next is read."""
    from mistral.fast import pages
    from mistral.fast.linear import use_kernels
    from mistral.quant import from_stored, put_quantized, quantize
    from mistral.quant.linear import QuantizedLinear

    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedLinear] = {}
    blocks: dict[str, nn.Module] = {}
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    with Bar("loading", "B", total) as bar:
        expected = parameters(found.args)
        for name in found.tensors if found.quant is None else expected:
            # No name for what is read: its part of the file is let go before the next one is mapped.
            if found.has_quantized(expected[name]):
                assert found.quant is not None
                parts = stored_as(expected[name], found.quant)
                stored = [found.weights.get(part, bar.update) for part in parts]
                quantized[name] = from_stored(expected[name], found.quant, stored, run.device)
            elif name in kept:
                blocks |= load_blocks(found, name, bar.update)
            elif run.quant is not None and found.quant is None and expected[name].quantized:
                weight = found.weights.get(name, bar.update, exact=True)
                quantized[name] = quantize(expected[name], weight, run.quant, run.device)
            else:
                # Beside weights that are rounded, those that are not are copied: one page of theirs would keep its
                # whole part of the file in memory.
                own = bool(kept) or (run.quant is not None and found.quant is None)
                dtype = _kept(found.weights.tensors[name], run)
                exact = _is_narrower(dtype, found.weights.tensors[name])
                weight = found.weights.get(name, bar.update, exact)
                mapped = weight.dtype == dtype and not own and bool(found.weights.files)
                on_cpu = run.device.type == "cpu" and not mapped
                tensors[name] = pages.copied(weight, dtype) if on_cpu else weight.to(run.device, dtype, copy=own)
                del weight  # or what is mapped of the file would stay in memory until the last tensor
    if quantized:
        tensors |= put_quantized(model, quantized)
        for module in quantized.values():
            module.by_kernels = run.how.products
    put_blocks(model, blocks)
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
    model.load_state_dict(tensors, strict=True, assign=True)
    if run.how.products:
        use_kernels(model)
    model.rounds_prompts = run.rounds_prompts
    model.eval()
