"""LoRA adapters on disk: what a folder of PEFT's or of mistral-finetune's adds to which matrix, from headers.

W becomes W + scale * B @ A (rule 20 of the contract); with DoRA, each row of that is scaled to a length that was
learned. What an adapter changes besides, and so cannot be merged exactly, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.formats.adapter_experts import KEY as OF_EXPERTS
from mistral.formats.adapter_experts import by_expert
from mistral.formats.adapter_rows import KEY, ROWS, Rows, rows_by_module
from mistral.formats.adapter_rows import AdapterError as AdapterError
from mistral.formats.huggingface import NAMES, to_hf, to_mistral
from mistral.formats.layout import ParamsError, read_object
from mistral.formats.pth import open_pth
from mistral.formats.text_inside import VISION, alone
from mistral.formats.weights import FLOATS, WeightFiles, open_safetensors
from mistral.parameters import EMBEDDINGS, OUTPUT
from mistral.util.english import counted, some_names
from mistral.util.errors import printable, short_repr

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
OLDER = "adapter_model.bin"  # what PEFT wrote before 2023
NATIVE_WEIGHTS, PARAMS = "lora.safetensors", "params.json"  # mistral-finetune's
FORMS = {"peft": "PEFT", "finetune": "mistral-finetune"}
# Keys of an adapter_config.json that change no number of a merge, or that are worked out below.
KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *(
        "alpha_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
        KEY,
        OF_EXPERTS,
    ),
}
# Keys that add to a model what is no product of two matrices, unless they are empty.
REFUSED = {
    "lora_bias": "it adds biases",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which works from some tokens on",
    "use_bdlora": "BD-LoRA, whose matrices are in blocks",
    "use_qalora": "QALoRA, which pools its inputs",
}
# Kinds of PEFT that change no weights, so that nothing can be merged.
IN_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
# How B and A began, where the base stayed what it was. PiSSA, OLoRA, CorDA, LoftQ and others took something from it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# A weight that PEFT keeps whole beside the pairs: one of modules_to_save, or what is below a changed output.
WHOLE = re.compile(
    r"(?:base_model\.model\.)?((?!.*\.lora_).+?)(?:\.token_adapter)?(?:\.base_layer|\.modules_to_save)?\.weight"
)
# The base's own weight below one that was trained whole: PEFT writes it too where words were added to the vocabulary.
UNTRAINED = re.compile(r".+\.original_module\.weight")
# What a model with another task gives in the place of logits; names of its modules may be others too.
OTHER_TASKS = {
    "SEQ_CLS": "classes of a text",
    "TOKEN_CLS": "classes of tokens",
    "QUESTION_ANS": "places of answers in a text",
    "FEATURE_EXTRACTION": "embeddings of a text",
}
# Where trainers save adapters in a folder of theirs: that of PEFT, and mistral-finetune.
INSIDE = ("*", "checkpoints/*/consolidated")
# A pattern of a rank_pattern or alpha_pattern: a regular expression that cannot take long.
PATTERN = re.compile(r"[\w.\\^$|\[\]-]*([*+?][\w.\\^$|\[\]-]*){0,3}")


@dataclass(frozen=True)
class Pair:
    """The LoRA of one matrix: names of tensors in the adapter's file, its rank, and what B @ A is multiplied by.

    That of the embeddings is the transpose: A [rank, words] and B [dim, rank], which add scale * (B @ A).T.
    """

    a: str
    b: str
    magnitude: str | None
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Args:
        path: its folder, or the file that was given.
        form: a key of FORMS.
        base: the model that it was trained on, as it names it; None if it names none.
        weights: its tensors, under their own names.
        pairs: by Mistral's name of the weight that they change.
        whole: names of tensors that stand in the place of the base's, by Mistral's name of the weight.
        rows: single rows that stand in the place of some of a weight's, by Mistral's name of it.
        notes: what was assumed or ignored, a sentence each.
        experts: how many a layer has, where it changes them as one parameter; else 0.
    """

    path: Path
    form: str
    base: str | None
    weights: WeightFiles
    pairs: dict[str, Pair] = field(repr=False)
    whole: dict[str, str] = field(default_factory=dict, repr=False)
    rows: dict[str, Rows] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    experts: int = 0

    @property
    def dora(self) -> bool:
        """Whether rows are scaled to lengths that were learned."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """The matrices that it changes, by the last part of their names in its form, such as q_proj or wq."""
        changed = {(to_hf(name) if self.form == "peft" else name).split(".")[-2] for name in self.pairs}
        words = [(hf if self.form == "peft" else native).split(".")[-2] for hf, native in NAMES.items()]
        return tuple(dict.fromkeys(word for word in words if word in changed))

    @property
    def replaces(self) -> str:
        """The modules whose weights it has of its own, by PEFT's names of them, human-readable; "" for none."""
        some = {name: rows for name, rows in self.rows.items() if name not in self.whole}
        parts = [f"{counted(len(rows.ids), 'row')} of {_module(name)}" for name, rows in some.items()]
        return " and ".join([*([some_names([*map(_module, self.whole)])] if self.whole else []), *parts])

    def why_merged(self, args: ModelArgs) -> str:
        """What it has that no product beside the weights of a model gives; "" where it can be used at run time."""
        if self.dora:
            return "DoRA, which scales whole rows of the weights"
        if self.replaces:
            return f"weights of its own in the place of {self.replaces}"
        if EMBEDDINGS in self.pairs:
            return "a LoRA of embed_tokens, which are no product"
        if args.tied_embeddings and OUTPUT in self.pairs:
            return "a LoRA of lm_head, which is tied to the embeddings of this model"
        return ""

    def describe(self) -> str:
        """What it is: kind, rank, scale, matrices."""
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        scales = sorted({pair.scale for pair in self.pairs.values()})
        layers = len({name.split(".")[1] for name in self.pairs if name.startswith("layers.")})
        where = f" in {counted(layers, 'layer')}" if layers else ""
        whole = f", and weights of its own in the place of {self.replaces}" if self.replaces else ""
        return (
            f"{'DoRA' if self.dora else 'LoRA'} of {FORMS[self.form]}, rank {join(map(str, ranks))}, "
            f"scale {join(f'{s:g}' for s in scales)}, of {', '.join(self.targets)}{where}{whole}"
        )


