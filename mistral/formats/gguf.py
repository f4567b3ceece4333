"""GGUF files as models: metadata to ModelArgs, tensor names, and readers that widen quantized blocks.

Rows of q and k are in Mistral's order already: whatever wrote the file turned them. A GGUF file never gives the
sliding window of a Mistral model, and llama.cpp runs it without one; here the window is that of the release that the
shape is recognised as. Reads shapes and names from headers alone; source of the keys: ggml's docs/gguf.md.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mistral.args import ArgsError, ModelArgs
from mistral.fast.layout import BLOCKS
from mistral.formats.gguf_header import Gguf, GgufError, GgufTensor, Metadata, StringArray
from mistral.formats.gguf_parts import EXPERTS, SCALING, YARN, experts_apart, experts_of, positions_of
from mistral.formats.mapped_tensors import Part, Progress
from mistral.formats.releases import COMPARED, PARTS, RELEASES, Release, identify
from mistral.formats.weights import PART, Reader, Stored, WeightFiles, WeightsError
from mistral.parameters import EMBEDDINGS, OUTPUT, parameters
from mistral.util.english import some_names
from mistral.util.errors import short_repr
from mistral.util.files import stamp_of

if TYPE_CHECKING:
    from torch import Tensor

Windows = int | tuple[int | None, ...] | None

# GGUF's name of each tensor, and Mistral's. N is a layer's number, E an expert's.
NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "blk.N.attn_q.weight": "layers.N.attention.wq.weight",
    "blk.N.attn_k.weight": "layers.N.attention.wk.weight",
    "blk.N.attn_v.weight": "layers.N.attention.wv.weight",
    "blk.N.attn_output.weight": "layers.N.attention.wo.weight",
    "blk.N.ffn_gate.weight": "layers.N.feed_forward.w1.weight",
    "blk.N.ffn_down.weight": "layers.N.feed_forward.w2.weight",
    "blk.N.ffn_up.weight": "layers.N.feed_forward.w3.weight",
    "blk.N.ffn_gate_inp.weight": "layers.N.feed_forward.gate.weight",
    "blk.N.ffn_gate.E.weight": "layers.N.feed_forward.experts.E.w1.weight",
    "blk.N.ffn_down.E.weight": "layers.N.feed_forward.experts.E.w2.weight",
    "blk.N.ffn_up.E.weight": "layers.N.feed_forward.experts.E.w3.weight",
    "blk.N.attn_norm.weight": "layers.N.attention_norm.weight",
    "blk.N.ffn_norm.weight": "layers.N.ffn_norm.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
GGUF_NAMES = {ours: theirs for theirs, ours in NAMES.items()}
# Factors by which each rotary frequency is divided: 1 everywhere changes nothing, others are another model's.
ROPE_FREQS = re.compile(r"(blk\.\d+\.)?rope_freqs\.weight")

# Kinds of model, by general.architecture: both are this one, and the second scales its positions.
SCALED = "mistral3"
ARCHITECTURES = ("llama", SCALED)
# Others that are known. Every other one is refused with its own name.
ELSEWHERE = {
    "mistral4": "a mixture of experts (Mistral Small 4)",
    "deepseek2": "latent attention (DeepSeek V2 and later, Mistral Large 3)",
    "mamba": "a Mamba model",
    "mamba2": "a Mamba model (Codestral Mamba)",
    "clip": "the vision or audio encoder of another file, not a model of text",
}
KINDS = {
    "adapter": "a LoRA adapter, not a model: merge it into its base first",
    "mmproj": "the vision or audio encoder of another file, not a model of text",
    "imatrix": "statistics of a model's activations, not a model",
    "vocab": "a tokenizer without weights",
}
# Keys of the architecture, without its name: those that shape the model, and ModelArgs' names for them.
SHAPE = {
    "block_count": "n_layers",
    "embedding_length": "dim",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
HANDLED = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "vocab_size",
    *EXPERTS,
}
# Known keys that change no number of a forward.
HARMLESS = {
    "context_length": "how long the training sequences were",
    "tensor_data_layout": "the order of q and k rows, which is Mistral's in every file",
    "rope.scaling.original_context_length": "of no use where positions are not scaled",
    "rope.scaling.finetuned": "of no use where positions are not scaled",
    "pooling_type": "what an embedding model does with the last states",
}
# Keys that are harmless with one of these values only.
ONLY: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (1,),
    "attention.scale": (0,),
    "use_parallel_residual": (False,),
}
DEFAULT_THETA = 1e4  # llama.cpp's, where the file has no rope.freq_base


def name_of(name: str) -> str:
    """GGUF's name of a tensor that Mistral calls `name`."""
    return _renamed(name, GGUF_NAMES)


