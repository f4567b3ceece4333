"""demo and complete: prompts continued."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mistral.cli import terminal
from mistral.cli.prompts import load_model, read_prompts, with_gaps
from mistral.cli.terminal import stream_one
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.generate import Completion


SEPARATOR = "====================="
DEMO_PROMPTS = (
    "This is a test",
    "This is another test",
    "This is a third test, mistral AI is very good at testing. ",
)


def demo(
    folder: str | None = None,
    *,
    max_tokens: int = 35,
    temperature: float = 0.0,
    top_p: float = 0.8,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    threads: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Continue three prompts in one ragged batch, and print each text.

    python -m main demo
    python -m main demo mistral-7B-v0.1 --max_tokens 35 --temperature 0
    python -m main demo mistral-7B-v0.1 --device cuda --dtype bfloat16

    Without FOLDER: the small model that ships, on prompts that suit it.
    """
    from mistral.formats.folder import BUNDLED
    from mistral.generate import generate

    loaded = load_model(folder, device, dtype, attention, kernels, quant, deterministic, threads, max_batch_size=3)
    prompts: Sequence[str] = DEMO_PROMPTS
    if folder is None:
        prompts = json.loads((BUNDLED / "prompts.json").read_text(encoding="utf-8"))
    texts, _ = generate(
        prompts,
        loaded.model,
        loaded.tokenizer,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chunk_size=chunk_size,
    )
    for text in texts:
        print(text)
        print(SEPARATOR)


def complete(
    folder: str | None = None,
    prompt: str | None = None,
    *,
    suffix: str | None = None,
    file: str | None = None,
    json: bool = False,
    top_logprobs: int = 0,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.8,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    max_batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    threads: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Continue a prompt, or many; only the continuation goes to stdout, so it pipes.

    python -m main complete "Once upon a time" --max_tokens 40
    python -m main complete mistral-7B-v0.1 "The capital of France is" --temperature 0
    echo "Once upon a time" | python -m main complete mistral-7B-v0.1
    python -m main complete mistral-7B-v0.1 --file prompts.jsonl --json > answers.jsonl
    python -m main complete codestral-22B-v0.1 "def fibonacci(n):" --suffix "    return a"

    One word that is a folder is FOLDER, and the prompt is read from stdin. Each line of FILE is a
    JSON string, or an object with "prompt" (text, or a list of ids) and perhaps "max_tokens" and "suffix".
    The texts of FILE's prompts are each followed by a line of =====================. --json prints one
    object a prompt: index, prompt_tokens, tokens, text, logprobs, finish_reason, and top_logprobs if
    asked for.
    """
    if top_logprobs and not json:
        raise UsageError("--top_logprobs are printed with --json only: give both")
    from mistral.formats.hub import is_hub_id

    if folder is not None and not os.path.exists(folder) and not is_hub_id(folder):  # before stdin is waited for
        raise UsageError(f"no such folder: {folder}")
    asked = read_prompts(prompt, suffix, file, max_tokens)
    loaded = load_model(
        folder, device, dtype, attention, kernels, quant, deterministic, threads, max_batch_size=max_batch_size
    )
    prompts, limits = with_gaps(asked, loaded), [one.max_tokens for one in asked]
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
        "chunk_size": chunk_size,
        "top_logprobs": top_logprobs,
    }
    if file is None and not json:
        stream_one(loaded, prompts[0], max_tokens=limits[0], **options)
        return
    from tqdm import tqdm

    from mistral.generate import completions

    ended = completions(prompts, loaded.model, loaded.tokenizer, max_tokens=limits, **options)
    bar = tqdm(ended, total=len(prompts), desc="prompts", unit="prompt", delay=2, disable=None, leave=False)
    early: dict[int, Completion] = {}  # ended before one that comes before it
    turn = 0
    for index, result in bar:
        early[index] = result
        while turn in early:
            shown = early.pop(turn)
            with bar.external_write_mode():
                terminal.write(
                    _as_json(turn, shown, bool(top_logprobs)) + "\n" if json else f"{shown.text}\n{SEPARATOR}\n"
                )
            turn += 1


def _as_json(index: int, result: Completion, with_top: bool) -> str:
    entry: dict[str, Any] = {
        "index": index,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "text": result.text,
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
    }
    if with_top:
        entry["top_logprobs"] = [[[token, lp] for token, lp in top.items()] for top in result.top_logprobs]
    return json.dumps(entry, ensure_ascii=False)