def _module(weight: str) -> str:
    """PEFT's name of the module that has a weight, from Mistral's name of that."""
    return to_hf(weight).removesuffix(".weight")


def is_adapter(path: str | PathLike[str]) -> bool:
    """Whether a path is named as an adapter is: a folder with one in it, or its file."""
    place = Path(path)
    names = (CONFIG, WEIGHTS, OLDER, NATIVE_WEIGHTS)
    return place.name in names if place.is_file() else any((place / name).is_file() for name in names)


def adapters_inside(folder: Path) -> str:
    """The adapters in the folders of a folder, as trainers save them, to go behind a message; "" for none."""
    try:
        entries = [entry for pattern in INSIDE for entry in folder.glob(pattern) if entry.is_dir()]
        found = sorted(entry.relative_to(folder).as_posix() for entry in entries if is_adapter(entry))
    except OSError:
        return ""
    return f"; there is an adapter in {some_names(found)}: give that folder" if found else ""


def base_of(path: Path) -> str | None:
    """The model that a folder's adapter names as its base, for messages; None where there is none."""
    try:
        base = read_object(path / CONFIG).get("base_model_name_or_path")
    except ParamsError:
        return None
    return printable(base) if isinstance(base, str) and base else None


def read_adapter(path: str | PathLike[str]) -> Adapter:
    """Read what an adapter says of itself; no tensor is read.

    Args:
        path: a folder of PEFT's (adapter_config.json, adapter_model.safetensors or .bin) or of mistral-finetune's
            (lora.safetensors, params.json), or its file of weights.

    Raises:
        AdapterError, ParamsError, WeightsError: it is none, is broken, or cannot be merged exactly.
    """
    place = Path(path)
    if not place.exists():
        raise AdapterError(f"no such adapter: {place}")
    folder = place.parent if place.is_file() else place
    peft = place.name in (CONFIG, WEIGHTS, OLDER) if place.is_file() else (folder / CONFIG).is_file()
    if peft:
        config = read_object(folder / CONFIG)
        try:
            return _read_peft(folder, place, config)
        except AdapterError as error:
            task = config.get("task_type")
            gives = OTHER_TASKS.get(task) if isinstance(task, str) else None
            if gives is None:
                raise
            raise AdapterError(f"{error}; {CONFIG} has task_type {task}: its model gives {gives}, not text") from None
    file = place if place.is_file() else folder / NATIVE_WEIGHTS
    blocks = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if not (folder / NATIVE_WEIGHTS).is_file() and any(path.suffix.lower() == ".gguf" for path in blocks):
        raise AdapterError(f"{place}: adapters in GGUF are not read: give the one of PEFT that it was made from")
    if not file.is_file():
        raise AdapterError(
            f"no adapter in {place}: expected {CONFIG} with {WEIGHTS} (PEFT), or {NATIVE_WEIGHTS} (mistral-finetune)"
            f"{'; it is a whole model: give it as FOLDER' if (place / 'config.json').is_file() else ''}"
            f"{adapters_inside(place)}"
        )
    return _read_native(file, place)


# --- PEFT's form