def to_mistral(name: str) -> str | None:
    """Mistral's name of a tensor in a GGUF file; None if it is known and ignored; unknown names stay."""
    return None if ROPE_FREQS.fullmatch(name) else _renamed(name, NAMES)


def _renamed(name: str, table: dict[str, str]) -> str:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    key = name
    for number, letter in zip(numbers, "NE", strict=False):
        key = key.replace(f".{number}.", f".{letter}.", 1)
    pattern = table.get(key) if len(numbers) <= 2 else None
    if pattern is None:
        return name
    for number, letter in zip(numbers, "NE", strict=False):
        pattern = pattern.replace(f".{letter}.", f".{number}.", 1)
    return pattern


# --- shape


def args_of(
    metadata: Metadata,
    sliding_window: Windows | Literal["auto"] = "auto",
    max_batch_size: int = 0,
    tied: bool = False,
) -> tuple[ModelArgs, list[str]]:
    """The shape that a file's metadata gives, and what was assumed, a sentence each: the first is about the window.

    Args:
        sliding_window: as in ModelArgs; "auto": the file's own, else that of the release that the shape is, else none.
        tied: whether the output matrix is the embeddings; the tensors tell, see `is_tied`.

    Raises:
        GgufError: another kind of model, a key that is missing, refused or unknown, or a value that cannot be.
    """
    _check_kind(metadata)
    values, rule = _shape(metadata)
    found: Any = metadata.get(f"{metadata['general.architecture']}.attention.sliding_window")
    given = found if sliding_window == "auto" and found not in (None, 0) else sliding_window
    try:
        args = ModelArgs(**values, theta_rule=rule)
        if given != "auto":
            args = replace(args, sliding_window=given)
    except ArgsError as error:
        raise GgufError(f"the metadata gives a shape that cannot be: {error}") from None
    if given == "auto":
        args, note = _window_of_release(args)
    else:
        note = f"sliding window {args.window_text}: {'as the file gives it' if given == found else 'as requested'}"
    return replace(args, max_batch_size=max_batch_size, tied_embeddings=tied), [note]


def _check_kind(metadata: Metadata) -> None:
    kind = metadata.get("general.type", "model")
    if isinstance(kind, str) and kind in KINDS:
        raise GgufError(f"the file is {KINDS[kind]}")
    name = metadata.get("general.architecture")
    if name in ARCHITECTURES:
        return
    if not isinstance(name, str):
        raise GgufError("the file lacks general.architecture: it is no model")
    what = ELSEWHERE.get(name, "a model of another family")
    raise GgufError(f"the file is {what} (architecture {short_repr(name)}): use llama.cpp")


