"""What quantized weights cost: perplexity and KL of a model on a text, and the error of random layers in 7B's shapes;
beside llama.cpp's types.

    python -m benchmarks.quality [MODEL] [--text FILE] [--tokens N] [--calibrate FILE] [--llama FOLDER] [--rough]

MODEL is the bundled one if omitted, the text the story that was held out of its training. Only weights differ: all are
dequantized and multiplied in fp32 by the same model. --llama has llama.cpp quantize the model into FOLDER (needs
`pip install llama-cpp-python gguf`; files that are there already are taken). --rough adds noise to each weight first,
of half a step of a 4-bit group, for a model whose weights lie on the grid of a 4-bit type: no type is then the one that
they came in.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.eval.bench import SHAPES
from mistral.fast.ggml_types import BY_NAME
from mistral.fast.layout import bytes_of
from mistral.formats.folder import Folder, read_folder
from mistral.formats.gguf import name_of
from mistral.loader.calibration import mean_squares
from mistral.loader.load import Loaded, load
from mistral.logprobs import logprobs
from mistral.parameters import parameters
from mistral.quant import KINDS, ggml, quantize
from mistral.quant.linear import Int4Linear
from mistral.tokenizer import encode

STORY = Path(__file__).parents[1] / "tests" / "data" / "dwarf_long_nose.txt"
# llama_ftype by the names that llama-quantize takes.
FILES = {"Q8_0": 7, "Q4_0": 2, "IQ4_XS": 30, "IQ4_NL": 25, "Q4_K_S": 14}
TYPES = ("Q8_0", "Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K")
Bits = tuple[float, float]  # a weight, of matrices in layers, and of all weights


# --- llama.cpp's


def write_gguf(path: Path, model: Loaded, state: Mapping[str, Tensor]) -> None:
    """The model as a GGUF file in F32, without a tokenizer."""
    gguf: Any = importlib.import_module("gguf")
    args, writer = model.args, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    for name in parameters(args):
        writer.add_tensor(name_of(name), state[name].float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_files(folder: Path, model: Loaded, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Folder]]:
    """The model in each of llama.cpp's types, with its own choice of what stays in more bits."""
    L: Any = importlib.import_module("llama_cpp")
    silent = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    folder.mkdir(exist_ok=True)
    source = folder / "F32.gguf"
    for name, number in FILES.items():
        params = L.llama_model_quantize_default_params()
        params.ftype, params.nthread = number, torch.get_num_threads()
        made = folder / f"{name}.gguf"
        if not made.exists() and not source.exists():
            write_gguf(source, model, state)
        if not made.exists() and L.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")
        yield name, read_folder(made)


