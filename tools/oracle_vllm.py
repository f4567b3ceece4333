"""The oracle against a real server: what vLLM and transformers say of three small models, and of three with a mistake.

    python -m tools.oracle_vllm --vllm /path/to/venv/bin/python

For each model of tools/compare_vllm.py `compare` asks a vLLM server in float32 about prompts, once for the folder
as it is and once for a copy with a mistake; the mistake must be named. transformers loads the folder as converted to
Hugging Face's layout. docs/vllm.md says what vLLM needs; docs/trust.md shows what this prints. A server takes about a
minute to start, and there are six. The exit code is 0 if all are as they should be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mistral.formats.folder import read_folder
from mistral.oracle.compare import compare
from mistral.oracle.comparison import Comparison
from mistral.oracle.inputs import random_prompts
from mistral.oracle.metrics import table
from mistral.oracle.sides import FolderSide, ServerSide, side
from tools.compare_vllm import CASES, ServerError, served, write_model

LENS = (60, 1, 16, 17, 33)


def wider_window(folder: Path) -> None:
    """one key more"""
    _change(folder / "params.json", sliding_window=17)


def other_theta(folder: Path) -> None:
    """theta 1e4 in place of 1e6"""
    _change(folder / "params.json", rope_theta=1e4)


def rows_of_the_other_layout(folder: Path) -> None:
    """q and k rows in the other layout's order"""
    path = folder / "model.safetensors"
    state = load_file(path)
    config = json.loads((folder / "config.json").read_text())
    for name, w in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = w.view(-1, 2, config["head_dim"] // 2, w.shape[1])
            state[name] = halves.transpose(1, 2).reshape(w.shape).contiguous()
    save_file(state, path, metadata={"format": "pt"})


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# For each model: which of its folders is spoilt, how, and the name that the mistake must be given.
Spoil = Callable[[Path], None]
SPOILT: tuple[tuple[str, Spoil, str], ...] = (
    ("Mistral's", wider_window, "window_one_more"),
    ("Mistral's", other_theta, "theta_1e4"),
    ("Hugging Face's, converted", rows_of_the_other_layout, "rows_permuted_needlessly"),
)


@dataclass(frozen=True)
class Row:
    """Who was asked about what, the difference, how many times the error budget that is, and what was said of it."""

    model: str
    who: str
    difference: float
    times: float
    said: str
    right: bool


def rows(python: str, work: Path) -> Iterator[Row]:
    """All that is asked."""
    for number, (case, (layout_name, spoil, mistake)) in enumerate(zip(CASES, SPOILT, strict=True)):
        folders = write_model(case, work / str(number))
        right, layout = folders["Mistral's"]
        found = read_by_transformers(right, folders["Hugging Face's, converted"][0], work / f"{number}.npz")
        yield _row(case.name, "transformers", found, found.same, "the same")
        found = asked(python, right, right, layout)
        yield _row(case.name, "vLLM", found, found.same, "the same")
        source, layout = folders[layout_name]
        wrong = source.with_name("wrong")
        shutil.copytree(source, wrong)
        spoil(wrong)
        found = asked(python, right, wrong, layout)
        named = list(found.causes.mistakes) == [mistake]
        yield _row(case.name, f"vLLM, {spoil.__doc__}", found, named, ", ".join(found.causes.mistakes))


def _row(model: str, who: str, said: Comparison, right: bool, verdict: str) -> Row:
    budget, largest = said.limits.budget, said.differences.largest
    assert budget is not None
    times = largest / budget.logprobs
    return Row(model, who, largest, times, verdict if right else f"WRONG: {verdict or 'no mistake named'}", right)


def read_by_transformers(right: Path, folder: Path, file: Path) -> Comparison:
    """transformers' own loading of `folder`, all of the model at once, compared with what is true of `right`."""
    from transformers import AutoModelForCausalLM

    found = read_folder(right)
    prompts = random_prompts(found.args, LENS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = torch.cat([model(p[None], use_cache=False).logits[0] for p in prompts])
    np.savez(file, prompt_ids=torch.cat(prompts), prompt_lens=LENS, logits=logits)
    return compare(FolderSide(found, str(right)), side(str(file)), compute=torch.float32)


def asked(python: str, right: Path, folder: Path, layout: str) -> Comparison:
    """A server for `folder`, compared with what is true of `right`."""
    print(f"serving {folder}", file=sys.stderr, flush=True)
    found = read_folder(right)
    prompts = random_prompts(found.args, LENS)
    with served(python, folder, layout, max(LENS) + 8, folder.with_suffix(".log")) as url:
        return compare(FolderSide(found, str(right)), ServerSide(url, "served"), compute=torch.float32, prompts=prompts)


def main() -> int:
    """Read the flags, ask, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.oracle_vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="an interpreter that has vLLM")
    python = shutil.which(parser.parse_args().vllm)
    if python is None:
        parser.error("no such interpreter")
    with tempfile.TemporaryDirectory() as work:
        try:
            found = list(rows(os.path.abspath(python), Path(work)))
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    cells = [(r.model, r.who, f"{r.difference:.1e}", f"{r.times:.1f}", r.said) for r in found]
    print("\n".join(table([("model", "who", "max |dlogp|", "x budget", "said"), *cells], right=(2, 3))))
    return 0 if all(r.right for r in found) else 1


if __name__ == "__main__":
    sys.exit(main())