def _read_peft(folder: Path, place: Path, config: dict[str, Any]) -> Adapter:
    notes = _check_config(config)
    weights, known, experts = _peft_weights(folder), dict[str, str](), 0
    if parameters := config.get(OF_EXPERTS):
        weights, known, experts = by_expert(weights, parameters, lambda key: _rank_and_scale(config, key)[0])
    file = weights.files[0]
    pattern = r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?"
    whole, rows = _whole(weights), rows_by_module(weights.tensors, config.get(KEY), CONFIG)
    rest = (name for name in weights.tensors if not (WHOLE.fullmatch(name) or ROWS.fullmatch(name)))
    found = _grouped(rest, pattern, file)
    pairs: dict[str, Pair] = {}
    seeing = [module for module in (*found, *whole) if VISION.fullmatch(module)]
    if seeing:
        what = f"{len(seeing)} matrices that read images ({some_names(seeing)})"
        notes.append(f"what it changes in {what} is left aside: this is the text model alone")
    for module, names in found.items():
        if module in seeing:
            continue
        name = _weight_of(module, file)
        if name in pairs:
            raise AdapterError(f"{file} changes {name} twice, under two names")
        if any(("lora_embedding_" in names[part]) != (name == EMBEDDINGS) for part in ("A", "B") if part in names):
            raise AdapterError(
                f"{file} changes {printable(module)} by {some_names([*names.values()])}, as PEFT does not"
            )
        rank, scale = _rank_and_scale(config, known.get(module, module))
        if (magnitude := names.get("magnitude_vector")) is None and config.get("use_dora"):
            raise AdapterError(f"{CONFIG} has use_dora, but {file.name} lacks the magnitude of {printable(module)}")
        if magnitude is not None and not config.get("use_dora"):
            raise AdapterError(f"{file.name} has {printable(magnitude)}, but {CONFIG} has no use_dora")
        pairs[name] = _pair(weights, names, module, rank, scale)
    if not pairs:
        raise AdapterError(f"{file} changes nothing of the text model")
    _check_saved(config.get("modules_to_save"), whole, file)
    own = {_weight_of(module, file): name for module, name in whole.items() if module not in seeing}
    single = {_weight_of(module, file): some for module, some in rows.items()}
    _check_floats(weights, [*own.values(), *(some.name for some in single.values())])
    named = config.get("base_model_name_or_path")
    base = named if isinstance(named, str) and named else None
    return Adapter(place, "peft", base, weights, pairs, own, single, tuple(notes), experts)


def _peft_weights(folder: Path) -> WeightFiles:
    """The tensors of a folder of PEFT's; safetensors where both are there."""
    if (folder / WEIGHTS).is_file():
        return open_safetensors((folder / WEIGHTS,))
    if (folder / OLDER).is_file():
        return open_pth(folder / OLDER)
    raise AdapterError(f"no {WEIGHTS} in {folder}, and no {OLDER}")


def _whole(weights: WeightFiles) -> dict[str, str]:
    """The names of weights that stand in the place of the base's, by module."""
    found: dict[str, str] = {}
    for name in weights.tensors:
        match = None if UNTRAINED.fullmatch(name) else WHOLE.fullmatch(name)
        # Where one is there twice, PEFT reads the plain name, which is the shorter one.
        if match and len(name) < len(found.get(match[1], name + " ")):
            found[match[1]] = name
    return found


def _weight_of(module: str, file: Path) -> str:
    """Mistral's name of the weight of a module under PEFT's name."""
    inside = alone(f"{module}.weight")  # the text model may be inside one that reads images
    name = to_mistral(inside)
    if name is None or to_hf(name) != inside or name == inside:
        raise AdapterError(f"{file} changes {printable(module)}, which is no matrix of this model")
    return name


def _check_saved(modules: Any, whole: dict[str, str], file: Path) -> None:
    """Refuse modules that were trained whole and are not in the file, as some programs leave them out."""
    for word in modules if isinstance(modules, list) else [modules] if modules else []:
        if not any(module.endswith(str(word)) for module in whole):
            raise AdapterError(f"{CONFIG} has modules_to_save {short_repr(word)}, which {file.name} does not hold")


def _check_config(config: dict[str, Any]) -> list[str]:
    """Refuse what is no LoRA that can be merged exactly; notes on the rest."""
    kind = config.get("peft_type")
    if kind != "LORA":
        what = "use PEFT" if kind in IN_PROMPTS else "have PEFT merge it (merge_and_unload) and give what that saves"
        raise AdapterError(f"{CONFIG} has peft_type {short_repr(kind)}: only LORA adapters are read here; {what}")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{CONFIG} has {key}: {reason}, so it cannot be merged exactly here: use PEFT")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"{CONFIG} has init_lora_weights {short_repr(start)}: training began from a base that was changed, "
            "so this adapter does not fit the base as published: convert it to a plain LoRA with PEFT first"
        )
    for key, value in config.items():
        if key not in KNOWN and key not in REFUSED and value:
            raise AdapterError(
                f"{CONFIG} has {short_repr(key)}, which is not known here: remove it if it changes nothing"
            )
    if config.get("fan_in_fan_out"):
        return [f"{CONFIG} has fan_in_fan_out, which means nothing for the linear layers of this model"]
    return []


