"""Mistral 7B in one file: read it from top to bottom and you know how the model works.

    python -m one_file_ref [FOLDER] [--max_tokens 35] [--device cpu|cuda] [--dtype float32] [--chunk_size N]

continues three prompts greedily, in one batch, and prints them. FOLDER holds params.json, the weights
(consolidated*.safetensors or consolidated.00.pth) and the tokenizer; without it the small bundled model runs.

This is the plain version of all dense members of the family: nothing is fused, captured or quantized, nothing imported
from mistral/. The library is tested against it, so it says what is meant wherever two readings are possible.

Shapes: T packed tokens of a forward, B sequences, n tokens of one of them, H query heads, K key/value heads, D head
dim, W sliding window, S cache slots, L layers, V vocabulary. Positions are absolute and start at 0.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

BUNDLED = Path(__file__).resolve().parent / "mistral" / "bundled"
PROMPTS = ["This is a test", "This is another test", "This is a third test, mistral AI is very good at testing. "]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
TOKENIZERS = ["tekken.json", *(f"tokenizer.model{v}" for v in (".v7m1", ".v7", ".v3", ".v2", ".v1", ""))]  # in order
HARMLESS = {"max_seq_len", "max_batch_size", "max_position_embeddings", "dtype", "model_type", "lora"}  # not read,
HARMLESS |= {"vision_encoder", "multimodal"}  # nor are tensors of the part that reads images:
IMAGES = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
UNUSED = {"causal": True, "activation": "silu", "kv_lora_rank": -1, "qk_nope_head_dim": -1}  # what such a key must have
UNUSED |= dict.fromkeys(("use_biases", "attn_bias", "qk_norm"), False)
ORIGINAL = "original_max_position_embeddings"  # length of the texts of the first training
YARN, GROWTH = {"factor", ORIGINAL, "alpha", "beta", "apply_scale", "attention_factor"}, {"beta", ORIGINAL}


@dataclass
class ModelArgs:
    """The contents of params.json. Mistral 7B v0.1: 4096, 32, 128, 14336, 32, 8, 1e-5, 32000, window 4096."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    sliding_window: int | list[int | None] | None = None  # a list repeats over the layers; None is full attention
    rope_theta: Any = None  # a number; None: chosen below
    tied_embeddings: bool = False  # the output matrix is that of the embeddings
    yarn: Any = None  # positions stretched for long texts: see `frequencies`
    llama_4_scaling: Any = None  # queries that grow with their position: see `rope_angles`
    theta_rule: str = field(init=False, default="given")
    windows: list[int | None] = field(init=False)  # W of each layer

    def __post_init__(self) -> None:
        windows = self.sliding_window if isinstance(self.sliding_window, list) else [self.sliding_window]
        sizes = [(f.name, getattr(self, f.name)) for f in fields(self) if f.type == "int"]
        for name, n in sizes + [("sliding_window", w) for w in windows if w is not None]:
            if type(n) is not int or n < 1:
                raise ValueError(f"{name} must be a positive integer, not {n!r}")
        if not windows or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError("sliding_window is an empty list, n_heads no multiple of n_kv_heads, or head_dim odd")
        self.windows = [windows[layer % len(windows)] for layer in range(self.n_layers)]
        if self.rope_theta is None:  # v0.1 has a window and needs 1e4; Mixtral 8x7B has none and needs 1e6
            self.rope_theta = 1e4 if any(windows) else 1e6
            self.theta_rule = f"chosen: no rope_theta and {'a' if any(windows) else 'no'} sliding window declared"
        for name in ("norm_eps", "rope_theta"):
            if type(value := getattr(self, name)) not in (int, float) or not value > 0:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        for part, needed, known in ((self.yarn, "factor", YARN), (self.llama_4_scaling, "beta", GROWTH)):
            right = part is None or {needed, ORIGINAL} <= {k for k, v in part.items() if v is not None} <= known
            if not right or not all(v is None or v is False or v > 0 for v in (part or {}).values()):
                raise ValueError(f"{part} must have {needed} and {ORIGINAL}, of {sorted(known)}, all above 0")

    @staticmethod
    def from_folder(folder: Path) -> ModelArgs:
        """Read params.json. A key that this file does not know is refused: it might describe another model."""
        if not (path := folder / "params.json").is_file():
            raise ValueError(f"no params.json in {folder}" if folder.is_dir() else f"no folder is at {folder}")
        known = [f.name for f in fields(ModelArgs) if f.init]
        try:
            params = json.loads(path.read_text(encoding="utf-8-sig"))
            params = {k: v for k, v in params.items() if k not in HARMLESS and v not in (None, UNUSED.get(k))}
            if "moe" in params:
                raise ValueError("a mixture of experts (Mixtral) is more than this file has: use python -m main")
            if "_sliding_window" in params and params.get("sliding_window") in (None, params["_sliding_window"]):
                params["sliding_window"] = params.pop("_sliding_window")  # how some releases spell it
            if isinstance(window := params.get("sliding_window"), str):  # a number, null, none or nothing
                params["sliding_window"] = None if window.strip().lower() in ("", "none", "null") else int(window)
            unknown, missing = params.keys() - {*known}, {*known[:8]} - params.keys()
            if unknown or missing:
                raise ValueError(f"unknown keys: {sorted(unknown)}, missing keys: {sorted(missing)}")
            return ModelArgs(**params)
        except (ValueError, AttributeError, TypeError, RecursionError) as e:  # refused above, or no object in JSON
            why = e if type(e) in (ValueError, TypeError) else "no JSON object, or not all of it: fetch it again"
            raise ValueError(f"{path}: {why}") from e


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: half precision is for storage and matrix products; sums and angles need more bits."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # [T, dim] -> [T, dim]
        y = wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight  # cast first, then scale: in bf16 the order shows


