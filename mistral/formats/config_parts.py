"""What params.json and config.json say in objects of their own: positions (rope_theta, YaRN, growing queries), experts.

Runs without torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from mistral.args import ArgsError, ModelArgs, Moe, QueryScaling, Yarn
from mistral.formats.layout import ParamsError
from mistral.util.errors import ConvertError, short_repr

DEFAULT_THETA = 1e4  # transformers takes it where config.json leaves the key out
ORIGINAL = "original_max_position_embeddings"
# Keys of rope_parameters: those that every kind may have, and those of YaRN.
ANY_ROPE = ("rope_type", "type", "rope_theta")
YARN_ROPE = (
    *("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    "finetuned",  # Yarn-Mistral's: whether it was trained so, which changes no number
)
SCALED = "llama_4_scaling_beta"  # only models of type ministral3 have it
GROWS = (SCALED, ORIGINAL, "max_position_embeddings")


def parts_of_params(raw: dict[str, Any]) -> dict[str, Any]:
    """ModelArgs' yarn, llama_4_scaling and moe from the object in a params.json.

    Raises:
        ParamsError: a key is missing or unknown, or a value cannot be.
    """
    found: dict[str, Any] = {}
    if (given := raw.get("yarn")) is not None:
        keys = ("beta", "alpha", "apply_scale", "attention_factor")
        _check("params.json: yarn", given, needed=("factor", ORIGINAL), known=keys)
        applied = given.get("apply_scale", True)
        if not isinstance(applied, bool | None):
            raise ParamsError(f"params.json: yarn has apply_scale {short_repr(applied)}; it must be true or false")
        named = {"beta_fast": given.get("beta"), "beta_slow": given.get("alpha")}
        named["attention_factor"] = given.get("attention_factor", 1.0 if applied is False else None)
        found["yarn"] = _made(Yarn, "params.json", given["factor"], given[ORIGINAL], **named)
    if (given := raw.get("llama_4_scaling")) is not None:
        _check("params.json: llama_4_scaling", given, needed=(ORIGINAL, "beta"), known=())
    if given is not None and not _is_zero(given["beta"]):
        found["llama_4_scaling"] = _made(QueryScaling, "params.json", given[ORIGINAL], given["beta"])
    if (given := raw.get("moe")) is not None:
        needed = ("num_experts", "num_experts_per_tok")
        _check("params.json: moe", given, needed=needed, known=())
        found["moe"] = _made(Moe, "params.json", *(given[name] for name in needed))
    return found


def positions_of_config(raw: dict[str, Any]) -> dict[str, Any]:
    """ModelArgs' rope_theta, theta_rule, yarn and llama_4_scaling from the object in a config.json.

    Raises:
        ParamsError: another kind of positions, a key missing or unknown, or a value that cannot be.
    """
    found: dict[str, Any] = {}
    thetas = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        if (given := raw.get(key)) is None:
            continue
        scalings = _scalings(key, given, raw.get("model_type") == "ministral3")
        for name, value in scalings.items():
            if found.setdefault(name, value) != value:
                raise ParamsError("config.json has both rope_parameters and rope_scaling, and they differ")
        thetas[f"{key}.rope_theta"] = given.get("rope_theta")
    default = (1e6, "1e6") if raw.get("model_type") == "mixtral" else (DEFAULT_THETA, "1e4")
    theta, rule = _theta({key: value for key, value in thetas.items() if value is not None}, *default)
    return {**found, "rope_theta": theta, "theta_rule": rule}


def moe_of_config(raw: dict[str, Any]) -> Moe:
    """ModelArgs' moe from the object in a config.json of type mixtral.

    Raises:
        ParamsError: a number is missing, or cannot be.
    """
    needed = ("num_local_experts", "num_experts_per_tok")
    if missing := [name for name in needed if raw.get(name) is None]:
        raise ParamsError(f"config.json lacks {', '.join(missing)}")
    moe: Moe = _made(Moe, "config.json", *(raw[name] for name in needed))
    return moe


def rope_parameters(args: ModelArgs) -> dict[str, Any]:
    """What a config.json says about positions.

    Raises:
        ConvertError: it has no place for what the args say.
    """
    yarn, grows = args.yarn, args.llama_4_scaling
    said: dict[str, Any] = {"rope_type": "default" if yarn is None else "yarn", "rope_theta": args.rope_theta}
    if yarn is not None:
        said |= {"factor": yarn.factor, ORIGINAL: yarn.original_length}
        said |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
        if yarn.attention_factor == 1.0:
            said |= {"mscale": 1.0, "mscale_all_dim": 1.0}  # as the releases spell it
        elif yarn.attention_factor != yarn.usual_attention_factor:
            said["attention_factor"] = yarn.attention_factor
    if grows is not None:
        if said.setdefault(ORIGINAL, grows.original_length) != grows.original_length:
            raise ConvertError(
                f"yarn was trained with {said[ORIGINAL]} positions first and llama_4_scaling with "
                f"{grows.original_length}: a config.json has one number for both"
            )
        said[SCALED] = grows.beta
    return said


def _scalings(key: str, given: object, may_grow: bool) -> dict[str, Any]:
    """What rope_parameters or rope_scaling means beside rope_theta."""
    if not isinstance(given, dict):
        raise ParamsError(f"config.json: {key} must be an object, not {short_repr(given)}")
    kinds = {name: given[name] for name in ("rope_type", "type") if name in given}
    kind = next(iter(kinds.values()), "default")
    for name, value in kinds.items():
        if value not in ("default", "yarn") or value != kind:
            raise ParamsError(f"config.json: {key} has {name} {short_repr(value)}: use transformers or vLLM")
    known = (*ANY_ROPE, *(YARN_ROPE if kind == "yarn" else ()), *((ORIGINAL, *GROWS[2:]) if kind == "yarn" else ()))
    known += GROWS if may_grow else ()
    if unknown := [name for name in given if name not in known]:
        raise ParamsError(f"config.json: {key} has {short_repr(unknown[0])}: use transformers or vLLM")
    found: dict[str, Any] = {}
    if kind == "yarn":
        found["yarn"] = _yarn(key, given)
    if (beta := given.get(SCALED)) is not None and not _is_zero(beta):
        _check(f"config.json: {key}", given, needed=(ORIGINAL,), known=known)
        found["llama_4_scaling"] = _made(QueryScaling, "config.json", given[ORIGINAL], beta)
    return found


def _is_zero(beta: object) -> bool:
    """Whether queries do not grow after all: Medium 3.5 says so."""
    return not isinstance(beta, bool) and isinstance(beta, int | float) and beta == 0


def _yarn(key: str, given: dict[str, Any]) -> Yarn:
    _check(f"config.json: {key}", given, needed=("factor", ORIGINAL), known=given)
    if given.get("truncate", True) is not True:
        raise ParamsError(f"config.json: {key} has truncate {short_repr(given['truncate'])}: use transformers or vLLM")
    named = {name: given.get(name) for name in ("beta_fast", "beta_slow", "attention_factor")}
    yarn = _made(Yarn, "config.json", given["factor"], given[ORIGINAL], **named)
    scales = [given.get(name) for name in ("mscale", "mscale_all_dim")]
    for name, value in zip(("mscale", "mscale_all_dim"), scales, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ParamsError(f"config.json: {key} has {name} {short_repr(value)}; it must be a number")
    if named["attention_factor"] is None and all(scales):
        above, below = (0.1 * float(scale or 0) * math.log(yarn.factor) + 1 for scale in scales)
        named["attention_factor"] = above / below
        yarn = _made(Yarn, "config.json", given["factor"], given[ORIGINAL], **named)
    return yarn


def _theta(given: dict[str, Any], default: float, text: str) -> tuple[Any, str]:
    """rope_theta and where it is from, out of the places that give one."""
    if not given:
        return default, f"absent from config.json, which means {text} to transformers"
    (first, theta), *others = given.items()
    for key, value in others:
        if value != theta:  # transformers takes the one, older programs the other
            raise ParamsError(
                f"config.json gives both {first} = {short_repr(theta)} and {key} = {short_repr(value)}: they differ"
            )
    return theta, "given in config.json" if first == "rope_theta" else f"given in config.json's {first}"


def _check(where: str, given: object, *, needed: Collection[str], known: Collection[str]) -> None:
    if not isinstance(given, dict):
        raise ParamsError(f"{where} must be an object, not {short_repr(given)}")
    if missing := [name for name in needed if given.get(name) is None]:
        raise ParamsError(f"{where} lacks {', '.join(missing)}")
    if unknown := [name for name in given if name not in needed and name not in known]:
        raise ParamsError(f"{where} has {short_repr(unknown[0])}, which no supported release has")


def _made(kind: Any, source: str, *given: Any, **named: Any) -> Any:
    """A Yarn or QueryScaling; what is null is left to its default."""
    try:
        return kind(*given, **{name: value for name, value in named.items() if value is not None})
    except ArgsError as error:
        raise ParamsError(f"{source}: {error}") from None