def _shape(metadata: Metadata) -> tuple[dict[str, Any], str]:
    """ModelArgs' values without the window, and how rope_theta was found."""
    arch = str(metadata["general.architecture"])
    raw = {key.removeprefix(f"{arch}."): _one(key, v) for key, v in metadata.items() if key.startswith(f"{arch}.")}
    scaling = SCALING if arch == SCALED else YARN if raw.get("rope.scaling.type") == "yarn" else set()
    known = SHAPE.keys() | HANDLED | HARMLESS.keys() | scaling
    for key, value in raw.items():
        if key in ONLY and key not in scaling:
            if value not in ONLY[key]:
                raise GgufError(f"{arch}.{key} is {short_repr(value)}, which this model does not have: use llama.cpp")
        elif key not in known:
            raise GgufError(f"the file has {short_repr(f'{arch}.{key}')}, which is not known here: use llama.cpp")
    if missing := [key for key in SHAPE if key not in raw]:
        raise GgufError(f"the file lacks {', '.join(f'{arch}.{key}' for key in missing)}")
    values = {ours: raw[key] for key, ours in SHAPE.items()}
    values["n_kv_heads"] = raw.get("attention.head_count_kv", values["n_heads"])
    values["head_dim"] = _head_dim(raw, values, arch)
    tokens = metadata.get("tokenizer.ggml.tokens")
    values["vocab_size"] = raw.get("vocab_size", tokens.count if isinstance(tokens, StringArray) else None)
    if values["vocab_size"] is None:
        raise GgufError(f"the file lacks {arch}.vocab_size, and has no tokenizer")
    values["moe"] = experts_of(raw)
    values |= positions_of(raw)
    values["rope_theta"] = raw.get("rope.freq_base", DEFAULT_THETA)
    given = "rope.freq_base" in raw
    return values, "given in the file" if given else "absent from the file, which means llama.cpp's default"


def _one(key: str, value: object) -> object:
    """A value, or the one value of an array that repeats it for every layer."""
    if isinstance(value, array):
        if len(set(value)) != 1:
            raise GgufError(f"{short_repr(key)} differs from layer to layer: use llama.cpp")
        return value[0]
    return value


def _head_dim(raw: dict[str, object], values: dict[str, Any], arch: str) -> object:
    dim, heads = values["dim"], values["n_heads"]
    head_dim = raw.get("attention.key_length")
    if head_dim is None:
        if type(dim) is not int or type(heads) is not int or heads < 1 or dim % heads:
            raise GgufError(
                f"the file lacks {arch}.attention.key_length, and {short_repr(heads)} heads do not divide "
                f"{short_repr(dim)}"
            )
        head_dim = dim // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if raw.get(key, head_dim) != head_dim:
            raise GgufError(
                f"{arch}.{key} is {short_repr(raw[key])}, but heads are {short_repr(head_dim)} wide: use llama.cpp"
            )
    return head_dim


# --- the window, which the file does not give


def _window_of_release(args: ModelArgs) -> tuple[ModelArgs, str]:
    """The args with the window of the release that they are in all else, and a sentence about it."""
    unknown = "the file does not give the sliding window"
    for release in RELEASES:
        with_window = _with_window(args, release)
        if with_window is not None and identify(with_window) == (release, []):
            return with_window, f"sliding window {with_window.window_text}: that of {release.name}; {unknown}"
    near = [release for release in RELEASES if _grown(args, release)]
    windows = {release.sliding_window for release in near}
    names = " or ".join(release.name for release in near)
    if len(windows) == 1:
        found = _with_window(args, near[0])
        assert found is not None
        return found, f"sliding window {found.window_text}: that of {names}, which this is but for its words; {unknown}"
    why = f"it may be {names}" if near else "the shape is that of no release that is known here"
    return args, f"sliding window none: {unknown}, and {why}; give one with --sliding_window if the model has one"


def _with_window(args: ModelArgs, release: Release) -> ModelArgs | None:
    """The args with a release's window; None where the number of layers rules it out."""
    try:
        return replace(args, sliding_window=release.sliding_window)
    except ArgsError:
        return None


IN_QUESTION = ("sliding_window", "vocab_size")


def _grown(args: ModelArgs, release: Release) -> bool:
    """Whether a fine-tune of a release of Mistral's own may have this shape: the same, with words added."""
    same = all(getattr(args, n) == getattr(release, n) for n in (*COMPARED, *PARTS) if n not in IN_QUESTION)
    return same and not release.added_words and release.vocab_size < args.vocab_size < release.vocab_size + 1024


# --- weights


@dataclass(frozen=True)
class StoredBlocks(Stored):
    """A tensor in a GGUF file; `dtype` is what its reader gives, `dtype_name` the GGML type."""

    block_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.block_bytes


