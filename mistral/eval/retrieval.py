"""Retrieval at several lengths: prompts made to measure, answered together, scored, counted. Knows no command line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mistral.engine import rows_that_fit
from mistral.eval.filler import Filler
from mistral.eval.lines import Lines
from mistral.eval.longchat import Question
from mistral.eval.needle import Needle
from mistral.eval.passkey import PassKey
from mistral.eval.results import Result, ResultFile, counted
from mistral.eval.shared_prefix import SharedPrefixes, branches
from mistral.eval.tasks import Case, Encode, Task, fit
from mistral.eval.topics import Topics
from mistral.generate import completions
from mistral.model import Transformer
from mistral.sampling_params import SamplingParams
from mistral.tokenizer import TokenizerLike

TASKS: dict[str, Task] = {task.name: task for task in (PassKey(), Lines(), Topics(), Needle())}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """A case as the model gets it; see `Result`."""

    group: str
    index: int
    ids: list[int]
    answer: str


class Work(NamedTuple):
    """What answering took: tokens of prompts, those of them that were processed, and whether beginnings were shared."""

    prompt_tokens: int
    processed: int
    sharing: bool


def make_items(
    task: Task, lengths: Sequence[int], n: int, seed: int, filler: Filler, encode: Encode, progress: Progress
) -> list[Item]:
    """`n` cases at each length, each of at most so many tokens.

    Raises:
        UsageError: a length that the task alone exceeds.
    """
    items = []
    for length in lengths:
        for index in range(n):
            ids, answer, _ = fit(task, Case(seed, index, n, filler), length, encode)
            items.append(Item(str(length), index, ids, answer))
            progress(len(items), n * len(lengths))
    return items


def items_of(questions: Sequence[Question], encode: Encode) -> list[Item]:
    """LongChat's questions as the model gets them."""
    return [Item(asked.file, asked.index, encode(asked.prompt), asked.answer) for asked in questions]


def answer(
    model: Transformer,
    tokenizer: TokenizerLike,
    task: Task,
    items: Sequence[Item],
    results: ResultFile,
    *,
    rows: int,
    eos_ids: frozenset[int],
    progress: Progress,
) -> Work:
    """Have the model answer the cases that have no result yet, greedily; each result is kept as soon as it is known.

    Beginnings that prompts have in common are processed once, which changes numbers by rounding alone. Where memory is
    short of the rows for that, each prompt is processed by itself.

    Args:
        rows: the most prompts at once.
        eos_ids: ids that end an answer.
        progress: told how many cases have a result, and how many there are.

    Raises:
        OutOfMemory: not even one prompt fits.
        GenerationError: the model's logits are NaN.
    """
    todo = [item for item in items if (item.group, item.index) not in results.found]
    done = len(items) - len(todo)
    progress(done, len(items))
    if not todo:
        return Work(0, 0, True)
    prompts = [item.ids for item in todo]
    params = SamplingParams(max_tokens=task.max_tokens, temperature=0)
    total = sum(map(len, prompts))

    def run(batch: Sequence[int], **how: Any) -> None:
        nonlocal done
        asked = [prompts[i] for i in batch]
        for place, found in completions(asked, model, tokenizer, params=params, eos_ids=eos_ids, **how):
            item = todo[batch[place]]
            right = task.score(found.text, item.answer)
            results.add(Result(item.group, item.index, len(item.ids), item.answer, found.text, right))
            done += 1
            progress(done, len(items))

    positions = max(map(len, prompts)) + task.max_tokens
    fitting = rows_that_fit(model, min(rows, len(todo)) + branches(prompts), positions)
    if fitting <= branches(prompts):
        for first in range(0, len(todo), fitting):
            run(range(first, min(first + fitting, len(todo))))
        return Work(total, total, False)
    walk = SharedPrefixes(model, prompts, fitting - branches(prompts), more=task.max_tokens)
    for batch in walk.batches():
        run(batch, cache=walk.cache)
    return Work(total, total - walk.saved, True)


def report_rows(items: Sequence[Item], results: ResultFile) -> list[dict[str, Any]]:
    """A row for each length or file, in the order of the items."""
    groups = dict.fromkeys(item.group for item in items)
    asked = {(item.group, item.index) for item in items}
    return [
        counted(group, [result for key, result in sorted(results.found.items()) if key in asked and key[0] == group])
        for group in groups
    ]


def digest(filler: Filler) -> str:
    """A short hash of a filler's text, by which a file of results knows it again."""
    return hashlib.sha256("".join(filler.sentences).encode("utf-8", "surrogatepass")).hexdigest()[:16]