def _rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank, and what B @ A is multiplied by, of a module under PEFT's name of it."""
    values = []
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = _matched(config.get(pattern), pattern, module)
        value = config.get(key) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise AdapterError(f"{CONFIG} has {key} = {short_repr(value)} for {printable(module)}; it must be above 0")
        values.append(value)
    rank, alpha = values
    if rank != int(rank):
        raise AdapterError(f"{CONFIG} has r = {rank}; it must be a whole number")
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matched(patterns: Any, key: str, module: str) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches it."""
    if not patterns:
        return None
    if not isinstance(patterns, dict):
        raise AdapterError(f"{CONFIG}: {key} must be an object, not {short_repr(patterns)}")
    for pattern, value in patterns.items():
        if len(pattern) > 200 or not PATTERN.fullmatch(pattern):
            raise AdapterError(f"{CONFIG}: {key} has {short_repr(pattern)}, a pattern that is not supported")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise AdapterError(f"{CONFIG}: {key} has {short_repr(pattern)}, which is no pattern: {error}") from None
    return None


# --- mistral-finetune's form


def _read_native(file: Path, place: Path) -> Adapter:
    params = file.parent / PARAMS
    rule = f"beside it a {PARAMS} with lora.scaling says by how much B @ A is multiplied"
    if not params.is_file():
        raise AdapterError(f"{file} has no {PARAMS} beside it: {rule}")
    lora = read_object(params).get("lora")
    scaling = lora.get("scaling") if isinstance(lora, dict) else None
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not math.isfinite(scaling):
        raise AdapterError(f"{params} has lora.scaling {short_repr(scaling)}: {rule}")
    weights = open_safetensors((file,))
    pairs = {}
    for module, names in _grouped(weights.tensors, r"(.+)\.lora_(A|B)\.weight", file).items():
        if to_hf(f"{module}.weight") in (f"{module}.weight", to_hf(EMBEDDINGS)):
            raise AdapterError(f"{file} changes {printable(module)}, which is no matrix of this model")
        pairs[f"{module}.weight"] = _pair(weights, names, module, None, float(scaling))
    return Adapter(place, "finetune", None, weights, pairs)


# --- both


def _grouped(stored: Iterable[str], pattern: str, file: Path) -> dict[str, dict[str, str]]:
    """The tensors of each module that is changed: by the module's name, then by A, B or magnitude_vector."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in stored:
        match = re.fullmatch(pattern, name)
        if match is None:
            others.append(name)
        elif found.setdefault(match[1], {}).setdefault(match[2], name) != name:
            raise AdapterError(f"{file} has {printable(name)} twice, under two names")
    if any(re.search(r"\.lora_[AB]\.\w+\.weight", name) for name in others):
        raise AdapterError(
            f"{file} holds {some_names(others)}: names of PEFT's model in memory (state_dict()), which PEFT does not "
            "read either: save it with save_pretrained"
        )
    if others:
        raise AdapterError(f"{file} holds {some_names(others)}, which is no LoRA of a matrix and cannot be merged here")
    if not found:
        raise AdapterError(f"{file} holds no tensors")
    return found


def _pair(weights: WeightFiles, names: dict[str, str], module: str, rank: int | None, scale: float) -> Pair:
    if lacking := [part for part in ("A", "B") if part not in names]:
        raise AdapterError(f"{weights.files[0]} lacks lora_{lacking[0]} of {printable(module)}")
    a = weights.tensors[names["A"]]
    if a.shape == (0,):
        raise AdapterError(
            f"{printable(names['A'])} is empty, as DeepSpeed leaves weights that it has not gathered: save it again"
        )
    if len(a.shape) != 2 or not a.shape[0] or (rank is not None and a.shape[0] != rank):
        expected = "[rank, in]" if rank is None else f"rank {rank} by {CONFIG}"
        raise AdapterError(f"{printable(names['A'])} is {short_repr(list(a.shape))}; it must be {expected}")
    _check_floats(weights, names.values())
    return Pair(names["A"], names["B"], names.get("magnitude_vector"), a.shape[0], scale)


def _check_floats(weights: WeightFiles, names: Iterable[str]) -> None:
    for name in names:
        if weights.tensors[name].dtype not in FLOATS:
            raise AdapterError(f"{printable(name)} is {printable(weights.tensors[name].dtype_name)}; it must be floats")


def join(words: Iterable[str]) -> str:
    """Words for people."""
    return " and ".join(words)
