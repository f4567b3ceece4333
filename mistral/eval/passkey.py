"""Pass key: a number hidden at a random place of a text that repeats itself.

The shape is that of Landmark Attention (arXiv 2305.16300): a sentence that says what to do, filler, the key, filler, a
question, joined by line ends; a key of 1 to 50,000; the first number of 10 new tokens counts. The words are our own.
"""

from __future__ import annotations

import re

from mistral.eval.filler import Filler
from mistral.eval.tasks import Case, Made

INTRODUCTION = "Somewhere in the text below there is a pass key. Read the text and remember the pass key."
REPEATED = (
    "The river runs to the sea. ",
    "The hills are blue and far away. ",
    "A bird sings in the old tree. ",
    "Here we wait. ",
    "The day is long and warm. ",
)
LARGEST_KEY = 50_000


class PassKey:
    name = "passkey"
    max_tokens = 10
    rule = "the first whole number of the answer is the pass key"

    def filler(self, seed: int) -> Filler:
        return Filler(REPEATED, "five short sentences, repeated")

    def make(self, case: Case, size: int) -> Made:
        """The units are sentences of filler."""
        rng = case.rng(self.name)
        key, place = rng.randint(1, LARGEST_KEY), rng.random()
        cut = int(place * (size + 1))
        parts = (
            INTRODUCTION,
            case.filler.text(0, cut).rstrip(),
            f"The pass key is {key}. Remember it: {key} is the pass key.",
            case.filler.text(cut, size).rstrip(),
            "What is the pass key? The pass key is",
        )
        return Made("\n".join(part for part in parts if part), str(key))

    def score(self, text: str, answer: str) -> bool:
        found = re.search(r"[0-9]+", text)
        return found is not None and int(found[0]) == int(answer)
