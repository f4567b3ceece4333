"""The releases of the family, as data, and how to tell which one a model is.

Recognising reads a shape that is already checked and says what it finds; it changes nothing. Knows
nothing about files on disk. Members that read images or use fp8 stand for their text, in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mistral.args import ModelArgs, Moe, QueryScaling, Yarn

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


STRAY_WINDOW = WrongCopy(
    {"sliding_window": 4096},
    "this release has none, and 4096 is a stray of wrong copies: set it to null",
)

MINISTRAL_YARN = Yarn(16, 16384, 32, 1, 1.0)
MINISTRAL_QUERIES = QueryScaling(16384, 0.1)

RELEASES = (
    Release(
        name="7B v0.1",
        variants=("7B v0.1", "7B Instruct v0.1"),
        dim=4096,
        n_layers=32,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=32000,
        sliding_window=4096,
        rope_theta=1e4,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model",
        template="v1",
        files=("params.json", "consolidated.00.pth", "tokenizer.model"),
        md5={"7B v0.1": "37dab53973db2d56b2da0a033a15307f"},
        wrong_copies=(WrongCopy({"hidden_dim": 4096}, "a mirror shipped this by mistake: set it to 14336"),),
    ),
    Release(
        name="7B v0.2",
        variants=("7B Instruct v0.2",),
        dim=4096,
        n_layers=32,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=32000,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model",
        template="v1",
        files=("params.json", "consolidated.00.pth", "tokenizer.model"),
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="7B v0.3",
        variants=("7B v0.3", "7B Instruct v0.3"),
        dim=4096,
        n_layers=32,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=32768,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model.v3",
        template="v3",
        files=("params.json", "consolidated.safetensors", "tokenizer.model.v3"),
        md5={
            "7B v0.3": "0663b293810d7571dad25dae2f2a5806",
            "7B Instruct v0.3": "80b71fcb6416085bcb4efad86dfb4d52",
        },
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="Nemo 12B 2407",
        variants=("Nemo 12B 2407", "Nemo Instruct 12B 2407"),
        dim=5120,
        n_layers=40,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=131072,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="tekken",
        tokenizer_file="tekken.json",
        template="v3-tekken",
        files=("params.json", "consolidated.safetensors", "tekken.json"),
        md5={"Nemo Instruct 12B 2407": "296fbdf911cb88e6f0be74cd04827fe7"},
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="Codestral 22B v0.1",
        variants=("Codestral 22B v0.1",),
        dim=6144,
        n_layers=56,
        hidden_dim=16384,
        n_heads=48,
        vocab_size=32768,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model.v3",
        template="v3",
        files=("params.json", "consolidated.safetensors", "tokenizer.model.v3"),
        md5={"Codestral 22B v0.1": "1ea95d474a1d374b1d1b20a8e0159de3"},
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="Small 3 24B",
        variants=("Small 3 24B", "Small 3 Instruct 24B"),
        dim=5120,
        n_layers=40,
        hidden_dim=32768,
        n_heads=32,
        vocab_size=131072,
        sliding_window=None,
        rope_theta=1e8,
        tokenizer_kind="tekken",
        tokenizer_file="tekken.json",
        template="v7-tekken",
        files=("params.json", "consolidated.safetensors", "tekken.json"),
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="Large 2411",
        variants=("Large Instruct 2411",),
        dim=12288,
        n_layers=88,
        hidden_dim=28672,
        n_heads=96,
        vocab_size=32768,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model.v7",
        template="v7",
        files=("params.json", "consolidated-*-of-*.safetensors", "tokenizer.model.v7"),
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="Large 2407",
        variants=("Large Instruct 2407",),
        dim=12288,
        n_layers=88,
        hidden_dim=28672,
        n_heads=96,
        vocab_size=32768,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model.v3",
        template="v3",
        files=("params.json", "consolidated-*-of-*.safetensors", "tokenizer.model.v3"),
        wrong_copies=(STRAY_WINDOW,),
    ),
    Release(
        name="Ministral 8B 2410",
        variants=("Ministral Instruct 8B 2410",),
        dim=4096,
        n_layers=36,
        hidden_dim=12288,
        n_heads=32,
        vocab_size=131072,
        sliding_window=(None, 32768, 32768, 32768),
        rope_theta=1e8,
        tokenizer_kind="tekken",
        tokenizer_file="tekken.json",
        template="v3-tekken",
        files=("params.json", "consolidated.safetensors", "tekken.json"),
        wrong_copies=(
            WrongCopy(
                {"sliding_window": 32768},
                "this release has it in three layers of four, which a config.json of type mistral cannot say: "
                "take Mistral's own files",
            ),
            STRAY_WINDOW,
        ),
    ),
    Release(
        name="MistralLite",
        variants=("MistralLite",),
        dim=4096,
        n_layers=32,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=32003,
        sliding_window=16384,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model",
        template="mistrallite",
        layout="huggingface",
        files=("config.json", "model-*-of-*.safetensors", "tokenizer.model"),
        added_words=3,
    ),
    Release(
        name="Small 3.1 24B",
        variants=(
            *("Small 3.1 24B", "Small 3.1 Instruct 24B", "Small 3.2 Instruct 24B", "Magistral Small"),
            *("Devstral Small 2505", "Devstral Small 2507"),
        ),
        dim=5120,
        n_layers=40,
        hidden_dim=32768,
        n_heads=32,
        vocab_size=131072,
        sliding_window=None,
        rope_theta=1e9,
        tokenizer_kind="tekken",
        tokenizer_file="tekken.json",
        template="v7-tekken",
        files=("params.json", "consolidated.safetensors", "tekken.json"),
    ),
    Release(
        name="Ministral 3 3B",
        variants=("Ministral 3 3B",),
        dim=3072,
        n_layers=26,
        hidden_dim=9216,
        n_heads=32,
        vocab_size=131072,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="tekken",
        tokenizer_file="tekken.json",
        template="v13-tekken",
        files=("params.json", "consolidated.safetensors", "tekken.json"),
        yarn=MINISTRAL_YARN,
        llama_4_scaling=MINISTRAL_QUERIES,
        tied_embeddings=True,
    ),
    Release(
        name="Ministral 3 8B",
        variants=("Ministral 3 8B",),
        dim=4096,
        n_layers=34,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=131072,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="tekken",
        tokenizer_file="tekken.json",
        template="v13-tekken",
        files=("params.json", "consolidated.safetensors", "tekken.json"),
        yarn=MINISTRAL_YARN,
        llama_4_scaling=MINISTRAL_QUERIES,
    ),
    Release(
        name="Mixtral 8x7B v0.1",
        variants=("Mixtral 8x7B v0.1", "Mixtral 8x7B Instruct v0.1"),
        dim=4096,
        n_layers=32,
        hidden_dim=14336,
        n_heads=32,
        vocab_size=32000,
        sliding_window=None,
        rope_theta=1e6,
        tokenizer_kind="sentencepiece",
        tokenizer_file="tokenizer.model",
        template="v1",
        layout="huggingface",
        files=("config.json", "model-*-of-*.safetensors", "tokenizer.model"),
        moe=Moe(8, 2),
    ),
)

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


def identify(
    args: ModelArgs, tokenizer_kind: str | None = None, tokenizer_version: str | None = None
) -> tuple[Release | None, list[str]]:
    """The release that a model is, and what is odd about it; nothing is changed.

    A release, or a known wrong copy of one, is recognised. One that differs in a single number in a way
    that is not known is not, but the warning names it.

    Args:
        tokenizer_kind: "sentencepiece" or "tekken", where it is known.
        tokenizer_version: "v1", "v3", ..., where it is known: it tells releases of one shape apart.

    Returns:
        the release or None, and warnings, a sentence each.
    """
    near: dict[str, list[str]] = {}
    # Those with the tokenizer's version come first; the order is kept otherwise.
    for release in sorted(RELEASES, key=lambda release: release.tokenizer_version != tokenizer_version):
        if any(getattr(release, name) != getattr(args, name) for name in PARTS):
            continue
        differing = [name for name in COMPARED if not _same(release, args, name)]
        if not differing:
            return release, _about_tokenizer(release, tokenizer_kind)
        for copy in release.wrong_copies:
            if set(differing) == set(copy.values) and all(getattr(args, n) == v for n, v in copy.values.items()):
                what = " and ".join(f"{name} is {_text(value)}" for name, value in copy.values.items())
                return release, [f"{what}: {copy.advice}", *_about_tokenizer(release, tokenizer_kind)]
        if len(differing) == 1:
            (name,) = differing
            here, there = _text(getattr(args, name)), _text(getattr(release, name))
            near.setdefault(f"{name} {here}", []).append(f"{release.name} (which has {there})")
    return None, [
        f"{odd} apart, this is {' or '.join(names)}: a fine-tune or a wrong copy" for odd, names in near.items()
    ]


def _same(release: Release, args: ModelArgs, name: str) -> bool:
    ours, theirs = getattr(args, name), getattr(release, name)
    if name != "sliding_window" or ours == theirs:
        return ours == theirs
    # One pattern has several spellings; it is written out only where the model is known to be no larger.
    if args.n_layers != release.n_layers:
        return False
    pattern = theirs if isinstance(theirs, tuple) else (theirs,)
    return args.windows == pattern * (release.n_layers // len(pattern))


def _about_tokenizer(release: Release, kind: str | None) -> list[str]:
    if kind in (None, "tokenizers", release.tokenizer_kind):  # a tokenizer.json may be like either
        return []
    return [f"the tokenizer is of kind {kind}, but {release.name} has {release.tokenizer_file}: it is another model's"]


def _text(value: Value) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        distinct = dict.fromkeys("none" if w is None else str(w) for w in value)
        return "/".join(distinct)
    return f"{value:.9g}" if isinstance(value, float) else str(value)
