"""What the server has done, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from mistral.serve.worker import Worker

HELP = {
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that a row held already",
    "generated_tokens": "tokens generated",
    "steps": "steps of the engine",
    "ended": "continuations that ended",
    "cancelled": "continuations whose client went away",
    "failed": "continuations that failed",
    "first_tokens": "continuations of which a token came",
    "first_token_seconds": "seconds from request to first token, summed",
}


def as_prometheus(worker: Worker, answered: Counter[tuple[str, int]]) -> str:
    """The text of /metrics.

    Args:
        worker: whose counts.
        answered: answers by path and status.
    """
    lines = []
    for field in fields(worker.counts):
        name = f"mistral_{field.name}_total"
        lines += [f"# HELP {name} {HELP[field.name]}", f"# TYPE {name} counter"]
        lines.append(f"{name} {getattr(worker.counts, field.name)}")
    running, waiting = worker.busy
    for name, text, value in (
        ("running", "continuations in the batch", running),
        ("waiting", "continuations that wait for a row", waiting),
        ("rows", "rows of the batch", worker.rows),
    ):
        lines += [f"# HELP mistral_{name} {text}", f"# TYPE mistral_{name} gauge", f"mistral_{name} {value}"]
    lines += ["# HELP mistral_answers_total answers by path and status", "# TYPE mistral_answers_total counter"]
    for (path, status), count in sorted(answered.items()):
        lines.append(f'mistral_answers_total{{path="{path}",status="{status}"}} {count}')
    return "\n".join([*lines, ""])
