"""`deploy`: recipes that serve a folder with vLLM."""

from __future__ import annotations

from pathlib import Path

from mistral.cli import flags, terminal
from mistral.cli.prompts import default_folder
from mistral.util.errors import UsageError


def deploy(
    folder: str | None = None,
    *,
    target: str,
    output: str | None = None,
    hub_id: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    accept: list[str] | None = None,
) -> None:
    """Print or write what serves a folder with vLLM, filled in for it: on this machine, in containers, on a cloud.

    python -m main deploy mistral-7B-v0.3 --target vllm | sh
    python -m main deploy mistral-7B-v0.3 --target compose -o served
    python -m main deploy mistral-7B-v0.3 --target kubernetes --hub_id mistralai/Mistral-7B-v0.3 | kubectl apply -f -
    python -m main deploy mistral-7B-v0.3 --target skypilot --gpu A100 --gpus 2 -o served

    TARGET is vllm (a script), compose (compose.yaml and a Dockerfile), kubernetes or skypilot. Layout, tokenizer,
    dtype, length and GPUs are those of the folder; only headers are read. What vLLM would change in silence, as a
    window that it drops, is refused.

    Args:
        target: vllm, compose, kubernetes or skypilot
        output: a folder to write the files to; default: print them
        hub_id: owner/name of the same model on the hub, from which the machine that serves fetches it; default: FOLDER
            is mounted, or uploaded
        name: what clients call the model; default: the hub's id, or the name of the folder
        dtype: of the weights in vLLM: bfloat16, float16 or float32; default: as they are stored
        max_model_len: the most tokens of a prompt and its answer; default: the training length, or 32768
        gpu: the kind of GPU: L4, A10G, L40S, A100, A100-80GB, H100 or H200; default: the smallest that is enough
        gpus: how many; default: as few as are enough
        accept: a word for a difference that is no reason to refuse: window, theta, template or dtype; may be repeated
    """
    flags.require_at_least(1, max_model_len=max_model_len, gpus=gpus)
    from mistral.deploy.plan import Wanted, plan
    from mistral.deploy.recipes import TARGETS, as_text, recipes, write
    from mistral.formats import inspect_adapter
    from mistral.formats.hub import is_hub_id

    if target not in TARGETS:
        raise UsageError(f"--target is {target!r}; it must be {', '.join(TARGETS)}")
    chosen = default_folder(folder)
    if chosen is not None and inspect_adapter.is_one(chosen):
        advice = f"merge it first: python -m main convert BASE DST --to hf --adapter {chosen}"
        raise UsageError(f"{chosen} is a LoRA adapter, not a whole model: {advice}")
    if chosen is not None and hub_id is None and is_hub_id(chosen) and not Path(chosen).exists():
        hub_id = chosen
    deployment = plan(chosen, Wanted(name, hub_id, dtype, max_model_len, gpu, gpus, tuple(accept or ())))
    made = recipes(target, deployment)
    terminal.echo_err(f"{deployment.about}; {deployment.gpus} x {deployment.gpu}")
    for note in deployment.notes:
        terminal.echo_err(f"note: {note}")
    if output is None:
        terminal.write(as_text(made))
        return
    place = Path(output)
    there = [name for name, text in made.items() if _differs(place / name, text)]
    if there and not terminal.confirm(f"{', '.join(there)} in {output} will be overwritten: go on?"):
        raise UsageError(f"{output} was left as it is")
    write(made, place)
    terminal.echo_err(f"wrote {', '.join(made)} to {output}")


def _differs(path: Path, text: str) -> bool:
    """Whether there is another file."""
    try:
        return path.read_text(encoding="utf-8") != text
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
