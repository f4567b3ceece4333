"""Topic retrieval: a long conversation about one topic after the other; the first one is asked for.

The shape is that of LongChat's evaluation (LMSYS, 2023): up to 50 new tokens. There the answers were judged by a model
or by hand. Here one is right if the topic is contained in it, case and punctuation aside: the rule is ours.
"""

from __future__ import annotations

import re
import unicodedata

from mistral.eval.filler import Filler, made, words
from mistral.eval.tasks import Case, Made

INTRODUCTION = (
    "Below is a conversation between a user and an assistant. They talk about one topic after the other. "
    "Remember the topics and their order.\n"
)
SUBJECTS = words(
    "the history of glass|keeping bees in a city|how bridges are built|growing tomatoes|the life of whales|"
    "learning the violin|travel by night trains|baking bread|the art of paper folding|desert plants|"
    "old maps and sea monsters|running a small library|how clocks keep time|mountain weather|painting with watercolor|"
    "the language of birds|repairing bicycles|tea and its ceremonies|volcanoes and islands|writing short stories|"
    "the game of chess|wind and water mills|stars and constellations|life in lighthouses|making cheese|"
    "the roads of ancient Rome|dances of the village fair|coral reefs|silk and its trade|how children learn to read",
    between="|",
)
EXCHANGES = 4  # about one topic, at least


class Topics:
    name = "topics"
    max_tokens = 50
    rule = "the answer contains the first topic, case and punctuation aside (our rule; LongChat's judge was a model)"

    def filler(self, seed: int) -> Filler:
        return made(seed)

    def make(self, case: Case, size: int) -> Made:
        """The units are exchanges; what the assistant says besides the topic is filler."""
        rng = case.rng(self.name)
        subjects = list(SUBJECTS)
        rng.shuffle(subjects)
        start = rng.randrange(len(case.filler.sentences))
        each = max(EXCHANGES, -(-(size + 1) // len(subjects)))
        told = [_exchange(subjects[i // each], i % each, case.filler, start + 3 * i) for i in range(size + 1)]
        question = "USER: What was the first topic of our conversation?\nASSISTANT: The first topic was"
        return Made(f"{INTRODUCTION}{''.join(told)}{question}", subjects[0])

    def score(self, text: str, answer: str) -> bool:
        return folded(answer) in folded(text)


def _exchange(subject: str, i: int, filler: Filler, at: int) -> str:
    if i == 0:
        asked = f"Let us talk about {subject}. What do you know about it?"
    else:
        asked = ("Tell me more about that.", "That is interesting. Go on.", "Why is that so?")[i % 3]
    return f"USER: {asked}\nASSISTANT: {filler.text(at, at + 3).strip()}\n"


def folded(text: str) -> str:
    """A text without case, accents and punctuation, one space between words."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w\s]", " ", plain).split())
