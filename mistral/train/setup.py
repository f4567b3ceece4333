"""What a run works with: the base model as it will be trained, its tokenizer and template, samples, what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.chat.templates import Template, assumed, find_template
from mistral.fast.layout import bytes_of
from mistral.formats.adapter import read_adapter
from mistral.formats.adapter_words import more_words, own_words, unused_of
from mistral.formats.folder import BUNDLED, Folder, read_folder, short
from mistral.formats.gguf import multiplied_as_they_are
from mistral.formats.hub import locate
from mistral.formats.merge import updates
from mistral.formats.releases import identify
from mistral.formats.tokenizers import load_tokenizer
from mistral.formats.widen import TABLES, widened
from mistral.formats.words import words_of
from mistral.loader.assemble import assemble
from mistral.loader.blocks import blocks_bytes
from mistral.loader.load import windowed
from mistral.loader.options import LoadOptions, OptionError, adapter_names
from mistral.loader.runtime import WIDEN_SHARE, own_gpu, pick_device
from mistral.model import Attention, Transformer
from mistral.parameters import EMBEDDINGS, parameters
from mistral.quant.linear import QuantizedLinear
from mistral.tokenizer import Tokenizer, outside
from mistral.train import needs
from mistral.train.attention import shared_masks
from mistral.train.conversations import Marked, Spelt, Turn, mark_text, mark_turns
from mistral.train.data import DataError, NoTemplate, Samples, read_samples
from mistral.train.lora import freeze, fresh, put_lora
from mistral.train.options import TrainOptions
from mistral.train.recompute import recompute
from mistral.util import memory
from mistral.util.dtypes import DTYPE_NAMES
from mistral.util.errors import MistralError

FP32 = 4  # bytes
Pairs = dict[str, tuple[Tensor, Tensor]]  # A and B, by the name of the weight that they change


@dataclass
class Setup:
    """What a run works with; everything is read when it is first asked for.

    Args:
        folder: as in `load`.
        options, load: how it is trained, and how it is loaded.
        say: called with what was read and decided, a line each.
        notes: what was assumed, cut or rounded, a sentence each; grows.
    """

    folder: str | PathLike[str] | None
    options: TrainOptions
    load: LoadOptions
    say: Callable[[str], None] = lambda line: None
    notes: list[str] = field(default_factory=list)
    noted: set[str] = field(default_factory=set)  # what `note` has said

    def note(self, text: str) -> None:
        """Say a note at once, if it has not been said."""
        if text not in self.noted:
            self.noted.add(text)
            self.say(f"note: {text}")

    @cached_property
    def found(self) -> Folder:
        """The model's folder, as it is."""
        return read_folder(BUNDLED if self.folder is None else locate(self.folder))

    @cached_property
    def base(self) -> Folder:
        """The same with the window and theta that were asked for.

        Raises:
            OptionError: an adapter to begin with that has more words, or words of its own.
        """
        self._check_words()
        found, theta = windowed(self.found, self.load), self.options.rope_theta
        if theta is None:
            return found
        args = replace(found.args, rope_theta=theta, theta_rule="as requested")
        note = f"rope_theta {theta:g}: as requested, in the place of {found.args.rope_theta:g}"
        return replace(found, args=args, notes=(*found.notes, note))

    def _check_words(self) -> None:
        if self.adapter is None:
            return
        adapter, args = read_adapter(self.adapter), self.found.args
        words, _ = own_words(adapter, self.found.path, args)
        loose = args.tied_embeddings and not (adapter.whole.keys() | adapter.pairs.keys()).isdisjoint(TABLES)
        added = words is not None and bool(more_words(words, self.found.path))
        if loose or added or widened(adapter, args) != args:
            raise OptionError(
                f"{self.adapter} has words or tables of its own, and training goes on with the base's: merge it first "
                f"(convert {self.base_name} MERGED --to hf --adapter {self.adapter}), and train that"
            )
        for note in unused_of(adapter.path, self.found.path):
            self.note(note)

    @property
    def base_name(self) -> str:
        """The model as it was given, or where it is."""
        return str(short(self.found.path) if self.folder is None else self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        found, notes = words_of(self.base.path, self.base.args)
        for note in notes if found is not None else ():
            self.note(note)
        return found or load_tokenizer(self.base.path, self.base.args.vocab_size)  # which says what is missing

    @cached_property
    def template(self) -> Template:
        release, _ = identify(self.base.args, self.tokenizer.kind, self.tokenizer.version)
        name = None if release is None else release.template
        found = find_template(self.tokenizer, name=self.options.template, release=name, folder=self.base.path)
        self.say(f"template {found.name}" + ("" if found.source == found.name else f", by {found.source}"))
        if note := assumed(found, self.tokenizer):
            self.note(note)
        return found

    @cached_property
    def device(self) -> torch.device:
        device = pick_device(self.load.device)
        alone = device.type != "cuda" or self.load.parallel == 1
        return device if alone else own_gpu()

    def samples(self, path: Path) -> Samples:
        """The samples of a file; see `data.read_samples`.

        Raises:
            TokenizerError: the model has no tokenizer, or a broken one.
        """
        tokenizer = self.tokenizer  # what is wrong with it is no line's fault
        spelt = Spelt(tokenizer)

        def known(marked: Marked) -> Marked:
            if (what := outside(marked.ids, tokenizer, self.base.args.vocab_size)) is not None:
                raise DataError(f"it has {what}: the model has no weights for that token")
            return marked

        def text(prompt: str, value: str) -> Marked:
            spelt.look(prompt, value)
            return known(mark_text(tokenizer, prompt, value))

        def turns(value: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> Marked:
            try:
                template = self.template
            except MistralError as error:
                raise NoTemplate(str(error)) from None
            spelt.look(*(turn.content for turn in value))
            return known(mark_turns(template, value, tools, tokenizer.eos_ids))

        found = read_samples(path, text, turns, self.options.seq_len)
        found.notes += [f"{path}: {note}" for note in spelt.notes()]
        return found

    def check_options(self) -> None:
        """Refuse options that cannot be meant together, before anything is read.

        Raises:
            OptionError: it names them.
        """
        load, full = self.load, self.options.full
        if load.execution not in ("auto", "eager"):
            raise OptionError(f"execution {load.execution} computes no gradients: omit --execution")
        if load.attention not in (None, "auto", "sdpa"):
            raise OptionError(f"attention {load.attention} is not for training, which uses sdpa: omit --attention")
        if load.cache_dtype not in (None, "auto"):
            raise OptionError(f"cache_dtype {load.cache_dtype} is of a cache, and training has none: omit cache_dtype")
        if load.dtype is not None and DTYPE_NAMES.get(load.dtype) == "float16":
            raise OptionError("float16 needs a loss that is scaled, which is not supported: use --dtype bfloat16")
        if full and load.quant not in (None, "none"):
            raise OptionError("quantized weights cannot be trained: omit --quant, or --full for an adapter beside them")
        if full and self.found.quant is not None:
            raise OptionError(
                f"the weights of {self.found.path} are quantized to {self.found.quant} and cannot be trained: omit "
                "--full for an adapter beside them"
            )

    # --- what is trained

    @cached_property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights; or of the matrices that get an adapter.

        Raises:
            OptionError: matrices that have none here.
        """
        known = parameters(self.base.args)
        if self.options.full:
            return {name: parameter.shape for name, parameter in known.items()}
        targets = self.options.targets
        if self.base.args.moe is not None:
            targets = tuple(target for target in targets if target in ("wq", "wk", "wv", "wo"))
            if self.options.lora_targets is not None and targets != self.options.targets:
                raise OptionError("experts get no adapters here: use --lora_targets wq,wk,wv,wo")
        return {n: p.shape for n, p in known.items() if p.role == "matrix" and n.split(".")[-2] in targets}

    @cached_property
    def start(self) -> tuple[Pairs, float]:
        """A and B to begin with, and what their product is multiplied by.

        Raises:
            OptionError, AdapterError: an adapter that cannot be trained, or is of another model.
        """
        options = self.options
        if self.adapter is None:
            return fresh(self.trained, options.rank, options.seed), options.scale
        found = read_adapter(self.adapter)
        ranks = {pair.rank for pair in found.pairs.values()}
        scales = {pair.scale for pair in found.pairs.values()}
        if found.dora or len(ranks) > 1 or len(scales) > 1:
            raise OptionError(f"{self.adapter} has DoRA, or several ranks or scales, which is not trained here")
        if found.replaces:
            raise OptionError(f"{self.adapter} has {found.replaces} of its own, which is not trained here")
        if EMBEDDINGS in found.pairs:
            raise OptionError(f"{self.adapter} has a LoRA of embed_tokens, which is not trained here: merge it first")
        if options.lora not in (None, *ranks) or options.lora_targets or options.lora_alpha:
            raise OptionError(
                f"{self.adapter} is a {found.describe()}, and training goes on with the same: omit --lora, "
                "--lora_alpha and --lora_targets"
            )
        start = {name: (u.a().float(), u.b().float()) for name, u in updates(found, self.base.args).items()}
        return start, scales.pop()

    @property
    def adapter(self) -> str | None:
        """The adapter to go on from."""
        places = list(adapter_names(self.load.adapter).values())
        if len(places) > 1:
            raise OptionError(f"training goes on from one adapter, and {len(places)} are given")
        return str(places[0]) if places else None

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        if self.options.full:
            return self.base.parameters
        return sum(a.numel() + b.numel() for a, b in self.start[0].values())

    @property
    def rank(self) -> int:
        """Of the adapter; 0 where all weights are trained."""
        return 0 if self.options.full else next(iter(self.start[0].values()))[0].shape[0]

    # --- what it needs, and the model

    def needed(self, tokens: int) -> dict[str, int]:
        """Bytes of memory by what they are for, with a largest forward of so many tokens; see `needs.memory_parts`."""
        half = DTYPE_NAMES.get(self.load.dtype or "") == "bfloat16"
        return needs.memory_parts(
            self.base.args,
            self.options,
            weights=self._weights_in_memory(2 if half else 4),
            trained=self.count,
            tokens=tokens,
            itemsize=2 if half else 4,
        )

    @property
    def blocks(self) -> dict[str, str]:
        """Weights of a GGUF file that an adapter is trained beside as they are: blocks of few bits, by the kernels."""
        wide = DTYPE_NAMES.get(self.load.dtype or "auto") in (None, "float32")
        if self.options.full or self.load.quant is not None or self.device.type != "cpu" or not wide:
            return {}
        return multiplied_as_they_are(self.base.weights, self.base.args)

    def _weights_in_memory(self, itemsize: int) -> int:
        """Bytes of the model's weights, as the loader keeps them for an arithmetic of so many bytes a number."""
        if kept := self.blocks:
            by_name = parameters(self.base.args)
            rest = sum(FP32 * p.numel for name, p in by_name.items() if name not in kept)
            return rest + sum(blocks_bytes(by_name[name], kind) for name, kind in kept.items())
        known = parameters(self.base.args).values()
        quant = self.load.quant or self.base.quant
        if quant not in (None, "none"):
            return sum(bytes_of(p, quant, 4) for p in known)
        wide = self.base.parameters * (4 if self.options.full else itemsize)
        stored = sum(t.nbytes for t in self.base.tensors.values())
        left = memory.available(self.device)
        return min(wide, stored) if left is not None and not self.options.full and wide > WIDEN_SHARE * left else wide

    def model(self) -> tuple[Transformer, dict[str, Tensor]]:
        """The model with what is trained in place, and that by name, in fp32."""
        full = self.options.full
        # With attention by name "auto" takes the kernels for products alone: those of blocks, which have no others.
        execution = "auto" if self.blocks and self.load.execution == "auto" else "eager"
        wanted = replace(self.load, execution=execution, attention="sdpa", device=str(self.device), parallel=1)
        asked = None if wanted.dtype in (None, "auto") else DTYPE_NAMES[wanted.dtype or ""]
        if full:  # weights are trained in fp32, whatever the arithmetic
            wanted = replace(wanted, dtype="float32")
            usual = "bfloat16" if self.device.type != "cpu" else "float32"
        else:
            wanted = replace(wanted, adapter=())
        model, run = assemble(self.base, options=wanted)
        self.notes += run.notes
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = shared_masks
        if full:
            if any(isinstance(module, QuantizedLinear) for module in model.modules()):
                raise OptionError(
                    "weights that stay quantized in memory cannot be trained: use --quant none, or omit --full"
                )
            model.requires_grad_(True)
            compute = getattr(torch, asked or usual)
            model.compute_dtype = None if compute == torch.float32 else compute
            weights: dict[str, Tensor] = dict(model.named_parameters())
            what = "all weights"
        else:
            start, scale = self.start
            freeze(model)
            weights = dict(put_lora(model, start, scale, self.options.lora_dropout))
            what = f"LoRA of rank {self.rank}, scale {scale:g}"
        arithmetic = str(model.dtype).removeprefix("torch.")
        held = run.quant or " and ".join(run.blocks) or str(run.weights).removeprefix("torch.")
        self.say(
            f"training {what}: {self.count / 1e6:.2f} M numbers; device {run.device}; weights {held}, arithmetic "
            f"{arithmetic}, what is trained float32"
        )
        recompute(model, self.options.recompute, bool(self.options.lora_dropout))
        return model, weights
