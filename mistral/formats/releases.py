"""Which release of the family a model is.

Recognising reads a shape that is already checked and says what it finds; it changes nothing. Knows nothing about files
on disk. The releases are in release_table.py.
"""

from __future__ import annotations

from mistral.args import ModelArgs
from mistral.formats.release import COMPARED, PARTS, Release, Value, WrongCopy
from mistral.formats.release_table import RELEASES

__all__ = ["COMPARED", "PARTS", "RELEASES", "Release", "WrongCopy", "identify"]


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
