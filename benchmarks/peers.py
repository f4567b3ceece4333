"""Side by side with llama.cpp and transformers on a CPU, at the 1.0 B shape with random weights.

    python -m benchmarks.peers FOLDER [ROW ..] [--rounds 5] [--threads 2] [--json FILE]

FOLDER takes the model files that llama.cpp wants (7.5 GB; made when missing). Without a ROW all of them are measured:
decode, prefill, flat, batch, batched, gguf, files, context. Wants `pip install llama-cpp-python gguf transformers`
(llama.cpp is built for the machine, some ten minutes); a peer that is missing is left out. `files` is about the .gguf
files in FOLDER/files, which are yours. `context` is decoding behind long texts, the same file in both programs; --shape
takes 7b (four layers of it) for it, and --types some of the types.

In `decode` and `batched` both programs have the same file of weights in fp32 and bf16, mapped. Where ours were random
weights in ordinary memory, memory was compared with mapped files and not programs with each other: on a virtual machine
the former was read at 23 to 26 GB/s and the latter, in the same minutes, at 35 to 41.

Every program is a process of its own that loads its model once. They are asked in turn, so that all of them see the
machine in the same state; a figure is the median over the rounds, a ratio the median of the ratios within rounds. The
rate of memory is read in each round too, by as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import llama_state
from mistral.args import ModelArgs
from mistral.eval.bench import SHAPES

ARGS = SHAPES["1b"]
SHAPES_HERE = {"1b": ARGS, "7b": dataclasses.replace(SHAPES["7b"], n_layers=4)}
CONTEXTS = (32, 4096, 16384)
CONTEXT, STEPS, PROMPTS = 32, 16, (512, 4096)
GGUF = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
FILES = ("Q8_0", "Q4_0", "Q4_1", "Q4_K_M")  # the same file for both, in the row `gguf`


# --- what runs in a process of its own: a name to two functions, both from numbers to tokens a second


def ours(name: str, threads: int, folder: Path) -> dict[str, Callable[..., float]]:
    """`ours:WEIGHTS[:DTYPE[:WINDOW:LAYERS]]`, or `ours:FILE.gguf[:QUANT][:cache=DTYPE][:prompts=DTYPE]`.

    DTYPE prompts: only prompts are rounded to bfloat16.
    """
    import torch

    from mistral.formats.folder import read_folder
    from mistral.formats.random import random_folder
    from mistral.loader.assemble import assemble
    from mistral.loader.load import windowed
    from mistral.loader.options import LoadOptions

    torch.set_num_threads(threads)
    if ".gguf" in name:
        file, _, quant = name.partition(".gguf")
        more = dict(word.split("=") for word in quant.split(":")[1:] if "=" in word)
        quant = next((word for word in quant.split(":")[1:] if "=" not in word), "")
        no_window = {"sliding_window": "none"} if "context" in more else {}
        given: dict[str, Any] = {"quant": quant or None, "cache_dtype": more.get("cache"), **no_window}
        given["prompt_dtype"] = more.get("prompts")
        found = windowed(read_folder(f"{file}.gguf"), LoadOptions(**given))
        model, run = assemble(found, device="cpu", **given)
        print(run.describe(), file=sys.stderr)
        return _questions(model)
    weights, dtype, window, layers = (*name.split(":"), "", "", "")[:4]
    args = ARGS
    if window:
        args = dataclasses.replace(args, sliding_window=int(window), n_layers=int(layers))
    stored = weights if weights in ("float32", "bfloat16") else "bfloat16"
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": dtype.replace("prompts", "") or "float32",
        "prompt_dtype": "bfloat16" if dtype == "prompts" else None,
        "quant": None if weights == stored else weights,
    }
    model, _ = assemble(random_folder(args, folder, dtype=stored), **options)
    return _questions(model)


def _questions(model: Any) -> dict[str, Callable[..., float]]:
    import torch

    from mistral.eval import bench

    big = torch.ones(1 << 26)

    def read() -> float:
        began = time.perf_counter()
        big.sum()
        return big.nbytes / (time.perf_counter() - began)

    def decode(context: int, batch: int, steps: int) -> float:
        return batch / statistics.median(bench.decode(model, context, batch, steps))

    return {
        "decode": decode,
        "batched": decode,
        "prefill": lambda tokens: tokens / bench.prefill(model, tokens),
        "read": lambda: statistics.median(read() for _ in range(7)),
        "bytes": lambda: bench.weight_bytes(model),
    }


def transformers(name: str, threads: int, folder: Path) -> dict[str, Callable[..., float]]:
    """`transformers:DTYPE`."""
    import torch
    from transformers import MistralForCausalLM

    from mistral.oracle.layerwise import their_config

    torch.set_num_threads(threads)
    torch.set_default_dtype(getattr(torch, name))
    model = MistralForCausalLM(their_config(ARGS)).eval()

    @torch.inference_mode()
    def decode(context: int, batch: int, steps: int) -> float:
        out = model(torch.randint(3, 1000, (batch, context)), use_cache=True)
        times = []
        for _ in range(steps + 1):
            began = time.perf_counter()
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - began)
        return batch / statistics.median(times[1:])

    @torch.inference_mode()
    def prefill(tokens: int) -> float:
        began = time.perf_counter()
        model(torch.randint(3, 1000, (1, tokens)), use_cache=True, logits_to_keep=1)
        return tokens / (time.perf_counter() - began)

    return {"decode": decode, "prefill": prefill}


def llama(name: str, threads: int, folder: Path) -> dict[str, Callable[..., float]]:
    """`llama:WEIGHTS`, or `llama:FILE.gguf[:POSITIONS]`: of its context."""
    name, _, positions = name.partition(".gguf:")
    file = gguf_file(folder, GGUF[name]) if name in GGUF else Path(name.removesuffix(".gguf") + ".gguf")
    L, model, context = llama_state.open_context(file, int(positions or max(PROMPTS) + 512), threads)

    def run(tokens: int) -> float:
        ids = (L.llama_token * tokens)(*[5 + i for i in range(tokens)])
        began = time.perf_counter()
        if L.llama_decode(context, L.llama_batch_get_one(ids, tokens)):
            raise RuntimeError("llama_decode failed")
        L.llama_synchronize(context)
        return time.perf_counter() - began

    def forget() -> None:
        L.llama_memory_clear(L.llama_get_memory(context), True)

    def decode(tokens: int, batch: int, steps: int) -> float:
        forget()
        if tokens > 1024:
            llama_state.fill(L, context, SHAPES_HERE[file.name.partition("-")[0]], tokens)
        else:
            run(tokens)
        return 1 / statistics.median([run(1) for _ in range(steps + 1)][1:])

    def prefill(tokens: int) -> float:
        forget()
        return tokens / run(tokens)

    def batched(tokens: int, batch: int, steps: int) -> float:
        """The faster of its two ways to keep the keys of several sequences: in one buffer for all, or one for each."""
        return max(_llama_batched(L, model, threads, unified, tokens, batch, steps) for unified in (False, True))

    return {"decode": decode, "prefill": prefill, "batched": batched, "keep": lambda: id(model)}


def _llama_batched(L: Any, model: Any, threads: int, unified: bool, tokens: int, batch: int, steps: int) -> float:
    """Tokens a second of llama.cpp's steps in which each of `batch` sequences contributes one token."""
    params = L.llama_context_default_params()
    params.n_ctx = batch * (-(-(tokens + steps + 1) // 256) * 256)
    params.n_seq_max, params.kv_unified = batch, unified
    params.n_threads = params.n_threads_batch = threads
    context = L.llama_init_from_model(model, params)
    given = L.llama_batch_init(max(tokens, batch), 0, 1)

    def put(i: int, position: int, sequence: int, logits: bool) -> None:
        given.token[i], given.pos[i], given.logits[i] = 5 + i, position, logits
        given.n_seq_id[i], given.seq_id[i][0] = 1, sequence

    def run(count: int) -> float:
        given.n_tokens = count
        began = time.perf_counter()
        if L.llama_decode(context, given):
            raise RuntimeError("llama_decode failed")
        L.llama_synchronize(context)
        return time.perf_counter() - began

    for sequence in range(batch):
        for i in range(tokens):
            put(i, i, sequence, i + 1 == tokens)
        run(tokens)
    times = []
    for step in range(steps + 1):
        for sequence in range(batch):
            put(sequence, tokens + step, sequence, True)
        times.append(run(batch))
    L.llama_batch_free(given)
    L.llama_free(context)
    return batch / statistics.median(times[1:])


PROGRAMS = {"ours": ours, "transformers": transformers, "llama": llama}


def gguf_file(folder: Path, type_name: str, shape: str = "", args: ModelArgs = ARGS) -> Path:
    """The model in llama.cpp's format: random weights, made when missing; a mixture of types from those in Q8_0."""
    path = folder / f"{shape}{'-' if shape else ''}{type_name}.gguf"
    if path.exists():
        return path
    if type_name == "Q4_K_M":
        return mixture(gguf_file(folder, "Q8_0"), path)
    gguf: Any = importlib.import_module("gguf")
    import numpy as np

    kind = gguf.GGMLQuantizationType[type_name]
    part = path.with_suffix(".part")
    w = gguf.GGUFWriter(part, "llama")
    w.add_context_length(32768)
    w.add_embedding_length(args.dim)
    w.add_block_count(args.n_layers)
    w.add_feed_forward_length(args.hidden_dim)
    w.add_head_count(args.n_heads)
    w.add_head_count_kv(args.n_kv_heads)
    w.add_key_length(args.head_dim)
    w.add_value_length(args.head_dim)
    w.add_layer_norm_rms_eps(args.norm_eps)
    w.add_rope_dimension_count(args.head_dim)
    w.add_rope_freq_base(1e4)
    w.add_vocab_size(args.vocab_size)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}".encode() for i in range(args.vocab_size)])
    w.add_token_scores([0.0] * args.vocab_size)
    w.add_token_types([1] * args.vocab_size)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    block = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
    made: dict[tuple[int, int], Any] = {}

    def matrix(name: str, n: int, k: int) -> None:
        if (n, k) not in made:
            wide = np.resize(block, (n, k))
            made[n, k] = wide if type_name == "F32" else gguf.quants.quantize(wide, kind)
        w.add_tensor(name, made[n, k], raw_dtype=kind)

    heads, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    matrix("token_embd.weight", args.vocab_size, args.dim)
    matrix("output.weight", args.vocab_size, args.dim)
    w.add_tensor("output_norm.weight", np.ones(args.dim, np.float32))
    for i in range(args.n_layers):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(args.dim, np.float32))
        for name, n, k in (
            ("attn_q", heads, args.dim),
            ("attn_k", keys, args.dim),
            ("attn_v", keys, args.dim),
            ("attn_output", args.dim, heads),
            ("ffn_gate", args.hidden_dim, args.dim),
            ("ffn_up", args.hidden_dim, args.dim),
            ("ffn_down", args.dim, args.hidden_dim),
        ):
            matrix(f"blk.{i}.{name}.weight", n, k)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    part.replace(path)
    return path