# Types that are mapped as they are; all others are widened to fp32.
MAPPED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def open_gguf(gguf: Gguf) -> WeightFiles:
    """The tensors of a model under GGUF's names, rows in Mistral's order; nothing is read, but for a few factors.

    A reader maps F32, F16, BF16 and F64 as they are, and gives all other types in fp32: exactly the numbers that the
    blocks stand for. Types that are not read have "" as `dtype`.

    Raises:
        WeightsError: the file scales its rotary frequencies one by one, or cannot be read.
    """
    from mistral.quant.ggml import DEQUANTIZED

    tensors: dict[str, Stored] = {}
    readers: dict[str, Reader] = {}
    try:
        stamps = {file: stamp_of(file) for file in gguf.files}
    except OSError as error:
        raise WeightsError(f"{error.filename} cannot be read: {error.strerror}") from None
    part = Part(gguf.files[0], 0, 0, stamps[gguf.files[0]])
    for name, tensor in experts_apart(gguf.tensors).items():
        kind = tensor.kind.name
        dtype = MAPPED.get(kind, "float32" if kind in DEQUANTIZED else "")
        tensors[name] = StoredBlocks(tensor.shape, dtype, kind, kind not in MAPPED, block_bytes=tensor.nbytes)
        if not dtype:
            continue  # refused by name before anything is read
        if tensor.path != part.path or tensor.end - part.begin > PART:
            part = Part(tensor.path, tensor.begin, tensor.end, stamps[tensor.path])
        part.end = tensor.end
        if kind in MAPPED:
            readers[name] = partial(part.tensor, tensor.begin, tensor.end, tensor.shape, dtype)
        else:
            readers[name] = BlockReader(part, tensor)
    weights = WeightFiles(gguf.files, tensors, readers)
    for name in tensors:
        if ROPE_FREQS.fullmatch(name) and (name not in readers or not bool((weights.get(name) == 1).all())):
            raise WeightsError(
                f"{short_repr(name)} scales the rotary frequencies (Llama 3.1 and later), which this model does not: "
                "use llama.cpp"
            )
    return weights


@dataclass(frozen=True)
class BlockReader:
    """Reads a tensor that is blocks of few bits in its file: widened to fp32, or the blocks themselves.

    Args:
        part: the part of the file that is mapped for it.
        tensor: where it lies, and its type.
    """

    part: Part
    tensor: GgufTensor

    @property
    def kind(self) -> str:
        """Its GGML type."""
        return self.tensor.kind.name

    def __call__(self, progress: Progress = None) -> Tensor:
        from mistral.quant.ggml import dequantize

        return dequantize(self._mapped(None), self.kind, self.tensor.shape, progress=progress)

    def first(self) -> Tensor:
        """What it has at index 0 of its first dimension, in fp32; nothing else is read."""
        from mistral.quant.ggml import dequantize

        rows, *rest = self.tensor.shape
        return dequantize(self._mapped(None)[: self.tensor.nbytes // rows], self.kind, tuple(rest))

    def raw(self, progress: Progress = None) -> Tensor:
        """Its blocks as they lie in the file, [nbytes] uint8."""
        return self._mapped(progress)

    def _mapped(self, progress: Progress) -> Tensor:
        at = self.tensor
        return self.part.tensor(at.begin, at.end, (at.nbytes,), "uint8", progress)


def multiplied_as_they_are(weights: WeightFiles, args: ModelArgs) -> dict[str, str]:
    """The weights, by Mistral's names, that the C kernels read as the file has them, and their GGML types."""
    known = parameters(args)
    kinds = {n: r.kind for n, r in weights.readers.items() if isinstance(r, BlockReader) and n in known}
    return {
        n: kind for n, kind in kinds.items() if kind in BLOCKS and known[n].role in ("matrix", "output", "embedding")
    }


def is_tied(weights: WeightFiles) -> bool:
    """Whether the output matrix is the embeddings: a file without one, by GGUF's names."""
    return name_of(OUTPUT) not in weights.tensors and name_of(EMBEDDINGS) in weights.tensors


def ignored(gguf: Gguf) -> list[str]:
    """What is in the files and not used, a sentence each."""
    unused = [name for name in gguf.tensors if ROPE_FREQS.fullmatch(name)]
    return [f"{some_names(unused)} ignored: factors of rotary frequencies, all 1"] if unused else []
