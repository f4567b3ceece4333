"""The transformer of Mistral 7B (arXiv 2310.06825): RMSNorm, Attention, FeedForward, Transformer.

Arithmetic on (tokens, plan, store). It knows nothing about files, options or sampling: `from_folder` and `save` hand
on to `mistral.load` and `mistral.save`. Module names are the names in Mistral's checkpoints. T is the number of packed
tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mistral  # the front door, which imports nothing until it is asked for something
from mistral.adapters import Adapters
from mistral.args import ModelArgs
from mistral.attention import Attend, sdpa, tiled
from mistral.cache import NoCache, RollingBufferCache
from mistral.linear import Linear
from mistral.moe import MixtureOfExperts
from mistral.parameters import EMBEDDINGS, OUTPUT
from mistral.plan import LayerStore, Plan
from mistral.rope import Rope, rotate
from mistral.util.arguments import require_kind, whole_numbers
from mistral.util.errors import UsageError, short_repr
from mistral.util.threads import Sharing

if TYPE_CHECKING:
    from mistral.request import Draft

__all__ = ["ModelArgs", "Transformer"]


def widen(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square in at least fp32 (arXiv 1910.07467): [..., dim] to the same."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Embedding(nn.Embedding):
    """A row of the weight for each token: [T] int64 ids to [T, dim], in the weight's dtype."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where drawing numbers would import a compiler, which takes a second
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        try:
            return super().forward(ids)
        except IndexError:  # only a CPU says so; asking a GPU would wait for it at every step
            raise outside_vocabulary(ids, self.num_embeddings) from None