def llama_rounded(weight: Tensor, kind: str) -> Tensor:
    """[n, k] weights through one of llama.cpp's types."""
    L: Any = importlib.import_module("llama_cpp")
    (place,) = (Path(L.__file__).parent / "lib").glob("libggml-base.so")
    about, raw = (
        BY_NAME[kind],
        torch.empty(weight.numel() * BY_NAME[kind].nbytes // BY_NAME[kind].elements, dtype=torch.uint8),
    )
    quantize_chunk = ctypes.CDLL(str(place)).ggml_quantize_chunk
    size = (ctypes.c_int64(i) for i in (0, *weight.shape))
    data, out = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(raw.data_ptr())
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk(ctypes.c_int(about.number), data, out, *size, ctypes.c_void_p(0))
    return ggml.dequantize(raw, kind, tuple(weight.shape))


# --- one model, many weights


def roughened(weight: Tensor) -> Tensor:
    """Each weight moved by up to half of its group's step: the least distance of two different weights in the group."""
    if weight.shape[-1] % 32:
        return weight
    groups = weight.unflatten(-1, (-1, 32))
    apart = groups.sort(-1).values.diff(dim=-1)
    step = torch.where(apart <= 1e-7, torch.inf, apart).amin(-1, keepdim=True)
    noise = torch.rand(groups.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return (groups + noise * torch.where(step.isinf(), 0.0, step)).flatten(-2)


class Scores:
    """A model whose weights are replaced, and its cost on a text against those that it had."""

    def __init__(self, base: Loaded, ids: Tensor) -> None:
        self.model, self.ids = base.model, ids
        self.known = parameters(base.args)
        self.layers = [name for name, p in self.known.items() if p.role == "matrix"]
        self.state = {name: self.model.get_parameter(name).data.clone() for name in self.known}
        self.want = self.logprobs()

    @torch.inference_mode()
    def logprobs(self) -> Tensor:
        return logprobs(self.model(self.ids, [len(self.ids)]))[:-1]

    def put(self, weight: Callable[[str], Tensor | None]) -> None:
        """Replace each weight that there is another one of."""
        for name in self.known:
            new = weight(name)
            self.model.get_parameter(name).data.copy_(self.state[name] if new is None else new)

    def report(self, name: str, bits: Bits) -> None:
        """One row, for the weights that are in place."""
        got = self.logprobs()
        perplexity = (-got.gather(-1, self.ids[1:, None]).mean()).exp()
        kl = (self.want.exp() * (self.want - got)).sum(-1)
        same = (got.argmax(-1) == self.want.argmax(-1)).double().mean()
        pairs = [(self.model.get_parameter(n).data, self.state[n]) for n in self.layers]
        off = sum(float((w - old).square().sum()) for w, old in pairs) / sum(
            float(old.square().sum()) for _, old in pairs
        )
        print(
            f"{name:18} {bits[0]:7.3f} {bits[1]:7.3f} {off**0.5:9.5f} {perplexity:10.3f} {kl.mean():9.5f} {same:9.1%}",
            flush=True,
        )

    def bits(self, nbytes: Callable[[str], float]) -> Bits:
        """Bits a weight, from the bytes of each tensor."""
        each = [
            8 * sum(map(nbytes, names)) / sum(self.known[n].numel for n in names) for names in (self.layers, self.known)
        ]
        return each[0], each[1]


def ours(scores: Scores, columns: Mapping[str, Tensor] | None) -> None:
    """A row for each kind of ours; what is not quantized counts 16 bits."""

    def row(title: str, quant: str, columns: Mapping[str, Tensor]) -> None:
        def dequantized(name: str) -> Tensor | None:
            parameter = scores.known[name]
            if not parameter.quantized:
                return None
            module = quantize(parameter, scores.state[name], quant, columns=columns.get(name))
            return module.rows(0, parameter.shape[0])

        scores.put(dequantized)
        scores.report(title, scores.bits(lambda name: bytes_of(scores.known[name], quant, 2)))

    for quant in KINDS:
        row(quant, quant, {})
    if columns is not None:
        row("int4 calibrated", "int4", columns)


def theirs(scores: Scores, folder: Path, base: Loaded) -> None:
    """A row for each of llama.cpp's types: the layers in it; then, where they differ, embeddings and output too."""
    for name, found in llama_files(folder, base, scores.state):

        def nbytes(name: str, found: Folder = found) -> float:
            kind = BY_NAME[found.tensors[name].dtype_name]
            return found.tensors[name].parameters * kind.nbytes / kind.elements

        def of_layers(name: str, found: Folder = found) -> Tensor | None:
            return found.weights.get(name) if name in scores.layers else None

        scores.put(of_layers)
        bits = scores.bits(nbytes)
        rest = [n for n in scores.known if n not in scores.layers]
        same = all(torch.equal(found.weights.get(n), scores.state[n]) for n in rest)
        scores.report(name, bits if same else (bits[0], math.nan))
        if not same:
            scores.put(found.weights.get)
            scores.report(f"{name}, all of it", bits)


def random_layers(with_llama: bool) -> None:
    """The error of random weights in 7B's shapes: normal, and with heavier tails."""
    print("\nrandom weights, 256 rows of 4096: |error| / |weights|, root mean squares")
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, SHAPES["7b"].dim, generator=generator) * 0.02
    tails = normal * (2 / torch.randn(4, *normal.shape, generator=generator).square().sum(0).clamp(min=0.05)).sqrt()
    for title, weight in (("normal", normal), ("Student's t, 4 degrees", tails)):

        def error(rounded: Tensor, weight: Tensor = weight) -> str:
            return f"{(rounded - weight).norm() / weight.norm():.5f}"

        found = {name: error(kind.of(weight).rows(0, len(weight))) for name, kind in KINDS.items()}
        found["int4 symmetric"] = error(Int4Linear.of(weight).rows(0, len(weight)))
        found |= {name: error(llama_rounded(weight, name)) for name in TYPES} if with_llama else {}
        print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, default=STORY)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--rough", action="store_true")
    given = parser.parse_args()
    base = load(given.model, device="cpu", dtype="float32", execution="eager", quant="none")
    tokenizer = base.tokenizer
    if given.rough:
        for name, parameter in parameters(base.args).items():
            if parameter.role == "matrix":
                weight = base.model.get_parameter(name)
                weight.data = roughened(weight.data)
    ids = torch.tensor(encode(tokenizer, given.text.read_text(encoding="utf-8")))[: given.tokens]
    columns = None
    if given.calibrate is not None:
        columns = mean_squares(base.model, encode(tokenizer, given.calibrate.read_text(encoding="utf-8")))
    scores = Scores(base, ids)
    print(f"{base.folder.name}{', roughened' if given.rough else ''}, {len(ids)} tokens of {given.text.name}")
    print(f"{'':18} bits in layers, in all, error {'perplexity':>13} {'mean KL':>9} {'same top':>9}")
    scores.report("as loaded", (math.nan, math.nan))
    ours(scores, columns)
    if given.llama is not None:
        theirs(scores, given.llama, base)
    random_layers(given.llama is not None)


if __name__ == "__main__":
    main()
