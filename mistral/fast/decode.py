"""A decode step in one call: a few tokens, one of each sequence or several that were guessed, and all layers.

Steps that have more, or run elsewhere than on a CPU in fp32, take the way of the plain Transformer.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mistral.buffers import HalfBuffer, Int8Buffer, RollingBuffer
from mistral.cache import NoCache, RollingBufferCache
from mistral.fast import prompt
from mistral.fast.kernels import INT8, KINDS, Expert, Layer, Matrix, Model, library, pointer
from mistral.fast.known import report, unknown_module
from mistral.fast.linear import FEW, HasMatrix, few, product, room_for_inputs
from mistral.fast.threads import Threads
from mistral.model import Transformer, widen
from mistral.moe import MixtureOfExperts
from mistral.plan import Plan
from mistral.rope import Angles

CACHE_KINDS = KINDS | {torch.int8: INT8}  # dtypes of keys and values that the kernels read, as they number them
# Of a layer, by their paths in it; the last part is the field of `Layer`.
PRODUCTS = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)


@dataclass(frozen=True)
class Description:
    """A model and a cache as the kernels have them, and what was where when this was made.

    Args:
        model: what the kernels are given.
        places: the dictionaries of the modules in which there are modules and tensors.
        stores: the cache's, of each layer.
        found, ids: all that was in both; kept, so that nothing else has their ids.
        tensors, where: the modules' among them, and where and how their numbers lay (the stores do not move).
        hooks: those of the modules, which only the plain way calls.
        wide, narrow: norms that were widened, and what they were widened from; they may be changed in place.
    """

    model: Model
    places: list[dict[str, Any]]
    stores: list[RollingBuffer]
    found: list[object]
    ids: list[int]
    tensors: list[Tensor]
    where: list[list[object]]
    hooks: list[dict[int, Any]]
    wide: list[Tensor]
    narrow: list[Tensor]

    def holds(self) -> bool:
        """Whether all is where it was. There are a thousand things to look at in each step: no loop of Python's."""
        same = [*map(id, _found(self.places, self.stores))] == self.ids
        return same and _where(self.tensors) == self.where and not any(self.hooks)


def _found(places: list[dict[str, Any]], stores: list[RollingBuffer]) -> list[object]:
    keys: list[object] = [x for store in stores for x in store.storage]
    return [*keys, *chain.from_iterable(map(dict.values, places))]


def _where(tensors: list[Tensor]) -> list[list[object]]:
    # No shapes: a thousand new tuples in each step wake the garbage collector. These say as much of a matrix.
    looks = Tensor.data_ptr, attrgetter("dtype"), Tensor.numel, Tensor.is_contiguous
    return [*([*map(look, tensors)] for look in looks), [*map(Tensor.size, tensors, repeat(0))]]


# By model and cache, for as long as there are both. Looking whether one holds takes a tenth of the time of making it.
_descriptions: WeakKeyDictionary[nn.Module, WeakKeyDictionary[RollingBufferCache, Description]] = WeakKeyDictionary()


