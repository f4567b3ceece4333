"""A folder into memory: find, check everything, see that it fits, then load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mistral.args import ModelArgs
from mistral.fast.layout import bytes_of, stored_as
from mistral.formats.folder import BUNDLED, Folder, read_folder, short, with_window
from mistral.formats.hub import locate
from mistral.formats.releases import Release, identify
from mistral.formats.tokenizers import has_tokenizer, load_tokenizer, missing_tokens, tokenizer_notes
from mistral.formats.weights import Stored, file_names, some_names
from mistral.loader.adapted import put_adapters, with_adapters
from mistral.loader.blocks import blocks_bytes, kept_blocks, load_blocks, put_blocks, reported
from mistral.loader.options import LoadOptions, OptionError
from mistral.parameters import parameters
from mistral.tokenizer import NO_TOKENIZER, Tokenizer, TokenizerLike
from mistral.util import memory
from mistral.util.english import counted
from mistral.util.flat import flat

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mistral.formats.convert import Converted
    from mistral.loader.division import Division
    from mistral.loader.runtime import Runtime
    from mistral.model import Transformer


@dataclass(frozen=True, repr=False)
class Loaded:
    """A model in memory, and what is known about it.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the folder's (None if it has none), or the one given to `load`, which may have fewer methods.
        args, runtime: its shape, and how it runs.
        folder, files: where it came from.
        parameters: how many weights there are.
        release: the release that it is, as far as its shape tells; None if it is none that is known.
        notes: what was assumed or left aside and what is odd, a sentence each.
        draft: what guesses its tokens, for people; "" for nothing.
    """

    model: Transformer
    tokenizer: Tokenizer
    args: ModelArgs
    runtime: Runtime
    folder: Path
    files: tuple[Path, ...]
    parameters: int
    release: Release | None = None
    notes: tuple[str, ...] = ()
    draft: str = ""

    def describe(self) -> str:
        """One line: what was loaded, from where, and every choice that was made."""
        args = self.args
        return (
            f"{short(self.folder)}: {self.parameters / 1e6:.1f} M parameters from {file_names(self.files)}; "
            f"{self.runtime.describe()}; "
            f"window {args.window_text}; rope_theta {args.rope_theta:g} ({args.theta_rule}); "
            f"tokenizer {self._tokenizer_text()}{f'; drafts by {self.draft}' if self.draft else ''}"
        )

    def _tokenizer_text(self) -> str:
        found: object = self.tokenizer
        if found is None:
            return "none"
        if not hasattr(found, "path"):
            return "your own"
        ends = sorted(self.tokenizer.eos_ids)
        usual = ends == [self.tokenizer.eos_id]
        return self.tokenizer.path.name + ("" if usual else f", ends at ids {', '.join(map(str, ends)) or 'none'}")

    def save(self, folder: str | PathLike[str]) -> Converted:
        """Write model and tokenizer into a folder that loads with the same bits; see `loader.save`.

        Raises:
            MistralError: quantized weights, or a folder that cannot be written.
        """
        from mistral.loader.save import save

        return save(self.model, folder, self.folder)

    def __repr__(self) -> str:
        return f"<Loaded {short(self.folder)}: {self.parameters / 1e6:.1f} M parameters; {self.runtime.describe()}>"


@flat(options=LoadOptions())
def load(
    folder: str | PathLike[str] | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    kernels: bool | None = None,
    deterministic: bool = False,
    division: Division | None = None,
    options: LoadOptions,
) -> Loaded:
    """Load a model: a folder in Mistral's layout or Hugging Face's, or a GGUF file: shape, weights, tokenizer.

    Everything is checked against headers before a tensor is read, and memory before it is taken. The fields of
    LoadOptions may be given as keywords: `load(folder, device="cpu", quant="int8")`.

    Args:
        folder: a path, or a hub id (see `hub.locate`); default: the bundled model
        tokenizer: one of your own (encode, decode, bos_id, eos_id); default: the folder's
        kernels: the old spelling of execution, for one release: False is "eager", True is "kernels"
        deterministic: short for execution="bitwise"
        division: where several processes divide the model, this one's part; see `parallel.launch`
        options: see LoadOptions

    Raises:
        MistralError: a subclass that names what is wrong with the folder, the options or the memory.
    """
    options = _spelled_out(options, kernels, deterministic)
    found = read_folder(BUNDLED if folder is None else locate(folder), options.max_batch_size)
    own, about = tokenizer, list[str]()
    if own is None and not has_tokenizer(found.path):
        about = [NO_TOKENIZER]
    elif own is None:
        own = load_tokenizer(found.path, found.args.vocab_size)
        about = tokenizer_notes(found.path, own, found.args.vocab_size)
    known = (own.kind, own.version) if isinstance(own, Tokenizer) else (None, None)
    release, odd = identify(found.args, *known)
    found = windowed(found, options)
    model, run = assemble(found, division, options=options)
    spare = missing_tokens(found.args, own.n_ids, release) if isinstance(own, Tokenizer) else 0
    padded = (
        (f"the model has {counted(spare, 'id')} that the tokenizer has no token for, and so without text",)
        if spare
        else ()
    )
    notes = (*found.notes, *odd, *about, *padded, *_narrowed(found, run), *run.notes)
    files, parameters = found.weights.files, found.parameters
    draft = _put_draft(model, own, options)
    return Loaded(model, cast("Tokenizer", own), found.args, run, found.path, files, parameters, release, notes, draft)


def _put_draft(model: Transformer, tokenizer: TokenizerLike | None, options: LoadOptions) -> str:
    """Give a model what guesses its tokens, and say what that is; "" for nothing.

    Raises:
        OptionError: the smaller model has another vocabulary.
    """
    if options.draft is None:
        return ""
    from mistral.fast.draft import Costs, NgramDraft

    costs = Costs()
    if options.draft == "ngram":
        model.draft = lambda: NgramDraft(costs)
        return "n-grams"
    from mistral.fast.draft_model import ModelDraft

    execution = "auto" if options.execution == "bitwise" else options.execution
    same = ("device", "dtype", "cache_dtype", "threads")
    its = LoadOptions(execution=execution, **{name: getattr(options, name) for name in same})
    small = load(options.draft, options=its)
    if small.args.vocab_size != model.args.vocab_size or not _same_words(small.tokenizer, tokenizer):
        raise OptionError(
            f"{options.draft} cannot guess for this model: its vocabulary is another one "
            f"({small.args.vocab_size:,} ids against {model.args.vocab_size:,}, or other words)"
        )
    model.draft = lambda: ModelDraft(small.model, costs)
    return f"{short(small.folder)}, {small.parameters / 1e6:.1f} M parameters"


def _same_words(one: TokenizerLike | None, other: TokenizerLike | None) -> bool:
    """Whether two tokenizers mean the same by each id; where one is missing, nothing says that they do not."""
    if not isinstance(one, Tokenizer) or not isinstance(other, Tokenizer):
        return True
    return one.n_words == other.n_words and all(one.decode([i]) == other.decode([i]) for i in range(one.n_words))


def windowed(found: Folder, options: LoadOptions) -> Folder:
    """A folder with the window that the options ask for, if they do."""
    window = options.sliding_window
    return found if isinstance(window, str) else with_window(found, window)


def as_read(found: Folder, options: LoadOptions) -> Folder:
    """A folder with the window that the options ask for, and their adapter merged into what is read of it.

    Raises:
        OptionError: several adapters.
        AdapterError: an adapter that is broken, or belongs to another model.
    """
    merged = replace(options, adapter_mode="merge") if options.adapter else options
    return with_adapters(windowed(found, options), merged).folder


def _spelled_out(options: LoadOptions, kernels: bool | None, deterministic: bool) -> LoadOptions:
    """Options with what the two short spellings of an execution mean."""
    means = {"bitwise"} if deterministic else set()
    means |= set() if kernels is None else {"kernels" if kernels else "eager"}
    means |= set() if options.execution == "auto" else {options.execution}
    if len(means) > 1:
        raise OptionError(f"execution is given as {' and as '.join(sorted(means))}: give one of them")
    return replace(options, execution=means.pop()) if means else options


@flat(options=LoadOptions())
def assemble(found: Folder, division: Division | None = None, *, options: LoadOptions) -> tuple[Transformer, Runtime]:
    """The model that a folder holds, or this process's part of it, in memory, and how it runs; see `load`.

    Raises:
        MistralError: a subclass that names what is wrong with the options, the adapter or the memory.
    """
    import torch

    from mistral.fast.known import unknown_module
    from mistral.loader import runtime

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if division is not None:
        options = division.options(found, options)
    elif options.parallel > 1:
        those = "complete, interactive, demo, perplexity, serve and batch"
        raise OptionError(f"parallel {options.parallel} is for {those}: omit it")
    adapted = with_adapters(found, options)
    found = adapted.folder
    about = () if division is None else division.notes(found.args, options.quant)
    found = found if division is None else division.part(found)
    args = found.args
    (stored, _), *_ = Counter(t.dtype for n, t in found.tensors.items() if n.endswith(".weight")).most_common()
    rounded = None if options.quant == "none" else options.quant
    asked = found.quant and found.quant.removesuffix("-symmetric")  # what it would be called as an option
    if found.quant is not None and options.quant not in (None, asked):
        raise OptionError(f"the weights of {found.path} are already quantized to {found.quant}: omit quant")

    def resolve(stored: str) -> Runtime:
        run = runtime.resolve(
            replace(options, quant=rounded or asked),
            stored=getattr(torch, stored),
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
    run = reported(found, run, kept)
    _require_memory(found, run, kept)

    def build(run: Runtime) -> Transformer:
        # Where weights and arithmetic agree the model follows its weights, as `.to()` moves them.
        follows = run.weights == run.compute or (run.how.products and run.how.whole_steps)
        with torch.device("meta"):
            return run.how.transformer()(args, run.attend, None if follows else run.compute)

    model = build(run)
    beside = [f"{name.removesuffix('.weight')} (AdaptedLinear)" for name in adapted.changed]
    module = beside[0] if beside else unknown_module(model, mixtures=run.how.products)
    if division is not None:
        module = "layers.0.attention.wo (Summed)"
    if run.how.whole_steps and module is not None:
        run = run.standing_aside(module)
        model = build(run)
    if division is not None:
        division.shape(model)
    _fill(model, found, run, kept)
    model.kept_in = {run.compute: run.cache}
    if division is not None:
        division.connect(model)
    if beside:
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


def _is_narrower(dtype: torch.dtype, tensor: Stored) -> bool:
    """Whether a dtype rounds what a tensor's own has: the tensor is then wanted before it is rounded to its own."""
    import torch

    return torch.promote_types(getattr(torch, str(tensor.dtype)), dtype) != dtype


def _narrowed(found: Folder, run: Runtime) -> tuple[str, ...]:
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
    from tqdm import tqdm

    from mistral.fast import pages
    from mistral.fast.linear import use_kernels
    from mistral.quant import from_stored, put_quantized, quantize
    from mistral.quant.linear import QuantizedLinear

    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedLinear] = {}
    blocks: dict[str, nn.Module] = {}
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
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
