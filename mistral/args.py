"""The shape of a model: ModelArgs, checked on construction.

Knows nothing about files or tensors. What a folder leaves unsaid (rope_theta) is decided
here by one rule, and the rule that was used can be read back.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mistral.util.arguments import require_integer
from mistral.util.errors import FormatError, short_repr
from mistral.window import Window, shortest_pattern, slots_for


class ArgsError(FormatError):
    """An impossible or contradictory model shape."""


# 7B v0.1 was trained with 1e4 and Mixtral 8x7B with 1e6, and neither says so in params.json.
THETA_WITH_WINDOW = 1e4
THETA_WITHOUT_WINDOW = 1e6

LARGEST = 2**31 - 1  # of any size here: products of two stay inside 64 bits
# Bytes of a number in a cache, by the name of its dtype; and of a scale, which int8 has beside them.
CACHE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4
SIZES = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size")


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched for long texts (YaRN, arXiv 2309.00071).

    Args:
        factor: by how much slow pairs are slowed down; at least 1.
        original_length: positions that the model was trained with first.
        beta_fast: pairs that turn more often than this within original_length keep their frequency.
        beta_slow: those that turn less often are slowed down by the whole factor; between the two it is a ramp.
        attention_factor: of cosines and sines. None: 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = None  # type: ignore[assignment]  # a float once constructed

    def __post_init__(self) -> None:
        object.__setattr__(self, "original_length", _size("yarn.original_length", self.original_length))
        given: object = self.attention_factor
        if given is None:
            _check_positive("yarn.factor", self.factor)
            object.__setattr__(self, "attention_factor", self.usual_attention_factor)
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            _check_positive(f"yarn.{name}", getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.factor < 1:
            raise ArgsError(f"yarn.factor is {self.factor:g}; it must be at least 1")
        if self.beta_fast < self.beta_slow:
            raise ArgsError(f"yarn.beta_fast {self.beta_fast:g} is below yarn.beta_slow {self.beta_slow:g}")

    @property
    def usual_attention_factor(self) -> float:
        """What attention_factor is where nothing else is said."""
        return 0.1 * math.log(self.factor) + 1

    def to_params(self) -> dict[str, Any]:
        """As a params.json has it. Its apply_scale knows two attention factors; another one is written as it is."""
        params = {"factor": self.factor, "original_max_position_embeddings": self.original_length}
        params |= {"beta": self.beta_fast, "alpha": self.beta_slow}
        if self.attention_factor in (1.0, self.usual_attention_factor):
            return params | {"apply_scale": self.attention_factor != 1.0}
        return params | {"attention_factor": self.attention_factor}


@dataclass(frozen=True)
class QueryScaling:
    """Queries grow with their position: times 1 + beta ln(1 + floor(position / original_length)), after rotation.

    Args:
        original_length: positions that the model was trained with first; up to there nothing changes.
        beta: how fast they grow.
    """

    original_length: int
    beta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "original_length", _size("llama_4_scaling.original_length", self.original_length))
        _check_positive("llama_4_scaling.beta", self.beta)
        object.__setattr__(self, "beta", float(self.beta))

    def to_params(self) -> dict[str, Any]:
        """As a params.json has it."""
        return {"original_max_position_embeddings": self.original_length, "beta": self.beta}


@dataclass(frozen=True)
class Moe:
    """A mixture of experts (Mixtral, arXiv 2401.04088): several feed-forwards in a layer, a few for each token.

    Args:
        num_experts: of a layer.
        num_experts_per_tok: that a token goes through.
    """

    num_experts: int
    num_experts_per_tok: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok"):
            object.__setattr__(self, name, _size(f"moe.{name}", getattr(self, name)))
        if self.num_experts_per_tok > self.num_experts:
            raise ArgsError(f"moe.num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts")

    def to_params(self) -> dict[str, Any]:
        """As a params.json has it."""
        return {"num_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}


@dataclass(frozen=True, repr=False)
class ModelArgs:
    """Shape of a Mistral transformer (Mistral 7B, arXiv 2310.06825, table 1).

    Args:
        dim: width of the residual stream.
        n_layers: number of layers, L.
        head_dim: width of one head, D; even, because RoPE turns pairs.
        hidden_dim: width of the feed-forward block.
        n_heads: query heads, H.
        n_kv_heads: key/value heads, K; divides H.
        norm_eps: epsilon of RMSNorm.
        vocab_size: V.
        sliding_window: W, the number of keys a query sees, itself included; None means all of
            them. A list gives one window per layer and repeats until every layer has one
            (Ministral 8B: [None, 32768, 32768, 32768]).
        rope_theta: base of the rotary frequencies. None: 1e4 if a window is declared, else 1e6.
        tied_embeddings: whether the output matrix is the embedding matrix, one parameter.
        yarn: how rotary frequencies are stretched; None: they are not.
        llama_4_scaling: how queries grow with their position; None: they do not.
        moe: the experts of each layer; None: one feed-forward for all tokens.
        max_batch_size: most sequences in one forward; 0 sets no limit.
        theta_rule: how rope_theta was found; filled in when left empty.

    Raises:
        ArgsError: a value has the wrong type or cannot be.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    sliding_window: int | tuple[int | None, ...] | None = None
    rope_theta: float = None  # type: ignore[assignment]  # a float once constructed
    tied_embeddings: bool = False
    yarn: Yarn | None = None
    llama_4_scaling: QueryScaling | None = None
    moe: Moe | None = None
    max_batch_size: int = 0
    theta_rule: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in SIZES:
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        object.__setattr__(self, "max_batch_size", _size("max_batch_size", self.max_batch_size, least=0))
        _check_positive("norm_eps", self.norm_eps)
        object.__setattr__(self, "norm_eps", float(self.norm_eps))
        if self.n_heads % self.n_kv_heads:
            raise ArgsError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ArgsError(f"head_dim {self.head_dim} is odd: RoPE turns pairs, so it must be even")
        if not isinstance(self.tied_embeddings, bool):
            raise ArgsError(f"tied_embeddings must be true or false, not {short_repr(self.tied_embeddings)}")
        for name, kind in (("yarn", Yarn), ("llama_4_scaling", QueryScaling), ("moe", Moe)):
            if not isinstance(getattr(self, name), kind | None):
                raise ArgsError(f"{name} must be a {kind.__name__} or None, not {short_repr(getattr(self, name))}")
        self._check_window()
        given: object = self.rope_theta
        if given is None:
            windowed = any(w is not None for w in self._distinct_windows)
            theta = THETA_WITH_WINDOW if windowed else THETA_WITHOUT_WINDOW
            rule = "absent, and a sliding window is declared" if windowed else "absent, and no sliding window"
            object.__setattr__(self, "rope_theta", theta)
            object.__setattr__(self, "theta_rule", self.theta_rule or rule)
        else:
            _check_positive("rope_theta", self.rope_theta)
            object.__setattr__(self, "rope_theta", float(self.rope_theta))
            object.__setattr__(self, "theta_rule", self.theta_rule or "given")

    def _check_window(self) -> None:
        window = self.sliding_window
        if isinstance(window, list | tuple):
            if not window or self.n_layers % len(window):
                raise ArgsError(
                    f"sliding_window lists {len(window)} windows: they do not repeat evenly over {self.n_layers} layers"
                )
            object.__setattr__(self, "sliding_window", tuple(window))
        windows = tuple(None if w is None else _size("sliding_window", w) for w in self._distinct_windows)
        # One spelling of each pattern, so that equal models have equal args.
        pattern = shortest_pattern(windows)
        object.__setattr__(self, "sliding_window", tuple(pattern) if isinstance(pattern, list) else pattern)

    @property
    def _distinct_windows(self) -> tuple[Window, ...]:
        # Not `windows`: n_layers has not been compared with any weights yet, and may be a billion.
        return self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window,)

    @property
    def windows(self) -> tuple[Window, ...]:
        """The window of each layer, `n_layers` of them."""
        per_layer = self._distinct_windows
        return per_layer * (self.n_layers // len(per_layer))

    def to_params(self) -> dict[str, Any]:
        """The object that a params.json holds; what is read back from it equals these args.

        All but max_batch_size, which is no part of a model.
        """
        params = {name: getattr(self, name) for name in (*SIZES, "norm_eps")}
        params |= {"sliding_window": shortest_pattern(self.windows), "rope_theta": self.rope_theta}
        parts = {"yarn": self.yarn, "llama_4_scaling": self.llama_4_scaling, "moe": self.moe}
        params |= {name: part.to_params() for name, part in parts.items() if part is not None}
        return params | ({"tied_embeddings": True} if self.tied_embeddings else {})

    def __repr__(self) -> str:
        heads = f"{self.n_heads}/{self.n_kv_heads} of {self.head_dim}"
        tied = ", tied" if self.tied_embeddings else ""
        parts = "".join(f", {part}" for part in (self.yarn, self.llama_4_scaling, self.moe) if part is not None)
        return (
            f"ModelArgs({self.n_layers} layers of {self.dim}, heads {heads}, hidden {self.hidden_dim}, "
            f"vocabulary {self.vocab_size}, window {self.sliding_window}, theta {self.rope_theta:g}{parts}{tied})"
        )

    def cache_bytes(self, positions: int, dtype: str) -> int:
        """Bytes of keys and values of one sequence of `positions`, all layers.

        Args:
            dtype: that they are kept in, a name in CACHE_BYTES; int8 has a scale for each head and position.
        """
        slots = sum(slots_for(window, positions) for window in self.windows)
        scale = SCALE_BYTES if dtype == "int8" else 0
        return 2 * slots * self.n_kv_heads * (self.head_dim * CACHE_BYTES[dtype] + scale)

    @property
    def window_text(self) -> str:
        """The window, human-readable: 4096, none, or a count of each where layers differ."""
        counts = Counter("none" if w is None else str(w) for w in self.windows)
        if len(counts) == 1:
            return next(iter(counts))
        return " + ".join(f"{name} x{n}" for name, n in counts.items()) + " layers"


def _size(name: str, value: object, least: int = 1) -> int:
    return require_integer(name, value, least, LARGEST, ArgsError)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgsError(f"{name} must be a number, not {short_repr(value)}")
    if not 0 < value <= sys.float_info.max:
        raise ArgsError(f"{name} is {short_repr(value)}; it must be a finite number above 0")