def outside_vocabulary(ids: Tensor, size: int) -> UsageError:
    """The refusal of ids, on a CPU, of which some are not in a vocabulary of `size`."""
    wrong = ids[(ids < 0) | (ids >= size)].tolist()
    return UsageError(f"input_ids has the id {wrong[0]}, outside the vocabulary of {size}: ids are 0 to {size - 1}")


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions: [T, dim] to [T, dim], in x's dtype.

    Head counts are read from the weights' shapes; query head h uses key head h // (H // K). Which keys a token sees is
    the store's and the plan's business. q_scale [T, 1] multiplies rotated queries, and no key.
    """

    def __init__(self, args: ModelArgs, attend: Attend) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.attend = attend
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, plan: Plan, store: LayerStore, q_scale: Tensor | float = 1.0
    ) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q = rotate(q, cos * q_scale, sin * q_scale)
        out = self.attend(q, rotate(k, cos, sin), v, store, plan)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x); w1 is the gate, w3 up, w2 down. [T, dim] to [T, dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def feed_forward(args: ModelArgs) -> nn.Module:
    """That of a layer: one for all tokens, or a mixture of experts."""
    if args.moe is None:
        return FeedForward(args)
    return MixtureOfExperts(args, args.moe, [FeedForward(args) for _ in range(args.moe.num_experts)])


class TransformerBlock(nn.Module):
    """One layer: attention and feed-forward, each on the normalised residual stream. [T, dim] to [T, dim]."""

    def __init__(self, args: ModelArgs, attend: Attend) -> None:
        super().__init__()
        self.attention = Attention(args, attend)
        self.feed_forward: nn.Module = feed_forward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, plan: Plan, store: LayerStore, q_scale: Tensor | float = 1.0
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin, plan, store, q_scale)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """A Mistral model: packed token ids in, logits out.

    Args:
        args: the shape. Where it says tied, output.weight is tok_embeddings.weight, one parameter.
        attend: the attention backend; PyTorch SDPA in tiles unless one is given.
        compute_dtype: dtype of the activations; None follows the weights, also through `.to()`.

    Raises:
        UsageError: an argument of another type.

    Attributes:
        adapters: those beside its weights, if there are any; see `adapters.Adapters.of`.
        kept_in: what keys and values are kept in, by the dtype that is computed in; others keep their own.
        draft: makes what guesses tokens for an engine, so that it takes fewer steps; None: nothing does.
        rounds_prompts: whether products round their inputs where a plan names prompts; see `fast.prompt`.
    """

    adapters: Adapters | None = None
    draft: Callable[[], Draft] | None = None
    rounds_prompts = False

    def __init__(self, args: ModelArgs, attend: Attend | None = None, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        require_kind("args", args, ModelArgs)
        require_kind("attend", attend, Callable | None, "a function (see attention.Attend) or None")
        require_kind("compute_dtype", compute_dtype, torch.dtype | None, "a torch.dtype or None")
        self.args = args
        self.compute_dtype = compute_dtype
        self.kept_in: dict[torch.dtype, torch.dtype] = {}
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, attend or tiled(sdpa)) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)
        self._sharing = Sharing()
        self.rope = Rope(args)  # no module: it stays fp32 on the CPU wherever the weights go
        self._tie()

    @staticmethod
    def from_folder(
        folder: str | PathLike[str],
        max_batch_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str | None = None,
    ) -> Transformer:
        """The model of a folder; see `mistral.load`, which also gives its tokenizer."""
        found = mistral.load(folder, device=device, dtype=dtype, attention=attention, max_batch_size=max_batch_size)
        return found.model

    def _tie(self) -> None:
        if self.args.tied_embeddings and isinstance(self.tok_embeddings, Embedding):
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)
        self._tie()  # a move from the meta device makes a parameter for each name
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; a tied output has no entry of its own, or the embeddings'."""
        if self.args.tied_embeddings and (shared := state_dict.get(EMBEDDINGS)) is not None:
            if not torch.equal(state_dict.get(OUTPUT, shared), shared):
                raise UsageError("the output is tied to the embeddings, but the weights hold another output matrix")
            state_dict = {**state_dict, OUTPUT: shared}
        found = super().load_state_dict(state_dict, strict, assign)
        self._tie()
        return found

    def save(self, folder: str | PathLike[str]) -> None:
        """Write shape and weights into a new folder that loads with the same bits; see `mistral.save`."""
        mistral.save(self, folder)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.compute_dtype or self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.norm.weight.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of keys and values in the caches that it makes."""
        return self.kept_in.get(self.dtype, self.dtype)

    def make_cache(self, rows: int, positions: int = 0, args: ModelArgs | None = None) -> RollingBufferCache:
        """A cache for `rows` sequences of this model, on its device and in its `cache_dtype`.

        Args:
            positions: that each is expected to reach; see `RollingBufferCache`.
            args: of a model that differs in its windows; None: this one's.
        """
        return RollingBufferCache(
            args or self.args, rows, device=self.device, dtype=self.cache_dtype, positions=positions
        )

    def cache_bytes(self, positions: int) -> int:
        """Bytes of keys and values of one sequence of `positions` in such a cache."""
        return self.args.cache_bytes(positions, str(self.cache_dtype).removeprefix("torch."))

    def share_cores(self) -> AbstractContextManager[None]:
        """Around a step and what is chosen from it: on a CPU, fewer threads where other programs need cores."""
        return self._sharing() if self.device.type == "cpu" else nullcontext()

    def step(self, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
        """All layers: [T] ids to [T, dim], normalised, in the compute dtype. Whoever made the plan commits it."""
        cos, sin, q_scale = (x.to(self.device) for x in self.rope.angles(plan.positions))
        h = self.tok_embeddings(input_ids).to(self.dtype)
        for i, layer in enumerate(self.layers):
            with self.share_cores():
                h = layer(h, cos, sin, plan, cache.layer(i), q_scale)
        return self.norm(h)

    def forward_partial(
        self, input_ids: Tensor, seqlens: Sequence[int], cache: RollingBufferCache | None = None
    ) -> Tensor:
        """Hidden states before the output matrix: [T, dim] in the compute dtype.

        Args:
            input_ids: [T] the sequences' new tokens, packed one after the other, int64 or int32, on the model's device.
            seqlens: new tokens of each sequence; sums to T. With a cache, 0 is allowed.
            cache: holds what came before; its windows are those that count. None: each sequence stands alone, causal
                and windowed.

        Raises:
            UsageError: the lengths and ids do not fit together, or an id is outside the vocabulary. That is found on a
                CPU alone: to ask a GPU would be to wait for it at every step.
            CacheError: the cache is of another shape or device, or lacks rows.
        """
        seqlens = whole_numbers("seqlens", seqlens)
        self._check(input_ids, seqlens, cache)
        keys = NoCache(self.args, self.device) if cache is None else cache
        plan = keys.plan(seqlens)
        h = self.step(input_ids.to(torch.int64), plan, keys)
        keys.commit(plan)
        return h

    def forward(self, input_ids: Tensor, seqlens: Sequence[int], cache: RollingBufferCache | None = None) -> Tensor:
        """Logits of every token: [T, vocab_size] in at least fp32. See `forward_partial`."""
        return self.logits(self.forward_partial(input_ids, seqlens, cache))

    def logits(self, h: Tensor) -> Tensor:
        """[n, dim] hidden states to [n, vocab_size]: the product in the compute dtype, widened after."""
        with self.share_cores():
            return widen(self.output(h))

    def _check(self, input_ids: Tensor, seqlens: list[int], cache: RollingBufferCache | None) -> None:
        device = self.device
        require_kind("input_ids", input_ids, Tensor, "a tensor: torch.tensor(ids)")
        if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.layout != torch.strided:
            what = f"{input_ids.layout} {input_ids.dtype}"
            raise UsageError(f"input_ids is of {what}; it must be dense and of torch.int64: ids are whole numbers")
        if input_ids.device != device:
            raise UsageError(f"input_ids is on {input_ids.device}, and the model on {device}: ids.to(model.device)")
        if input_ids.dim() != 1 or sum(seqlens) != len(input_ids):
            raise UsageError(
                f"seqlens sum to {sum(seqlens)}, but input_ids has shape {tuple(input_ids.shape)}: "
                "pack the sequences one after the other into one dimension"
            )
        if any(n < 0 for n in seqlens):
            raise UsageError(f"negative sequence length in {short_repr(seqlens)}: give 0 or more for each sequence")
        if self.args.max_batch_size and len(seqlens) > self.args.max_batch_size:
            raise UsageError(f"{len(seqlens)} sequences, but max_batch_size is {self.args.max_batch_size}: give fewer")
        if cache is not None:
            require_kind("cache", cache, RollingBufferCache, "a RollingBufferCache: model.make_cache(rows)")
            cache.check_shape(self.args, device)