def frequencies(args: ModelArgs) -> tuple[Tensor, float]:
    """By what angle each pair of a head turns from one position to the next, [D/2] fp32, and a factor of cos and sin.
    Pair i turns by theta^(-2i/D): the first fast, the last slowly, like the hands of a clock. YaRN slows slow pairs
    down by `factor`, for texts as much longer than those of the first training, and leaves fast ones as they are."""
    # On the CPU, in fp32, in exactly this spelling: others differ by a bit, which at position 100,000 is 1e-2 of angle.
    D, theta, yarn = args.head_dim, args.rope_theta, {k: v for k, v in (args.yarn or {}).items() if v is not None}
    powers = theta ** (torch.arange(0, D, 2).float() / D)  # [D/2]
    if not yarn:
        return 1.0 / powers, 1.0
    turns = yarn.get("beta", 32), yarn.get("alpha", 1)  # of pairs on either side of the ramp, over the original length
    fast, slow = (D * math.log(yarn[ORIGINAL] / (2 * math.pi * n)) / (2 * math.log(theta)) for n in turns)
    low, high = (min(max(pair, 0), D - 1) for pair in (math.floor(fast), math.ceil(slow)))
    ramp = ((torch.arange(D // 2).float() - low) / (high - low or 0.001)).clamp(0, 1)  # 0: as it is, 1: slowed down
    factor = 0.1 * math.log(yarn["factor"]) + 1 if yarn.get("apply_scale", True) else 1.0
    return 1.0 / (yarn["factor"] * powers) * ramp + 1.0 / powers * (1 - ramp), yarn.get("attention_factor", factor)


def rope_angles(positions: Tensor, args: ModelArgs) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [T, D/2], fp32, of the angles by which the pairs of a head turn at these positions [T]; and [T, 1] by
    how much queries, and no key, grow there: in steps, with the logarithm of the original lengths that lie behind."""
    turn, factor = frequencies(args)
    angles = torch.outer(positions.float(), turn)  # [T, D/2]
    grow = args.llama_4_scaling or {"beta": 0.0, ORIGINAL: 1}
    growth = 1 + grow["beta"] * torch.log(1 + (positions // grow[ORIGINAL]).float())
    return angles.cos() * factor, angles.sin() * factor, growth[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the adjacent pairs (2i, 2i+1) of x [T, heads, D] by their angles. A query and a key then meet at an angle
    that depends on q - k only: this is how attention knows about distance."""
    a, b = wide(x)[..., 0::2], wide(x)[..., 1::2]  # [T, heads, D/2] each
    cos, sin = cos[:, None].to(a.dtype), sin[:, None].to(a.dtype)  # [T, 1, D/2]: the same for all heads
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """The mask [n, keys]: a query sees a key if 0 <= q - k < W: that is W keys, its own included. k_pos is -1 where a
    cache slot is still empty. Across L layers information travels L * (W - 1) positions."""
    distance = q_pos[:, None] - k_pos[None, :]
    return (distance >= 0) & (distance < (window or math.inf)) & (k_pos >= 0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one sequence: q [n, H, D], k and v [keys, K, D], mask [n, keys] -> [n, H * D]. Query head h
    reads key/value head h // (H/K): neighbours share one, so the cache is H/K times smaller."""
    groups = wide(q).unflatten(1, (k.shape[1], -1))  # [n, K, H/K, D]
    scores = torch.einsum("nkgd,skd->kgns", groups, wide(k)) * q.shape[-1] ** -0.5  # [K, H/K, n, keys]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("kgns,skd->nkgd", weights, wide(v)).flatten(1).to(q.dtype)


class Cache:
    """Rolling buffers: keys and values of `rows` sequences, up to `max_positions` tokens each; lengths says how many.
    Position i lives in slot i % S, so a new token takes the place of one that is out of view. Keys are stored after
    rotation, and each slot knows its position (-1 is empty), so slots need never be put back in order."""

    def __init__(self, args: ModelArgs, rows: int, max_positions: int, device: Any = "cpu", dtype: Any = torch.float32):
        self.max_positions, self.lengths = max_positions, [0] * rows
        slots = [min(window or max_positions, max_positions) for window in args.windows]  # S of each layer
        shapes = [(rows, S, args.n_kv_heads, args.head_dim) for S in slots]
        # Zeros, not empty: a masked slot weighs 0, but 0 * NaN would be NaN.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]  # L times [B, S, K, D]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.positions = [torch.full((rows, S), -1, device=device) for S in slots]  # L times [B, S]

    def extend(self, layer: int, row: int, k: Tensor, v: Tensor, positions: Tensor) -> list[Tensor]:
        """What n new tokens may look at: the stored keys, values and positions, then their own. Stores the latter, once
        they are joined: the first new token still needs keys that the last one displaces."""
        buffers = [self.k[layer][row], self.v[layer][row], self.positions[layer][row]]  # views
        joined = [torch.cat(pair) for pair in zip(buffers, (k, v, positions), strict=True)]  # [S + n, ...]
        S = len(buffers[0])
        for buffer, new in zip(buffers, (k, v, positions), strict=True):
            buffer[positions[-S:] % S] = new[-S:]  # of a chunk longer than the buffer only the end stays
        return joined


class Attention(nn.Module):
    """Tokens look at earlier tokens of their own sequence: the only place where positions mix."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.head_dim = layer, args.windows[layer], args.head_dim
        q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq, self.wo = nn.Linear(args.dim, q, bias=False), nn.Linear(q, args.dim, bias=False)
        self.wk, self.wv = (nn.Linear(args.dim, kv, bias=False) for _ in "kv")

    def forward(self, x: Tensor, where: list[Tensor], seqlens: list[int], cache: Cache | None) -> Tensor:
        cos, sin, growth, positions = where  # of the tokens x [T, dim]; the result is [T, dim] too
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # [T, H or K, D]
        packed = (rotate(q, cos * growth, sin * growth), rotate(k, cos, sin), v, positions)
        outputs = []
        for row, (q, k, v, pos) in enumerate(zip(*(t.split(seqlens) for t in packed), strict=True)):
            if len(pos):  # otherwise this sequence has nothing to say in this step
                keys, values, k_pos = (k, v, pos) if cache is None else cache.extend(self.layer, row, k, v, pos)
                outputs.append(attend(q, keys, values, visible(pos, k_pos, self.window)))
        return self.wo(torch.cat(outputs))


class FeedForward(nn.Module):
    """SwiGLU: w1 is a gate on what w3 brings up to hidden_dim, w2 brings it down again."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(args.dim, args.hidden_dim, bias=False) for _ in "13")
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, dim] -> [T, dim]
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: attention and feed-forward, each adding to the stream it reads a normalized copy of."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(args, layer), FeedForward(args)
        self.attention_norm, self.ffn_norm = (RMSNorm(args.dim, args.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, *step: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *step)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The model; its parameters are named as in Mistral's checkpoints."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, ids: Tensor, seqlens: list[int], cache: Cache | None = None) -> Tensor:
        """Logits [T, V], fp32 or wider, of ids [T]: the next seqlens[i] tokens (0 is fine) of sequence i, end to end.
        No token sees another sequence. Without a cache every sequence starts at 0, causal and windowed all the same."""
        if ids.dim() != 1 or len(ids) == 0 or len(ids) != sum(seqlens) or min(seqlens) < 0:
            raise ValueError(f"ids of shape {list(ids.shape)} do not fit seqlens {seqlens}")
        starts = [0] * len(seqlens) if cache is None else cache.lengths
        ends = [start + n for start, n in zip(starts, seqlens, strict=True)]
        if cache is not None and max(ends) > cache.max_positions:
            raise ValueError(f"{max(ends)} positions do not fit a cache made for {cache.max_positions}")
        positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=True)])  # [T]
        ids, *where = (t.to(self.norm.weight.device) for t in (ids, *rope_angles(positions, self.args), positions))
        h = self.tok_embeddings(ids)  # [T, dim]
        for layer in self.layers:
            h = layer(h, where, seqlens, cache)
        if cache is not None:
            cache.lengths = ends  # only now: all layers must agree on where this step began
        return wide(self.output(self.norm(h)))


@torch.inference_mode()
def generate(
    prompts: list[list[int]], model: Transformer, max_tokens: int, eos_id: int | None, chunk_size: int | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Continue each prompt greedily by up to max_tokens ids; a row ends before eos_id, the others go on without it.
    Returns the new ids, and per row the log-probability (softmax in float64) of prompt tokens 1.. and then of the new
    ones. max_tokens = 0 scores the prompts. chunk_size bounds the prompt tokens read at once, and with them memory."""
    if max_tokens < 0 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"max_tokens must be at least 0, chunk_size at least 1, not {max_tokens} and {chunk_size}")
    if any(not prompt or min(prompt) < 0 or max(prompt) >= model.args.vocab_size for prompt in prompts):
        raise ValueError(f"each prompt must have ids, all in 0..{model.args.vocab_size - 1}")
    longest, weight = max(map(len, prompts)), model.output.weight
    cache = Cache(model.args, len(prompts), longest + max_tokens, weight.device, weight.dtype)
    texts, logprobs = [list(prompt) for prompt in prompts], [list[float]() for _ in prompts]
    # A step takes what the cache lacks of each text: a chunk of its prompt, or the id that is new.
    while any(step := [text[n : n + (chunk_size or longest)] for text, n in zip(texts, cache.lengths, strict=True)]):
        seqlens = [len(ids) for ids in step]
        logits = model(torch.tensor([i for ids in step for i in ids]), seqlens, cache).split(seqlens)
        for prompt, text, rows, scores, n in zip(prompts, texts, logits, logprobs, cache.lengths, strict=True):
            more = len(rows) and n == len(text) < len(prompt) + max_tokens
            if more and (pick := int(rows[-1].argmax())) != eos_id:  # ties go to the lowest id
                text.append(pick)
            following = text[n - len(rows) + 1 : n + 1]
            scores += [float(row.double().log_softmax(-1)[i]) for row, i in zip(rows, following, strict=False)]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)], logprobs


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights: one .safetensors or a numbered set, else one .pth."""
    if files := sorted(folder.glob("consolidated*.safetensors")) or sorted(folder.glob("consolidated.00.pth")):
        return files
    raise ValueError(f"no consolidated*.safetensors or consolidated.00.pth in {folder}")


def read_tensors(path: Path) -> dict[str, Any]:
    """Tensors by name. The file is mapped, not read: its bytes come in when they are used."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))  # a pickle's code is refused
    except Exception as e:  # whatever those libraries raise
        why = "it holds more than tensors, perhaps code" if isinstance(e, pickle.UnpicklingError) else e
        raise ValueError(f"{path} was not loaded: {why}") from e


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model in a folder, every tensor accounted for. dtype None: float32 on the CPU, bfloat16 on cuda."""
    folder, dtype = Path(folder), dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no cuda device here")
    with torch.device("meta"):  # shapes without memory; the tensors of the file become the parameters
        model = Transformer(ModelArgs.from_folder(folder))
    expected = {name: list(p.shape) for name, p in model.state_dict().items()}
    state, problems = dict[str, Tensor](), list[str]()
    for name, tensor in (pair for path in weight_files(folder) for pair in read_tensors(path).items()):
        if str(name).startswith(IMAGES):
            continue
        if name not in expected or name in state or not isinstance(tensor, Tensor):
            problems.append(f"{name} is {'there twice' if name in state else 'unknown'}")
            continue
        if tensor.dtype not in DTYPES.values() or list(tensor.shape) != expected[name]:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, params.json says {expected[name]}")
        state[name] = tensor.to(device, dtype)
    if model.args.tied_embeddings and (embeddings := state.get("tok_embeddings.weight")) is not None:
        state.setdefault("output.weight", embeddings)  # one of its own, where there is one, is what was meant
    if problems := problems + [f"{name} is missing" for name in expected if name not in state]:
        raise ValueError(f"{len(problems)} tensors of {folder} do not fit: {'; '.join(problems[:8])}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_tokenizer(folder: Path) -> tuple[Any, Any, int, int]:
    """encode (beginning of sequence first), decode, the number of ids, and the id that ends a text."""
    if not (paths := [folder / name for name in TOKENIZERS if (folder / name).is_file()]):
        raise ValueError(f"no tokenizer.model or tekken.json in {folder}")
    try:
        if paths[0].suffix == ".json":
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer

            tekken = Tekkenizer.from_file(paths[0])
            return partial(tekken.encode, bos=True, eos=False), tekken.decode, tekken.n_words, tekken.eos_id
        sp = SentencePieceProcessor(model_file=str(paths[0]))
        return partial(sp.encode, add_bos=True), sp.decode, sp.vocab_size(), sp.eos_id()
    except Exception as e:  # whatever those libraries raise: a broken file, mistral-common not installed
        raise ValueError(f"{paths[0]} cannot be read: {e}") from e


def main() -> None:  # texts go to stdout, what was loaded to stderr
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)  # one line, like all other errors

    parser = Parser(prog="python -m one_file_ref", allow_abbrev=False, description="Greedy continuation of 3 prompts.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="default: the small bundled model")
    parser.add_argument("--max_tokens", type=int, default=35)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--chunk_size", type=int, help="read prompts in pieces of so many tokens")
    options = parser.parse_args()
    folder, note = options.folder or BUNDLED, "" if options.folder else " (the bundled model: no FOLDER given)"
    prompts = PROMPTS if options.folder else json.loads((BUNDLED / "prompts.json").read_text(encoding="utf-8"))
    model = load(folder, options.device, DTYPES.get(options.dtype))
    encode, decode, n_words, eos_id = load_tokenizer(folder)
    args, files = model.args, " ".join(path.name for path in weight_files(folder))
    what = f"{files}, {options.device}, {str(model.output.weight.dtype).removeprefix('torch.')}, window "
    what += f"{args.sliding_window}, rope_theta {args.rope_theta:g} ({args.theta_rule})"
    print(f"loaded {folder}{note}: {what}", file=sys.stderr)
    prompt_ids = [encode(prompt) for prompt in prompts]
    new_ids, _ = generate(prompt_ids, model, options.max_tokens, eos_id, options.chunk_size)
    for prompt, new in zip(prompt_ids, new_ids, strict=True):
        print(decode([i for i in prompt + new if i < n_words]), "=" * 21, sep="\n")  # some ids may have no text


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # what the caller can change, in one line
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
