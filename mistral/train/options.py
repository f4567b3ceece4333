"""How a model is fine-tuned, as requested: TrainOptions, checked on construction. Runs without torch.

Flags, help texts and defaults derive from this class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mistral.loader.options import OptionError
from mistral.util.arguments import require_integer
from mistral.util.errors import short_repr

# Matrices of a layer: Mistral's name of each by PEFT's, in a layer's order.
TARGETS = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
# Options that are whole numbers, and the least of each.
LEAST = {
    **dict.fromkeys(("lora", "batch_size", "accumulate", "steps", "eval_every", "patience", "save_every"), 1),
    **{"seq_len": 2, "seed": 0},
}
RECOMPUTE = ("none", "cheap", "layers")
USUAL_RANK = 16
USUAL_LR = {True: 2e-5, False: 2e-4}  # by `full`


@dataclass(frozen=True)
class TrainOptions:
    """How a model is fine-tuned.

    Args:
        full: train all weights; default: an adapter (LoRA) beside them
        lora: rank of the adapter; default: 16
        lora_alpha: B @ A is multiplied by alpha / rank; default: twice the rank
        lora_dropout: share of the adapter's inputs that are set to 0 while training
        lora_targets: matrices with an adapter, with commas between, such as wq,wv or q_proj,v_proj; default: all seven
        seq_len: tokens of a row, into which samples are packed; a sample that is longer is cut
        batch_size: rows of a forward
        accumulate: forwards of a step; the gradient is that of all their tokens together
        epochs: how often every sample is used; may be a fraction
        steps: steps in all; default: as epochs says
        lr: peak of the learning rate; default: 2e-4 for an adapter, 2e-5 with --full
        warmup: share of the steps in which the learning rate rises; it falls as a cosine after that
        weight_decay: of AdamW; norms have none
        clip: longest gradient: a longer one is scaled to it; 0 clips nothing
        eval_split: share of the samples that are held out and evaluated, such as 0.05
        eval_every: steps between evaluations; default: ten times a run
        patience: stop after so many evaluations without improvement, and keep the best weights; default: never
        save_every: steps between saves of the state from which --resume goes on
        recompute: what the backward pass computes again instead of keeping it: none, cheap (norms and gates), layers
        rope_theta: train and write the model with another theta, for longer texts; default: the folder's
        template: of conversations: a name or a file in Jinja, as for interactive; default: the folder's
        seed: of the adapter's start, the order of samples, dropout and the split

    Raises:
        OptionError: a value that cannot be.
    """

    full: bool = False
    lora: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: str | None = None
    seq_len: int = 2048
    batch_size: int = 1
    accumulate: int = 1
    epochs: float = 1.0
    steps: int | None = None
    lr: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_split: float = 0.0
    eval_every: int | None = None
    patience: int | None = None
    save_every: int = 100
    recompute: str = "cheap"
    rope_theta: float | None = None
    template: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None or getattr(TrainOptions, name) is not None:
                object.__setattr__(self, name, require_integer(name, value, least, 2**31 - 1, OptionError))
        for name, least, most in (
            ("lora_alpha", 0, math.inf),
            ("lora_dropout", 0, 0.95),
            ("epochs", 0, 1e6),
            ("lr", 0, 10),
            ("warmup", 0, 1),
            ("weight_decay", 0, 10),
            ("clip", 0, math.inf),
            ("eval_split", 0, 0.5),
            ("rope_theta", 0, math.inf),
        ):
            _check_float(
                name, getattr(self, name), least, most, open_end=name in ("lora_alpha", "epochs", "lr", "rope_theta")
            )
        if self.recompute not in RECOMPUTE:
            raise OptionError(f"recompute {short_repr(self.recompute)} is not one of {', '.join(RECOMPUTE)}")
        if self.full and (given := [n for n in _OF_LORA if getattr(self, n) != getattr(TrainOptions, n)]):
            raise OptionError(f"{given[0]} is of an adapter, and --full trains all weights: give one of them")
        _ = self.targets

    @property
    def rank(self) -> int:
        """Of the adapter; 0 where all weights are trained."""
        return 0 if self.full else self.lora or USUAL_RANK

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / max(1, self.rank)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return USUAL_LR[self.full] if self.lr is None else self.lr

    @property
    def targets(self) -> tuple[str, ...]:
        """Mistral's names of the matrices with an adapter.

        Raises:
            OptionError: a name that is none.
        """
        if self.lora_targets is None:
            return tuple(TARGETS.values())
        named = [TARGETS.get(word, word) for word in self.lora_targets.replace(" ", "").split(",")]
        if unknown := [word for word in named if word not in TARGETS.values()]:
            known = ", ".join([*TARGETS.values(), *TARGETS])
            raise OptionError(f"lora_targets has {short_repr(unknown[0])}, which is not one of {known}")
        return tuple(target for target in TARGETS.values() if target in named)


_OF_LORA = ("lora", "lora_alpha", "lora_dropout", "lora_targets")


def _check_float(name: str, value: object, least: float, most: float, open_end: bool) -> None:
    """Between two ends; `open_end` leaves out the lower one."""
    if value is None:
        return
    number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    if not number or not least <= value <= most or (open_end and value == least):  # type: ignore[operator]
        above = f"above {least:g}" if open_end else f"at least {least:g}"
        end = "" if math.isinf(most) else f" and at most {most:g}"
        what = f"{above}{end}" if number else "a finite number"
        raise OptionError(f"{name} is {short_repr(value)}; it must be {what}")
