"""Text to hide something in: sentences of a file in any language, or made from word lists. Knows no tokenizer.

A sentence keeps the space or line end that follows it, so sentences join to a text without anything between them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache


def words(text: str, between: str = " ") -> tuple[str, ...]:
    """The parts of a text, which is easier to read than a list of quoted words."""
    return tuple(text.split(between))


ADJECTIVES = words(
    "able amber bold brave brisk calm clear clever crisp dark deep eager early fair fast fine firm fond fresh glad "
    "golden grand green happy hollow humble icy jolly keen kind late light little lively loyal lucky merry mild misty "
    "modest neat noble pale plain polite proud quick quiet rare ready rich ripe round royal rusty sharp silent silver "
    "simple sleepy slow small smooth soft solid spare steady still strong sunny sweet swift tall tame tender thin tidy "
    "tiny true vast warm wary wide wild wise witty young"
)
NOUNS = words(
    "acorn anchor apple arrow badge barn basin beacon bell bird boat book bottle branch bridge brook bucket candle "
    "canyon castle cedar chair cloud coat comet coral corner crane creek crown desk door eagle falcon feather fence "
    "field flame flute forest fountain fox garden gate glove goose harbor hat hill horn house island jacket kettle key "
    "ladder lake lamp lantern leaf lion lock maple market meadow mill mirror moon mountain needle nest oak ocean otter "
    "owl paddle path pearl pebble piano pine planet pond rabbit ribbon river road rose saddle sail"
)
VERBS = words("watches finds follows carries paints remembers leaves crosses measures repairs sells draws")
PLACES = words(
    "near the old mill|behind the market|by the sea|in the north|under the stone bridge|before the winter|"
    "after the rain|on the long road|at the edge of the village|in the quiet valley|above the harbor|every morning",
    between="|",
)
LONGEST = 300  # characters of a sentence; longer ones, of texts without marks, are cut
# A sentence ends at a mark that a space follows, at a mark of Chinese or Japanese, or at a line's end.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[」』”]*\s*|\n+")


@dataclass(frozen=True)
class Filler:
    """Sentences in order, which begin again where more are needed.

    Args:
        sentences: at least one.
        source: where they came from, for reports.
    """

    sentences: tuple[str, ...]
    source: str

    def __getitem__(self, i: int) -> str:
        return self.sentences[i % len(self.sentences)]

    def text(self, start: int, stop: int) -> str:
        """Sentences start to stop, as one text."""
        return "".join(self[i] for i in range(start, stop))


def filler_of(text: str, source: str) -> Filler:
    """The sentences of a text.

    Args:
        text: not blank.
        source: for reports.
    """
    return Filler(tuple(split_sentences(text)), source)


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each with what follows it up to the next one; those without words are omitted."""
    begin = 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        sentence = text[begin:end]
        begin = end
        if sentence.strip():
            yield from (sentence[i : i + LONGEST] for i in range(0, len(sentence), LONGEST))


@lru_cache(8)
def made(seed: int, count: int = 4000) -> Filler:
    """Sentences made from word lists: different ones, all of one plain form, in English."""
    rng = random.Random(f"filler {seed}")
    sentences = tuple(_sentence(rng) for _ in range(count))
    return Filler(sentences, f"made from word lists with seed {seed}")


def _sentence(rng: random.Random) -> str:
    first, second = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES)
    who, what = rng.choice(NOUNS), rng.choice(NOUNS)
    return f"The owner of the {first} {who} {rng.choice(VERBS)} a {second} {what} {rng.choice(PLACES)}. "