class FastTransformer(Transformer):
    """`Transformer` whose decode steps are one call of the kernels, and other steps a few for each layer."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._threads: dict[int, Threads] = {}  # by the tokens of a step

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations: at least fp32, also where the weights are narrower."""
        return torch.promote_types(self.norm.weight.dtype, torch.float32)

    def step(self, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
        prompts = self.rounds_prompts and any(plan.seqlens[row] for row in plan.prompts)
        if prompts or not isinstance(cache, RollingBufferCache) or not self._is_for_kernels(plan, cache):
            if len(input_ids) and prompt.takes(self):
                return prompt.step(self, input_ids, plan, cache, self.rounds_prompts)
            return super().step(input_ids, plan, cache)
        model = self.described(cache)
        if model is None:
            return super().step(input_ids, plan, cache)
        with self.share_cores():
            return self._in_one_call(model, input_ids, plan, cache)

    def _in_one_call(self, model: Model, input_ids: Tensor, plan: Plan, cache: RollingBufferCache) -> Tensor:
        """A step by `decode`; made again where a key or value does not fit the cache, in one that is wider."""
        rows = [row for row, n in enumerate(plan.seqlens) for _ in range(n)]
        angles = self.rope.angles(plan.positions)
        for i in range(len(self.layers)):
            cache.layer(i).written = True
        origins = [plan.origins[row] for row in rows]
        while True:
            h = self.tok_embeddings(input_ids).to(torch.float32).contiguous()
            self.decode(model, h, rows, plan.positions, origins, angles)
            if not model.overflows:
                return h
            widen_stores(model, cache)
            model = cast("Model", self.described(cache))

    def _is_for_kernels(self, plan: Plan, cache: RollingBufferCache) -> bool:
        return (
            not torch.is_grad_enabled()
            and 0 < sum(plan.seqlens) <= FEW
            and max(plan.seqlens) <= min(store.block for store in cache.layers)
            and self.device.type == "cpu"
            and self.dtype == torch.float32
            and cache.layer(0).k.dtype in CACHE_KINDS
        )

    def decode(
        self, model: Model, h: Tensor, rows: list[int], positions: Tensor, origins: list[int], angles: Angles
    ) -> None:
        """Take tokens through all layers, in place; their keys go into the cache that `model` describes.

        Args:
            model: what `described` said; where its norm is None, the last norm is left out. Where it `overflows`
                afterwards, a key or value does not fit the cache, and the step is to be done again: see `widen_stores`.
            h: [n, dim] embeddings; becomes normalised hidden states.
            rows: the row of the cache that each token has, any number of times.
            positions, origins: where each is, [n] int64, and where its sequence began.
            angles: of the positions.
        """
        args = self.args
        which, begins = torch.tensor(rows), torch.tensor(origins)
        seen = int((positions - begins).max()) + 1
        if None not in args.windows:
            seen = min(seen, max(w for w in args.windows if w is not None))
        most = len(rows) * (1 + model.chosen)  # inputs of layers, and of each token's experts
        rounded = room_for_inputs(most, max(args.dim, args.hidden_dim, args.n_heads * args.head_dim))
        with self._count(len(rows)) as chosen:
            count, keys, threads = (ctypes.c_int64(n) for n in (len(rows), seen, chosen))
            scratch = torch.empty(library().scratch_floats(ctypes.byref(model), count, keys, threads))
            cos, sin, q_scale = angles
            query = (cos, sin) if self.rope.query_scaling is None else (cos * q_scale, sin * q_scale)
            given = (pointer(x) for x in (which, positions, begins, cos, sin, *query))
            used = (pointer(x) for x in (h, scratch, rounded))
            library().decode(ctypes.byref(model), count, *given, keys, *used, threads)

    def logits(self, h: Tensor) -> Tensor:
        matrix = self.output.matrix() if isinstance(self.output, HasMatrix) and few(h) else None
        if matrix is None:
            return super().logits(h)
        most = torch.get_num_threads()
        return widen(product(matrix, h, most if self._sharing.few else self.threads_for(len(h)).pick(most)))

    def _count(self, rows: int) -> AbstractContextManager[int]:
        """Around a step of so many tokens: its number of threads."""
        return nullcontext(torch.get_num_threads()) if self._sharing.few else self.threads_for(rows).step()

    def threads_for(self, rows: int) -> Threads:
        """Chooses the number of threads for steps of so many tokens."""
        return self._threads.setdefault(rows, Threads())

    def described(self, cache: RollingBufferCache) -> Model | None:
        """The model and its cache as the kernels have them; None if they are not for them (see `stands_aside`), or
        hooks want to see them.

        What it points at may have moved since the last step (storage that grew, weights that were replaced): it is
        then made again.
        """
        mine = _descriptions.setdefault(self, WeakKeyDictionary())
        found = mine.get(cache)
        if found is None or not found.holds():
            found = self._describe(cache)
            if found is None:
                return None
            mine[cache] = found
        elif found.wide:
            torch._foreach_copy_(found.wide, found.narrow)
        return found.model

    def stands_aside(self) -> str | None:
        """Why the kernels leave this model's steps to the plain path; None if they take them."""
        found = matrices_of(self)
        return found if isinstance(found, str) else None

    def _describe(self, cache: RollingBufferCache) -> Description | None:
        hooks = [vars(m)[kind] for m in self.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
        if any(hooks):
            return None
        matrices = matrices_of(self)
        if isinstance(matrices, str):
            report(self, matrices)
            return None
        args, norms = self.args, Norms()
        layers = (Layer * len(self.layers))()
        for i, block in enumerate(self.layers):
            describe_layer(layers[i], block, matrices[i], norms, cache.layer(i))
        model = Model(
            layers=layers,
            norm=norms.place(self.norm.weight),
            n_layers=len(self.layers),
            dim=args.dim,
            hidden_dim=args.hidden_dim,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            head_dim=args.head_dim,
            eps=args.norm_eps,
            chosen=args.moe.num_experts_per_tok if args.moe is not None else 0,
        )
        kinds = "_modules", "_parameters", "_buffers"
        places = [names for m in self.modules() for kind in kinds if (names := vars(m)[kind])]  # few are not empty
        found = _found(places, cache.layers)
        kept = sum(len(store.storage) for store in cache.layers)
        tensors = [x for x in found[kept:] if isinstance(x, Tensor) and x.dim()]
        return Description(
            model=model,
            places=places,
            stores=cache.layers,
            found=found,
            ids=[*map(id, found)],
            tensors=tensors,
            where=_where(tensors),
            hooks=hooks,
            wide=norms.wide,
            narrow=norms.narrow,
        )


class Norms:
    """Weights of norms in fp32, as the kernels have them: where they are, or widened.

    Attributes:
        wide, narrow: those that were widened, and what they were widened from.
    """

    def __init__(self) -> None:
        self.wide: list[Tensor] = []
        self.narrow: list[Tensor] = []

    def place(self, weight: Tensor) -> int:
        """The address of a weight's numbers."""
        if weight.dtype == torch.float32 and weight.is_contiguous():
            return weight.data_ptr()
        self.narrow.append(weight.detach())
        self.wide.append(weight.detach().float().contiguous())
        return self.wide[-1].data_ptr()


def describe_layer(
    layer: Layer, block: nn.Module, matrices: dict[str, Matrix], norms: Norms, store: RollingBuffer
) -> None:
    """Fill in a layer as the kernels have it: its products, by the fields of `Layer`, its norms, and its cache."""
    for name, matrix in matrices.items():
        setattr(layer, name, matrix)
    if experts := experts_of(block):
        layer.experts = (Expert * len(experts))(*experts)
    layer.attention_norm = norms.place(block.get_parameter("attention_norm.weight"))
    layer.ffn_norm = norms.place(block.get_parameter("ffn_norm.weight"))
    layer.keys, layer.values = store.k.data_ptr(), store.v.data_ptr()
    layer.capacity, layer.window = store.capacity, store.window or 0
    layer.kept = CACHE_KINDS[store.k.dtype]
    if isinstance(store, Int8Buffer):
        layer.key_scales, layer.value_scales = store.k_scale.data_ptr(), store.v_scale.data_ptr()


def widen_stores(model: Model, cache: RollingBufferCache) -> None:
    """Have the layers whose keys or values of the last step did not fit float16 keep them in float32."""
    for i, store in enumerate(cache.layers):
        if model.layers[i].overflows and isinstance(store, HalfBuffer):
            store.widen()


def matrices_of(model: Transformer) -> list[dict[str, Matrix]] | str:
    """The products of each layer as the kernels have them, by the fields of `Layer`; or why they cannot have them."""
    if (module := unknown_module(model, mixtures=True, growing=True)) is not None:
        return f"the fast path kernels does not know the module {module}"
    layers = []
    for i, block in enumerate(model.layers):
        matrices: dict[str, Matrix] = {}
        quantized: set[int] = set()
        for path, field in products_of(block).items():
            linear = block.get_submodule(path)
            matrix = linear.matrix() if isinstance(linear, HasMatrix) else None
            if matrix is None or (field == "gate" and matrix.kind >= INT8):
                return f"the kernels cannot read the weights of layers.{i}.{path} ({type(linear).__name__})"
            quantized |= {matrix.kind} if matrix.kind >= INT8 else set()
            matrices.setdefault(field, matrix)
        if len(quantized) > 1 and INT8 in quantized:  # whose inputs are rounded in another way
            return f"the kernels do not know a layer with int8 and other kinds of quantized products (layers.{i})"
        layers.append(matrices)
    return layers


def products_of(block: nn.Module) -> dict[str, str]:
    """The products of a layer: their paths in it, and the fields of `Layer`; all experts have those of the first."""
    mixture = block.get_submodule("feed_forward")
    if not isinstance(mixture, MixtureOfExperts):
        return {path: path.rpartition(".")[2] for path in PRODUCTS}
    found = {path: path.rpartition(".")[2] for path in PRODUCTS if path.startswith("attention.")}
    names = [f"feed_forward.experts.{e}.{name}" for e in range(len(mixture.experts)) for name in ("w1", "w2", "w3")]
    return found | {"feed_forward.gate": "gate"} | {path: path.rpartition(".")[2] for path in names}


def experts_of(block: nn.Module) -> list[Expert]:
    """The experts of a layer as the kernels have them; none where it has no mixture."""
    mixture = block.get_submodule("feed_forward")
    if not isinstance(mixture, MixtureOfExperts):
        return []
    return [Expert(*(getattr(expert, name).matrix() for name in ("w1", "w2", "w3"))) for expert in mixture.experts]
