"""What a release of the family is: one shape that was published, and how wrong copies of it are known.

Runs without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mistral.args import Moe, QueryScaling, Yarn

Windows = int | tuple[int | None, ...] | None
Value = int | float | tuple[int | None, ...] | None


@dataclass(frozen=True)
class WrongCopy:
    """A way in which copies of a release are known to be wrong.

    Args:
        values: what the copy says, by ModelArgs' names.
        advice: what it means, and what to do.
    """

    values: Mapping[str, Value]
    advice: str


@dataclass(frozen=True)
class Release:
    """One shape that was published, under one or several names.

    Args:
        name: of the shape.
        variants: the releases that have it with one kind of tokenizer; nothing but their weights tells them apart.
        dim ... rope_theta: as in ModelArgs; what params.json left out is filled in.
        tokenizer_kind: "sentencepiece" or "tekken".
        tokenizer_file: its name in the release.
        template: of the instruct variants' chat.
        layout, files: "mistral" or "huggingface", and the release's files (numbered parts as a pattern).
        added_words: ids beyond the tokenizer file's vocabulary.
        md5: of the original tar, by variant, where it was published.
        wrong_copies: the known ones.
        yarn, llama_4_scaling, moe, tied_embeddings: as in ModelArgs.
    """

    name: str
    variants: tuple[str, ...]
    dim: int
    n_layers: int
    hidden_dim: int
    n_heads: int
    vocab_size: int
    sliding_window: Windows
    rope_theta: float
    tokenizer_kind: str
    tokenizer_file: str
    template: str
    files: tuple[str, ...]
    layout: str = "mistral"
    n_kv_heads: int = 8
    head_dim: int = 128
    norm_eps: float = 1e-5
    added_words: int = 0
    md5: Mapping[str, str] = field(default_factory=dict)
    wrong_copies: tuple[WrongCopy, ...] = ()
    yarn: Yarn | None = None
    llama_4_scaling: QueryScaling | None = None
    moe: Moe | None = None
    tied_embeddings: bool = False

    @property
    def shape(self) -> tuple[object, ...]:
        """What COMPARED and PARTS name."""
        return tuple(getattr(self, name) for name in (*COMPARED, *PARTS))

    @property
    def tokenizer_version(self) -> str:
        """The version of its tokenizer, as far as its file is named for one: "v1", "v3", "v7"."""
        version = self.tokenizer_file.rpartition(".")[2] if ".v" in self.tokenizer_file else self.template
        return version.partition("-")[0] if version.startswith("v") else "v1"


COMPARED = (
    "dim",
    "n_layers",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "sliding_window",
)

PARTS = ("yarn", "llama_4_scaling", "moe")  # a model that has others is no copy of a release, right or wrong
