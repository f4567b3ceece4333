"""Ways of running a model, all a layer at a time: ours in every variant, one_file_ref's, transformers'.

A stream takes all prompts through layer i before it is given layer i + 1. Layer i of a later chunk wants layer i - 1
of that chunk and what earlier chunks left in layer i's cache, and nothing else: so the order changes no number, and the
memory is that of one layer. Knows nothing about what is right.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.attention import Attend
from mistral.cache import NoCache, RollingBufferCache
from mistral.formats import huggingface as hf
from mistral.formats.config_parts import rope_parameters
from mistral.linear import Linear
from mistral.model import RMSNorm, TransformerBlock, widen
from mistral.oracle.truth import Weights
from mistral.plan import Plan
from mistral.rope import Angles, Rope

Schedule = Sequence[Sequence[int]]  # for each step, the tokens that each prompt contributes


class LayerwiseRunner(Protocol):
    """Prompts on their way through a model. Rows are prompt after prompt, position after position."""

    def embed(self, weight: Tensor) -> None:
        """[V, dim] embeddings: where the prompts begin."""

    def layer(self, i: int, weights: Weights) -> None:
        """Layer i, by its weights under the names they have in a layer."""

    def head(self, norm: Tensor, output: Tensor, rows: int) -> Iterator[Tensor]:
        """Logits [at most `rows`, V], block after block."""


def whole(lens: Sequence[int]) -> Schedule:
    """Each prompt alone and at once."""
    return [[n if row == turn else 0 for row, n in enumerate(lens)] for turn in range(len(lens))]


def batched(lens: Sequence[int]) -> Schedule:
    """All prompts at once."""
    return [list(lens)]


def chunked(lens: Sequence[int], chunk: int) -> Schedule:
    """All prompts, `chunk` tokens of each at a step."""
    return [[max(0, min(chunk, n - done)) for n in lens] for done in range(0, max(lens), chunk)]


def stepwise(lens: Sequence[int]) -> Schedule:
    """The first half of each prompt at once, then a token of each at a step."""
    halves = [n // 2 for n in lens]
    return [halves, *chunked([n - half for n, half in zip(lens, halves, strict=True)], 1)]


class LibraryRunner:
    """The library's own blocks and caches.

    Args:
        args, prompts: the shape, and [n] ids of each prompt.
        schedule: which tokens come together.
        attend: the attention backend.
        weights, compute: dtypes. Weights are cast to `weights`, which may be narrower than the arithmetic.
        cached: whether steps go on from one another; without a cache each is a forward of its own.
        device: where.
        kernels: whether products of few rows are those of `fast`.
        cache: dtype of keys and values; None: that of the arithmetic.
    """

    def __init__(
        self,
        args: ModelArgs,
        prompts: Sequence[Tensor],
        schedule: Schedule,
        attend: Attend,
        *,
        weights: torch.dtype,
        compute: torch.dtype,
        cached: bool,
        device: torch.device | str = "cpu",
        kernels: bool = False,
        cache: torch.dtype | None = None,
    ) -> None:
        self.args = args
        self.prompts = prompts
        self.schedule = [list(step) for step in schedule if any(step)]
        self._attend, self._cached, self._kernels = attend, cached, kernels
        self._weights, self._compute, self._device = weights, compute, torch.device(device)
        self._cache = cache or compute
        self._longest = max(len(p) for p in prompts)
        self._h: list[Tensor] = []
        rope = Rope(args)
        done = [0] * len(prompts)
        self._rows: list[Tensor] = []  # of each step's tokens, in the order of the whole
        self._angles: list[Angles] = []
        begins = [sum(len(p) for p in prompts[:row]) for row in range(len(prompts))]
        for step in self.schedule:
            positions = torch.cat([torch.arange(d, d + n) for d, n in zip(done, step, strict=True)])
            rows = [torch.arange(b + d, b + d + n) for b, d, n in zip(begins, done, step, strict=True)]
            self._rows.append(torch.cat(rows))
            cos, sin, q_scale = (x.to(self._device) for x in rope.angles(positions))
            self._angles.append((cos, sin, q_scale))
            done = [d + n for d, n in zip(done, step, strict=True)]

    def embed(self, weight: Tensor) -> None:
        h = self._cast(weight[torch.cat(list(self.prompts))]).to(self._compute)
        self._h = [h[rows.to(self._device)] for rows in self._rows]

    @torch.inference_mode()
    def layer(self, i: int, weights: Weights) -> None:
        args = dataclasses.replace(self.args, n_layers=1, sliding_window=self.args.windows[i])
        with torch.device("meta"):
            block = TransformerBlock(args, self._attend)
        block.load_state_dict({name: self._cast(w) for name, w in weights.items()}, assign=True)
        if self._kernels:
            from mistral.fast import linear

            linear.use_kernels(block)
        cache = RollingBufferCache(
            args, len(self.prompts), device=self._device, dtype=self._cache, positions=self._longest
        )
        for j, step in enumerate(self.schedule):
            keys: RollingBufferCache | NoCache = cache if self._cached else NoCache(args, self._device)
            plan = keys.plan(step)
            self._h[j] = self._step(block, self._h[j], self._angles[j], plan, keys)
            keys.commit(plan)

    def _step(
        self,
        block: TransformerBlock,
        h: Tensor,
        angles: Angles,
        plan: Plan,
        keys: RollingBufferCache | NoCache,
    ) -> Tensor:
        cos, sin, q_scale = angles
        return block(h, cos, sin, plan, keys.layer(0), q_scale)

    @torch.inference_mode()
    def head(self, norm: Tensor, output: Tensor, rows: int) -> Iterator[Tensor]:
        order = torch.cat(self._rows).argsort().to(self._device)
        h = torch.cat(self._h)[order]
        with torch.device("meta"):
            last, product = RMSNorm(self.args.dim, self.args.norm_eps), Linear(*reversed(output.shape))
        last.load_state_dict({"weight": self._cast(norm)}, assign=True)
        product.load_state_dict({"weight": self._cast(output)}, assign=True)
        for block in h.split(rows):
            yield widen(product(last(block))).cpu()

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, self._weights)


class DecodeRunner(LibraryRunner):
    """`LibraryRunner` with kernels, whose steps of one token a prompt are whole layers in one call of theirs."""

    def _step(
        self,
        block: TransformerBlock,
        h: Tensor,
        angles: Angles,
        plan: Plan,
        keys: RollingBufferCache | NoCache,
    ) -> Tensor:
        from mistral.fast.decode import FastTransformer, widen_stores

        if max(plan.seqlens) > 1:
            return super()._step(block, h, angles, plan, keys)
        assert isinstance(keys, RollingBufferCache)
        args = dataclasses.replace(self.args, n_layers=1, sliding_window=keys.layer(0).window)
        with torch.device("meta"):
            alone = FastTransformer(args)
        alone.layers[0] = block
        alone.norm.weight = block.ffn_norm.weight  # any: what comes out is not normalised
        rows = [row for row, n in enumerate(plan.seqlens) if n]
        while True:
            # A kind of model that the kernels leave to the plain path; asked first, because `described` logs why.
            if alone.stands_aside() is not None or (described := alone.described(keys)) is None:
                return super()._step(block, h, angles, plan, keys)
            described.norm = None
            out = h.clone()
            alone.decode(described, out, rows, plan.positions, [plan.origins[row] for row in rows], angles)
            if not described.overflows:
                return out
            widen_stores(described, keys)


def one_file_ref() -> ModuleType | None:
    """The one-file reference, where the repository's root is available; installed packages have none."""
    if "one_file_ref" in sys.modules:
        return sys.modules["one_file_ref"]
    path = Path(__file__).resolve().parents[2] / "one_file_ref.py"
    spec = importlib.util.spec_from_file_location("one_file_ref", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


class OneFileRunner:
    """one_file_ref.py's blocks: all prompts in one forward, with its cache."""

    def __init__(self, module: ModuleType, args: ModelArgs, prompts: Sequence[Tensor], compute: torch.dtype) -> None:
        self.args, self.module, self._compute = args, module, compute
        self.lens = [len(p) for p in prompts]
        self.ids = torch.cat(list(prompts))
        self._h = torch.empty(0)
        positions = torch.cat([torch.arange(n) for n in self.lens])
        self._where = [*module.rope_angles(positions, self._args(None)), positions]

    def _args(self, window: int | None) -> Any:
        return self.module.ModelArgs(**{**self.args.to_params(), "n_layers": 1, "sliding_window": window})

    def embed(self, weight: Tensor) -> None:
        self._h = weight[self.ids].to(self._compute)

    @torch.inference_mode()
    def layer(self, i: int, weights: Weights) -> None:
        args = self._args(self.args.windows[i])
        with torch.device("meta"):
            block = self.module.TransformerBlock(args, 0)
        block.load_state_dict({name: w.to(self._compute) for name, w in weights.items()}, assign=True)
        cache = self.module.Cache(args, len(self.lens), max(self.lens), dtype=self._compute)
        self._h = block(self._h, self._where, self.lens, cache)

    @torch.inference_mode()
    def head(self, norm: Tensor, output: Tensor, rows: int) -> Iterator[Tensor]:
        with torch.device("meta"):
            last = self.module.RMSNorm(self.args.dim, self.args.norm_eps)
        last.load_state_dict({"weight": norm.to(self._compute)}, assign=True)
        wide = output.to(self._compute)
        for block in self._h.split(rows):
            yield self.module.wide(torch.nn.functional.linear(last(block), wide))


def their_config(args: ModelArgs, **more: Any) -> Any:
    """transformers' config of a shape with one window for all layers; `more` is what else it takes."""
    import transformers

    kind = transformers.MistralConfig if args.llama_4_scaling is None else transformers.Ministral3Config
    return kind(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        sliding_window=args.windows[0],
        rope_parameters=rope_parameters(args),
        **more,
    )


class TransformersRunner:
    """transformers' MistralModel of one layer at a time: each prompt alone, without a cache."""

    def __init__(self, args: ModelArgs, prompts: Sequence[Tensor], compute: torch.dtype) -> None:
        self.args, self._compute = args, compute
        self.prompts = prompts
        self._h: list[Tensor] = []

    def _model(self, window: int | None) -> Any:
        import transformers

        config = their_config(
            dataclasses.replace(self.args, n_layers=1, vocab_size=1, sliding_window=window),
            attn_implementation="eager",  # attention spelled out, with the mask added to the scores
            max_position_embeddings=1 << 20,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device("meta"):  # nothing is drawn that is replaced anyway
            scaled = self.args.llama_4_scaling is not None
            model = (transformers.Ministral3Model if scaled else transformers.MistralModel)(config)
        model.rotary_emb = type(model.rotary_emb)(config=config)
        return model.eval()

    def embed(self, weight: Tensor) -> None:
        self._h = [weight[p].to(self._compute) for p in self.prompts]

    @torch.inference_mode()
    def layer(self, i: int, weights: Weights) -> None:
        model = self._model(self.args.windows[i])
        state = {}
        for name, weight in weights.items():
            heads = hf.heads_of(f"layers.0.{name}", self.args)
            theirs = hf.to_hf(f"layers.0.{name}").removeprefix("model.layers.0.")
            state[theirs] = (weight if heads is None else hf.rows_to_hf(weight, heads)).to(self._compute)
        model.layers[0].load_state_dict(state, assign=True)
        model.norm = torch.nn.Identity()
        self._h = [model(inputs_embeds=h[None], use_cache=False).last_hidden_state[0] for h in self._h]

    @torch.inference_mode()
    def head(self, norm: Tensor, output: Tensor, rows: int) -> Iterator[Tensor]:
        last = self._model(None).norm
        last.load_state_dict({"weight": norm.to(self._compute)}, assign=True)
        wide = output.to(self._compute)
        for block in torch.cat(self._h).split(rows):
            yield widen(torch.nn.functional.linear(last(block), wide))
