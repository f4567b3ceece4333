"""A needle in a haystack: one sentence in a text of many others, at evenly spread depths.

The shape is that of the needle tests of RULER (arXiv 2404.06654): a key and a number in one sentence, and a question
at the end; an answer that contains the number is right. The words are our own. Case i of n is at depth i / (n - 1).
"""

from __future__ import annotations

import re

from mistral.eval.filler import ADJECTIVES, NOUNS, Filler, made
from mistral.eval.tasks import Case, Made

INTRODUCTION = "One sentence of the text below gives a secret number. Read it and remember the number."


class Needle:
    name = "needle"
    max_tokens = 32
    rule = "the answer contains the number, with no other digit beside it"

    def filler(self, seed: int) -> Filler:
        return made(seed)

    def make(self, case: Case, size: int) -> Made:
        """The units are sentences of filler."""
        rng = case.rng(self.name)
        key, number = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}", rng.randint(1_000_000, 9_999_999)
        cut = round(depth(case) * size)
        parts = (
            INTRODUCTION,
            f"{case.filler.text(0, cut)}The secret number of {key} is {number}. {case.filler.text(cut, size)}".strip(),
            f"What is the secret number of {key}? The secret number of {key} is",
        )
        return Made("\n".join(parts), str(number))

    def score(self, text: str, answer: str) -> bool:
        return re.search(rf"(?<![0-9]){answer}(?![0-9])", text) is not None


def depth(case: Case) -> float:
    """Where the needle is: 0 at the beginning of the text, 1 at its end."""
    return 0.5 if case.n == 1 else case.index / (case.n - 1)
