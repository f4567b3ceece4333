"""Parts of a shape that some GGUF files have: scaled positions (arch mistral3) and a mixture of experts.

Without torch; source of the keys: llama.cpp's conversion and its `llama_context`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mistral.args import ArgsError, Moe, QueryScaling, Yarn
from mistral.formats.gguf_header import GgufError, GgufTensor
from mistral.formats.weights import WeightsError, require_once
from mistral.util.errors import short_repr

# Keys, without the architecture before them, that describe scaled positions.
ORIGINAL = "rope.scaling.original_context_length"
GROWS = "attention.temperature_scale"
YARN = {
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    ORIGINAL,
}
SCALING = {*YARN, "rope.scaling.yarn_log_multiplier", GROWS}  # of the architecture mistral3
# Experts of a layer in one tensor [experts, out, in], as files have had them since 2024; older ones have one for each.
STACK = re.compile(r"(blk\.\d+\.ffn_(?:gate|down|up))_exps\.weight")
EXPERTS = {"expert_count", "expert_used_count"}


def experts_of(raw: Mapping[str, object]) -> Moe | None:
    """The mixture of experts, if there is one.

    Args:
        raw: the architecture's metadata, without its name before the keys.

    Raises:
        GgufError: it cannot be.
    """
    count, used = raw.get("expert_count", 0), raw.get("expert_used_count", 0)
    if not count and not used:
        return None
    if not (type(count) is int and type(used) is int and 1 <= used <= count):
        raise GgufError(f"the file has {short_repr(used)} of {short_repr(count)} experts for a token")
    return Moe(num_experts=count, num_experts_per_tok=used)


def positions_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`yarn` and `llama_4_scaling` of ModelArgs, as far as a file has them; the latter in the architecture mistral3.

    The attention factor is the quotient of two: 0.1 ln(factor) + 1, and the same with yarn_log_multiplier before the
    logarithm, which is 1 where none is wanted and absent where the usual one is.

    Raises:
        GgufError: they cannot be, or are of another kind.
    """
    found: dict[str, Any] = {}
    kind = raw.get("rope.scaling.type", "none")
    if kind not in ("yarn", "none"):
        raise GgufError(f"the file has scaled rotary positions of the kind {short_repr(kind)}: use llama.cpp")
    try:
        if kind == "yarn":
            multiplier = raw.get("rope.scaling.yarn_log_multiplier", 0.0)
            factor, original = raw.get("rope.scaling.factor"), raw.get(ORIGINAL, raw.get("context_length"))
            betas = raw.get("rope.scaling.yarn_beta_fast", 32.0), raw.get("rope.scaling.yarn_beta_slow", 1.0)
            usual = Yarn(factor, original, *betas)  # type: ignore[arg-type]
            if not isinstance(multiplier, int | float) or not 0 <= multiplier < math.inf:
                raise GgufError(f"rope.scaling.yarn_log_multiplier is {short_repr(multiplier)}")
            over = 0.1 * multiplier * math.log(usual.factor) + 1
            found["yarn"] = Yarn(factor, original, *betas, usual.attention_factor / over)  # type: ignore[arg-type]
        if raw.get(GROWS):
            found["llama_4_scaling"] = QueryScaling(raw.get(ORIGINAL), raw[GROWS])  # type: ignore[arg-type]
    except ArgsError as error:
        raise GgufError(f"the metadata gives scaled positions that cannot be: {error}") from None
    return found


def experts_apart(tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """The tensors of a file, each stack of experts as one for each, under the names of older files.

    Raises:
        WeightsError: a stack that is none of experts, or one whose experts are there one by one too.
    """
    found: dict[str, GgufTensor] = {}
    became = [(name, name) for name in tensors if STACK.fullmatch(name) is None]
    for name, tensor in tensors.items():
        stack = STACK.fullmatch(name)
        if stack is None:
            found[name] = tensor
            continue
        if len(tensor.shape) != 3:
            raise WeightsError(f"{short_repr(name)} {short_repr(list(tensor.shape))} is no stack of experts")
        count, *shape = tensor.shape
        size = tensor.nbytes // count  # whole rows of whole blocks
        for e in range(count):
            begin = tensor.begin + e * size
            became.append((name, f"{stack[1]}.{e}.weight"))
            found[f"{stack[1]}.{e}.weight"] = replace(tensor, shape=tuple(shape), begin=begin, end=begin + size)
    require_once(became)
    return found
