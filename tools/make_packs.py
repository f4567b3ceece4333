"""Write the golden packs that ship: tiny Mistral-shaped models of random weights, and what is true of them.

    python -m tools.make_packs [--check]

One for each rule on which engines disagree. The weights are in the packs, because random numbers are not the same
everywhere. --check writes nothing and fails where a pack does not say what its own weights make true.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral.formats import huggingface as hf
from mistral.formats.folder import read_folder
from mistral.oracle import pack
from mistral.oracle.inputs import WeightReader, random_prompts
from mistral.oracle.outputs import reference_outputs
from mistral.parameters import OUTPUT, Parameter, parameters

SHAPE = {
    "dim": 40,
    "n_layers": 3,
    "head_dim": 16,
    "hidden_dim": 56,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 61,
}
LENS = (28, 1, 9, 14)
# The longest prompt goes beyond the original length three times; four pairs of eight are on the ramp.
YARN = {"factor": 4, "original_max_position_embeddings": 8, "beta": 1, "alpha": 0.001}
GROWING = {"original_max_position_embeddings": 8, "beta": 0.1}


@dataclass(frozen=True)
class Case:
    """A pack.

    Args:
        name: of its file.
        what: which rule it is about.
        params: changes to SHAPE, as params.json has them.
        config: as config.json has them, for the rules of Hugging Face's layout.
        dtype: of the weights.
    """

    name: str
    what: str
    params: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32


CASES = (
    Case("window", "a window of 7, K < H, H * D != dim", {"sliding_window": 7, "rope_theta": 1e4}),
    Case("full", "no window", {"sliding_window": None, "rope_theta": 1e6}),
    Case("one-head", "a single key head, a window of 9", {"n_kv_heads": 1, "sliding_window": 9}),
    Case(
        "per-layer",
        "a window in three layers of four",
        {"n_layers": 4, "sliding_window": [None, 6, 6, 6], "rope_theta": 1e8},
    ),
    Case("theta-windowed", "no rope_theta, a window: 1e4", {"sliding_window": 7}),
    Case("theta-full", "no rope_theta, no window: 1e6", {}),
    Case("theta-hf", "config.json with rope_theta", {}, {"rope_theta": 5e5, "sliding_window": 7}),
    Case(
        "theta-hf-parameters",
        "config.json with rope_parameters",
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "sliding_window": 7},
    ),
    Case("theta-hf-absent", "config.json without: 1e4", {}, {"sliding_window": None}),
    Case("bf16", "weights in bf16", {"sliding_window": 7, "rope_theta": 1e6}, dtype=torch.bfloat16),
    Case(
        "yarn",
        "YaRN with its attention factor, queries that grow",
        {"norm_eps": 2e-5, "rope_theta": 1e6, "yarn": {**YARN, "apply_scale": True}, "llama_4_scaling": GROWING},
    ),
    Case(
        "yarn-tied",
        "YaRN without an attention factor, queries that grow, a window, a tied output",
        {
            "rope_theta": 1e6,
            "sliding_window": 12,
            "tied_embeddings": True,
            "yarn": {**YARN, "apply_scale": False},
            "llama_4_scaling": GROWING,
        },
    ),
    Case(
        "mixtral",
        "two experts of four",
        {"n_layers": 2, "hidden_dim": 32, "moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    ),
)


def random_state(weights: Mapping[str, Parameter], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Matrices hot enough that attention looks at some keys more than at others, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in weights.items():
        uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
        if parameter.role == "norm":
            weight = 1 + 0.25 * uniform
        elif parameter.role == "embedding":
            # A tied one is the output matrix too, whose products would be large.
            weight = uniform * (3.0 if OUTPUT in weights else 3.0 / parameter.shape[1]) ** 0.5
        else:
            hot = 1.0 if parameter.heads is None else 2.0  # q and k
            weight = uniform * hot * (3 / parameter.shape[1]) ** 0.5
        state[name] = weight.to(dtype)
    return state


def write_case(case: Case, seed: int, work: Path) -> Path:
    """A model folder of the case's layout."""
    folder = work / case.name
    folder.mkdir()
    if case.config is None:
        (folder / "params.json").write_text(json.dumps({**SHAPE, **case.params}))
        args = _args(folder)
        save_file(random_state(parameters(args), case.dtype, seed), folder / "consolidated.safetensors")
        return folder
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": SHAPE["dim"],
        "num_hidden_layers": SHAPE["n_layers"],
        "head_dim": SHAPE["head_dim"],
        "intermediate_size": SHAPE["hidden_dim"],
        "num_attention_heads": SHAPE["n_heads"],
        "num_key_value_heads": SHAPE["n_kv_heads"],
        "rms_norm_eps": SHAPE["norm_eps"],
        "vocab_size": SHAPE["vocab_size"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **case.config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    args = hf.config_to_args(config)[0]
    state = random_state(parameters(args), case.dtype, seed)
    save_file({hf.to_hf(name): w for name, w in state.items()}, folder / "model.safetensors")
    return folder


def _args(folder: Path) -> Any:
    from mistral.formats.mistral import read_object, to_args

    return to_args(read_object(folder / "params.json"))


def check(path: Path) -> float:
    """The largest difference between a pack's log-probs and what its own weights make true."""
    with tempfile.TemporaryDirectory() as nothing:
        found = pack.folder_of(path, Path(nothing))
        told = pack.read(path)
        true, _ = reference_outputs(WeightReader(found), found.args, told.prompts)
    return float((true.logprobs.gather(1, told.top_ids) - told.top_logprobs).abs().max())


def main() -> int:
    """Write or check the packs."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_packs", description="Write the packs that ship.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a pack is not true")
    if parser.parse_args().check:
        worst = {case.name: check(pack.SHIPPED / f"{case.name}.safetensors") for case in CASES}
        for name, difference in worst.items():
            print(f"{name}: {difference:.1e}")
        return int(max(worst.values()) > 1e-12)
    pack.SHIPPED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for seed, case in enumerate(CASES):
            found = read_folder(write_case(case, seed, Path(work)))
            prompts = random_prompts(found.args, LENS, seed)
            written = pack.pack(found, pack.SHIPPED / f"{case.name}.safetensors", prompts, weights=True)
            print(f"{written.name}: {case.what}; {written.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
