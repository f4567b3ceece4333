"""Line retrieval: a record of labelled numbers, of which one is asked for.

The shape is that of LongChat's evaluation (LMSYS, 2023): labels of an adjective and a noun, numbers of 1 to 50,000, up
to 100 new tokens of which the last number counts. The words are our own; `longchat.py` reads LongChat's own files.
"""

from __future__ import annotations

import random
import re

from mistral.eval.filler import ADJECTIVES, NOUNS, Filler
from mistral.eval.tasks import Case, Made

INTRODUCTION = (
    "Below is a record of lines. Each line has a label of two words and a number in angle brackets. "
    "Remember the number of each line. At the end you will be asked for one of them.\n"
)
LARGEST_NUMBER = 50_000
LABELS = tuple(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)


class Lines:
    name = "lines"
    max_tokens = 100
    rule = "the last whole number of the answer is the number of the line"

    def filler(self, seed: int) -> Filler:
        return Filler(("",), "none: the record is all there is")

    def make(self, case: Case, size: int) -> Made:
        """The units are lines beyond the first; the line that is asked for may be any of them."""
        rng = case.rng(self.name)
        place, labels = rng.random(), shuffled(rng)
        count = size + 1
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(count)]
        record = "".join(f"line {_label(labels, i)}: the number is <{numbers[i]}>\n" for i in range(count))
        asked = min(int(place * count), count - 1)
        label = _label(labels, asked)
        question = f"The record ends here. What is the number in line {label}? The number in line {label} is"
        return Made(INTRODUCTION + record + question, str(numbers[asked]))

    def score(self, text: str, answer: str) -> bool:
        found = re.findall(r"[0-9]+", text)
        return bool(found) and int(found[-1]) == int(answer)


def shuffled(rng: random.Random) -> list[str]:
    """All labels in a random order."""
    labels = list(LABELS)
    rng.shuffle(labels)
    return labels


def _label(labels: list[str], i: int) -> str:
    """Label i; past the last one they get a number, so that no two lines have the same."""
    again, place = divmod(i, len(labels))
    return labels[place] if not again else f"{labels[place]}-{again + 1}"
