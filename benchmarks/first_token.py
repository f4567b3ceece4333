"""Seconds to the first token of a 7B on disk, a whole process from its start, beside llama.cpp.

    python -m benchmarks.first_token FOLDER [--rounds 3] [--threads 2] [--shape 7b]

FOLDER takes two models of random weights (8.5 GB; made when missing): one in int4, as `convert` writes it, and one in
Q4_0. Wants `pip install llama-cpp-python gguf`. The programs take turns; each round begins with reading both files, so
that the system has them in memory as far as it can. The prompt has 16 tokens, and the most likely token is chosen.

llama.cpp is called from Python, whose start and import are not its own: its seconds are also given without them, from
the moment that it begins to load. It puts Q4_0 weights into another order at load, unless told not to (`in place`).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import peers
from mistral.args import ModelArgs
from mistral.eval.bench import SHAPES
from mistral.fast.layout import QUANTS
from mistral.formats.folder import stored_shapes
from mistral.formats.mistral import params_json
from mistral.formats.writer import PlannedTensor, as_json, header
from mistral.parameters import parameters

TOKENS = 16
OURS = """
import sys
from mistral.engine import Engine
from mistral.loader.load import load
from mistral.sampling_params import SamplingParams
model = load(sys.argv[1], device="cpu", threads=int(sys.argv[2])).model
engine = Engine(model, eos_ids=())
request = engine.add(list(range(5, 5 + int(sys.argv[3]))), SamplingParams(max_tokens=1, temperature=0.0))
while not engine.done:
    engine.step()
print(request.output_ids)
"""
# Prints the id, and the seconds since the import.
LLAMA = """
import ctypes, sys, time
import llama_cpp as L
began, tokens = time.perf_counter(), int(sys.argv[3])
silent = L.llama_log_callback(lambda *_: None)
L.llama_log_set(silent, ctypes.c_void_p(0))
L.llama_backend_init()
wanted = L.llama_model_default_params()
wanted.use_extra_bufts = sys.argv[4] == "repacked"
model = L.llama_model_load_from_file(sys.argv[1].encode(), wanted)
params = L.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 512, int(sys.argv[2]), int(sys.argv[2])
context = L.llama_init_from_model(model, params)
ids = (L.llama_token * tokens)(*range(5, 5 + tokens))
assert not L.llama_decode(context, L.llama_batch_get_one(ids, tokens))
logits = L.llama_get_logits_ith(context, -1)[: L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))]
print(logits.index(max(logits)), time.perf_counter() - began)
"""


def make_int4(folder: Path, args: ModelArgs) -> Path:
    """A folder as `convert --quant int4` writes one, of random bits."""
    if (folder / "params.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes, dtypes = stored_shapes(args, QUANTS[1])
    any_weight = next(iter(parameters(args).values()))
    planned = [
        PlannedTensor(any_weight, name, shape, getattr(torch, dtypes.get(name, "bfloat16")))
        for name, shape in shapes.items()
    ]
    planned.sort(key=lambda tensor: -tensor.dtype.itemsize)
    noise = torch.randint(0, 256, (2**26,), dtype=torch.uint8).numpy()
    with open(folder / "consolidated.safetensors", "wb") as file:
        file.write(header(planned))
        for tensor in planned:
            if tensor.name.endswith(".packed"):
                for at in range(0, tensor.nbytes, len(noise)):
                    file.write(noise[: tensor.nbytes - at].data)
                continue
            value = 1.0 if "norm" in tensor.name else 4e-5  # a scale of scales, or an embedding
            file.write(torch.full(tensor.shape, value, dtype=tensor.dtype).view(torch.uint8).numpy().data)
    (folder / "params.json").write_text(as_json(params_json(args, None, QUANTS[1])), encoding="utf-8")
    return folder


def seconds(command: list[str]) -> tuple[float, str]:
    """How long a process takes, and what it prints."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def warm(*files: Path) -> None:
    """Have the system read files."""
    for path in files:
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    given = parser.parse_args()
    peers.ARGS = SHAPES[given.shape]
    ours, theirs = make_int4(given.folder / "int4", peers.ARGS), peers.gguf_file(given.folder, "Q4_0")
    sizes = [str(given.threads), str(TOKENS)]
    taken: dict[str, list[float]] = {"ours": [], "llama.cpp": [], "llama.cpp in place": [], "import torch": []}
    own: dict[str, list[float]] = {name: [] for name in taken}
    for _ in range(given.rounds):
        warm(ours / "consolidated.safetensors", theirs)
        taken["ours"].append(seconds([sys.executable, "-c", OURS, str(ours), *sizes])[0])
        for name, how in (("llama.cpp", "repacked"), ("llama.cpp in place", "in place")):
            whole, said = seconds([sys.executable, "-c", LLAMA, str(theirs), *sizes, how])
            taken[name].append(whole)
            own[name].append(float(said.split()[1]))
        taken["import torch"].append(seconds([sys.executable, "-c", "import torch"])[0])
        print(" ".join(f"{name} {times[-1]:.2f}" for name, times in taken.items()), file=sys.stderr, flush=True)
    for name, times in taken.items():
        text = f"{name:20} {statistics.median(times):6.2f} s   {' '.join(f'{t:.2f}' for t in times)}"
        if own[name]:
            ratio = statistics.median(a / b for a, b in zip(taken["ours"], own[name], strict=True))
            text += f"   from its load on {statistics.median(own[name]):.2f} s; ours over that {ratio:.2f}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