def mixture(source: Path, path: Path) -> Path:
    """A file as llama.cpp quantizes it to Q4_K_M."""
    L: Any = importlib.import_module("llama_cpp")
    params = L.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = L.LLAMA_FTYPE_MOSTLY_Q4_K_M, True, 2
    if L.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantize {source}")
    return path


def serve(name: str, threads: int, folder: Path) -> None:
    """Answer questions, a line each, until there are no more."""
    program, _, rest = name.partition(":")
    functions = PROGRAMS[program](rest, threads, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        what, numbers = json.loads(line)
        print(functions[what](*numbers), flush=True)


# --- who asks


class Worker:
    """A program in a process of its own."""

    def __init__(self, name: str, threads: int, folder: Path) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peers", str(folder), "--threads", str(threads), "--serve", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return line.strip()

    def ask(self, what: str, *numbers: int) -> float:
        """Ask one thing; wait for the answer."""
        assert self.process.stdin is not None
        print(json.dumps([what, numbers]), file=self.process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def there(name: str) -> bool:
    """Whether a program can be run here."""
    module = {"llama": "llama_cpp", "transformers": "transformers"}.get(name.partition(":")[0])
    return module is None or importlib.util.find_spec(module) is not None


class Bench:
    """Measurements, printed as they come, kept for a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.threads, self.rounds, self.folder = options.threads, options.rounds, options.folder
        self.shape, self.types, self.caches = options.shape, options.types, options.caches
        self.found: list[dict[str, Any]] = []

    def compare(self, title: str, names: Sequence[str], *questions: Any) -> None:
        """Ask each program each question once a round; the first of the answers is what the others are held against.

        Questions are [what, numbers]; decoding also reads the rate of memory in each round.
        """
        workers = [Worker(name, self.threads, self.folder) for name in names if there(name)]
        asked = [(w, q) for w in workers for q in questions]
        answers: list[list[float]] = [[] for _ in asked]
        reads = []
        for n in range(self.rounds + 1):
            got = [w.ask(*q) for w, q in asked]
            if questions[0][0] == "decode":
                read = workers[0].ask("read")
            if n:  # the first round of a process is slower
                for mine, value in zip(answers, got, strict=True):
                    mine.append(value)
                if questions[0][0] == "decode":
                    reads.append(read)
        size = workers[0].ask("bytes") if reads else 0
        for w in workers:
            w.close()
        print(f"\n{title}")
        for (w, q), mine in zip(asked, answers, strict=True):
            row: dict[str, Any] = {"row": title, "program": w.name, "question": q, "rates": mine}
            row["median"] = statistics.median(mine)
            first = answers[questions.index(q)]  # the first program's, to the same question
            row["first over this"] = statistics.median(a / b for a, b in zip(first, mine, strict=True))
            text = f"  {w.name:34} {' '.join(map(str, q)):20} {row['median']:8.1f} tokens/s"
            text += f"   first {row['first over this']:.2f}x"
            if reads and w is workers[0] and q[0] == "decode":
                row["share of memory"] = statistics.median(a * size / r for a, r in zip(mine, reads, strict=True))
                row["read"] = statistics.median(reads)
                text += f"   {row['share of memory']:.0%} of {row['read'] / 1e9:.0f} GB/s"
            print(text, flush=True)
            self.found.append(row)

    def decode(self) -> None:
        """One sequence at a short context, each kind of weights beside the peer's nearest."""
        question = ("decode", CONTEXT, 1, STEPS)
        for weights in ("float32", "bfloat16"):
            names = [self._ours(weights), f"llama:{weights}", f"transformers:{weights}"]
            self.compare(f"decode, {weights} weights", names, question)
        for weights in ("int8", "int4"):
            self.compare(f"decode, {weights} weights", [f"ours:{weights}", f"llama:{weights}"], question)

    def prefill(self) -> None:
        """Prompts of 512 and of 4096 tokens."""
        for tokens in PROMPTS:
            question = ("prefill", tokens)
            names = ["ours:float32", "llama:float32", "transformers:float32"]
            self.compare(f"prefill of {tokens}, float32 weights", names, question)
            mine = [f"ours:bfloat16{dtype}" for dtype in (":prompts", "", ":bfloat16")]
            names = [*mine, "llama:bfloat16", "transformers:bfloat16"]
            self.compare(f"prefill of {tokens}, bfloat16 weights", names, question)
            for weights in ("int8", "int4"):
                names = [f"ours:{weights}", f"llama:{weights}"]
                self.compare(f"prefill of {tokens}, {weights} weights", names, question)

    def flat(self) -> None:
        """The cost of a token against the prompt's length, with a window: two layers, since each costs the same."""
        self.compare("prefill, W 1024", ["ours:bfloat16::1024:2"], ("prefill", 2048), ("prefill", 32768))
        self.compare("prefill, W 4096", ["ours:bfloat16::4096:2"], ("prefill", 8192), ("prefill", 32768))

    def batch(self) -> None:
        """Eight sequences together against one."""
        for weights in ("float32", "bfloat16"):
            questions = (("decode", CONTEXT, 8, STEPS), ("decode", CONTEXT, 1, STEPS))
            self.compare(f"decode, 8 sequences, {weights} weights", [f"ours:{weights}"], *questions)

    def batched(self) -> None:
        """Eight and 32 sequences together, beside the peer's batches."""
        for weights in GGUF:
            questions = [("batched", CONTEXT, count, STEPS) for count in (8, 32)]
            self.compare(f"decode of several, {weights} weights", [self._ours(weights), f"llama:{weights}"], *questions)

    def _ours(self, weights: str) -> str:
        """This library with such weights: with the peer's own file, where it has them as they are."""
        if weights in ("float32", "bfloat16") and there("llama"):
            return f"ours:{gguf_file(self.folder, GGUF[weights])}"
        return f"ours:{weights}"

    def gguf(self) -> None:
        """The same file for both: the 1.0 B shape in several types."""
        self.same([gguf_file(self.folder, name) for name in FILES])

    def files(self) -> None:
        """The same file for both: each in FOLDER/files, which are yours."""
        self.same(sorted((self.folder / "files").glob("*.gguf")))

    def context(self) -> None:
        """Decoding behind long texts, without a window; ours with keys in 16 bits, as theirs, and in fp32 and int8."""
        for name in self.types:
            file = gguf_file(self.folder, name, self.shape, SHAPES_HERE[self.shape])
            ours = [f"ours:{file}:context=long:cache={cache}" for cache in self.caches]
            names = [*ours, f"llama:{file}:{CONTEXTS[-1] + PROMPTS[0]}"]
            self.compare(f"{self.shape}, {name}", names, *(("decode", c, 1, STEPS) for c in CONTEXTS))

    def same(self, files: Sequence[Path]) -> None:
        """Decode and prefill of files."""
        for file in files:
            names = [f"ours:{file}", f"llama:{file}"]
            self.compare(file.name, names, ("decode", CONTEXT, 1, STEPS), ("prefill", PROMPTS[0]))


ROWS = ("decode", "prefill", "flat", "batch", "batched", "gguf", "files", "context")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES_HERE, default="1b", help="of the row context")
    parser.add_argument("--types", nargs="+", default=["BF16", "Q4_0"], help="of the row context")
    parser.add_argument("--caches", nargs="+", default=["float16"], help="of ours in the row context")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads, options.folder)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if there("llama") and {"decode", "prefill", "batched"} & set(options.rows or ROWS):
        for weights in GGUF.values():
            gguf_file(options.folder, weights)
    bench = Bench(options)
    for row in options.rows or ROWS:
        getattr(bench, row)()
    if options.json:
        options.json.write_text(json.dumps(bench.found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
