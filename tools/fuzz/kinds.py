"""What is broken, and what is then done with it: the commands of a user, on a folder with one broken file.

A good folder of each kind is made once; a case is a copy of it in which one file is a broken copy of itself.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from safetensors.torch import load_file, save_file

from mistral.chat import session
from mistral.chat.conversation import Chat
from mistral.chat.templates import find_template
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.formats.folder import BUNDLED
from mistral.formats.inspect import as_json, inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.formats.mistral import to_args
from mistral.generate import stream
from mistral.loader.load import Loaded, load
from mistral.parameters import parameters
from mistral.tekken import PATTERN
from tools.fuzz.gguf_files import mutate_gguf, write_gguf
from tools.fuzz.mutate import Pairs, mutate_json, mutate_safetensors, mutate_sentencepiece, parse, write
from tools.fuzz.pickles import mutate_pth

SHAPE = {
    "dim": 16,
    "n_layers": 2,
    "head_dim": 4,
    "hidden_dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "sliding_window": 5,
    "rope_theta": 1e4,
}
PROMPT = "The king said: „Où est-il? 😀”\n"
OUTSIDE = "../good/index/"  # weights that are there, but in another folder


class CaseError(Exception):
    """What a case shows by itself to be wrong, although nothing was raised."""


@dataclass
class Trace:
    """What came of the steps of a case: whether the file was read, and errors by step."""

    loaded: bool
    errors: list[tuple[str, BaseException]]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note what is raised, and go on."""
        try:
            yield
        except BaseException as error:
            self.errors.append((name, error))


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        file: its name in its folder.
        mutate: makes a broken copy.
        make: makes a good folder around it.
        use: does with a folder what a user would do.
    """

    file: str
    mutate: Callable[[random.Random, bytes], bytes]
    make: Callable[[Path], None]
    use: Callable[[Path, random.Random, Trace], object]


# --- good folders


def _mistral(folder: Path, vocab_size: int = 4096) -> None:
    shape = {**SHAPE, "vocab_size": vocab_size}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(shape), encoding="utf-8")
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    expected = parameters(to_args(shape))
    weights = {name: torch.randn(weight.shape, generator=generator) * 0.1 for name, weight in expected.items()}
    save_file(weights, folder / "consolidated.safetensors")


def _hugging_face(folder: Path) -> None:
    source = folder.with_name(f"{folder.name}-source")
    _mistral(source)
    convert(source, folder, "hf", dtype="bfloat16", shard_size=150_000)


def _pth(folder: Path) -> None:
    _mistral(folder)
    single = folder / "consolidated.safetensors"
    torch.save(load_file(single), folder / "consolidated.00.pth")
    single.unlink()


def _gguf(folder: Path) -> None:
    words = [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "th", "\u2581k", "ing", "the"]
    shape = {**SHAPE, "dim": 32, "vocab_size": len(words) + 3}
    generator = torch.Generator().manual_seed(0)
    expected = parameters(to_args({**shape, "sliding_window": None}))
    weights = {name: torch.randn(weight.shape, generator=generator) * 0.1 for name, weight in expected.items()}
    folder.mkdir()
    write_gguf(folder / "model.gguf", shape, weights, words)


def _tekken(folder: Path) -> None:
    """With a vocabulary of bytes and a few words, so that reading it takes no time."""
    words = [bytes([i]) for i in range(256)] + [b"th", b"the", b" k", b"in", b"ing", b" king"]
    special = Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    tokenizer = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
            for i, word in enumerate(words)
        ],
        "special_tokens": special,
    }
    _mistral(folder, len(words) + len(special))
    (folder / "tekken.json").write_text(json.dumps(tokenizer), encoding="utf-8")


@lru_cache(maxsize=1)
def _talker(folder: Path) -> tuple[Loaded, str]:
    """A model to talk with, and its fingerprint."""
    return load(folder, device="cpu"), fingerprint(folder)


def _chat(folder: Path) -> tuple[Chat, str]:
    loaded, mark = _talker(folder.parent / "good" / "params")
    template = find_template(loaded.tokenizer)
    return Chat(loaded.model, loaded.tokenizer, template, seed=1, max_tokens=4, temperature=0.7), mark


def _session(folder: Path) -> None:
    folder.mkdir()
    chat, mark = _chat(folder.parent)
    chat.set_system("Be brief.")
    for question in ("Who are you?", "Où?"):
        list(chat.answer(question))
    session.save(chat, folder / "talk.json", mark)


# --- what is done with them


def _use_folder(folder: Path, rng: random.Random, trace: Trace) -> Loaded | None:
    loaded = None
    with trace.step("inspect"):
        report = inspect_folder(folder)
        as_json(report)
        as_text(report)
    with trace.step("load"):
        loaded = load(folder, device="cpu")
        loaded.describe()
        trace.loaded = True
    if loaded is not None:
        with trace.step("generate"):
            list(stream([PROMPT], loaded.model, loaded.tokenizer, max_tokens=1, temperature=0.7, seed=0))
    if rng.random() < 0.2:
        written = folder.with_name(f"{folder.name}-written")
        with trace.step("convert"):
            convert(folder, written, rng.choice(("mistral", "hf")), dtype=rng.choice((None, "float16")))
        shutil.rmtree(written, ignore_errors=True)
    return loaded


def _use_tokenizer(folder: Path, rng: random.Random, trace: Trace) -> None:
    loaded = _use_folder(folder, rng, trace)
    if loaded is not None:
        with trace.step("chat"):
            template = find_template(loaded.tokenizer)
            list(Chat(loaded.model, loaded.tokenizer, template, seed=0, max_tokens=1).answer(PROMPT))


def _use_index(folder: Path, rng: random.Random, trace: Trace) -> None:
    _use_folder(folder, rng, trace)
    if trace.loaded and OUTSIDE in (folder / "model.safetensors.index.json").read_text(encoding="utf-8"):
        trace.errors.append(("load", CaseError("weights outside of the folder were read")))


def _use_session(folder: Path, rng: random.Random, trace: Trace) -> None:
    chat, mark = _chat(folder)
    with trace.step("load"):
        session.load(chat, folder / "talk.json", mark)
        trace.loaded = True
    if trace.loaded:
        with trace.step("answer"):
            for made, _ in enumerate(chat.answer("And now?")):  # the file says how many it may be
                if made == 2:
                    break
        with trace.step("save"):
            session.save(chat, folder / "talk.json", mark)


# --- broken files of their own kinds


def mutate_index(rng: random.Random, data: bytes) -> bytes:
    """An index that names files which are not those beside it, or a broken one."""
    if rng.random() < 0.6:
        return mutate_json(rng, data)
    tree = parse(data)
    names = next(value for key, value in tree if key == "weight_map")
    one = rng.choice(names)
    there = one[1]
    new = rng.choice(
        (
            OUTSIDE + there,
            "/" + there,
            "./" + there,
            there.upper(),
            "model.safetensors.index.json",
            "config.json",
            "tokenizer.model",
            "",
            ".",
            "..",
            ".safetensors",
            "x" * 5000 + ".safetensors",
            there + "\0",
            "\ud800.safetensors",
            rng.choice(names)[1],
        )
    )
    for pair in names if rng.random() < 0.3 else [one]:
        pair[1] = new
    if rng.random() < 0.1:
        names[:] = Pairs([[f"{i}", there] for i in range(10_000)])
    return write(tree).encode()


# Sessions come after params, whose folder they talk with.
KINDS = {
    "params": Kind("params.json", mutate_json, _mistral, _use_folder),
    "config": Kind("config.json", mutate_json, _hugging_face, _use_folder),
    "header": Kind("consolidated.safetensors", mutate_safetensors, _mistral, _use_folder),
    "index": Kind("model.safetensors.index.json", mutate_index, _hugging_face, _use_index),
    "gguf": Kind("model.gguf", mutate_gguf, _gguf, _use_tokenizer),
    "pth": Kind("consolidated.00.pth", mutate_pth, _pth, _use_folder),
    "sentencepiece": Kind("tokenizer.model", mutate_sentencepiece, _mistral, _use_tokenizer),
    "tekken": Kind("tekken.json", mutate_json, _tekken, _use_tokenizer),
    "session": Kind("talk.json", mutate_json, _session, _use_session),
}


def prepare(home: Path) -> None:
    """Make the good folders where they are not there yet, and see that they are good."""
    good = home / "good"
    good.mkdir(exist_ok=True)
    for name, kind in KINDS.items():
        if not (good / name).exists():
            kind.make(good / name)
        shutil.copytree(good / name, home / "first")
        trace = Trace(False, [])
        kind.use(home / "first", random.Random(0), trace)
        shutil.rmtree(home / "first")
        if trace.errors or not trace.loaded:
            raise RuntimeError(f"the good folder for {name} is not good: {trace.errors}")


def make_case(home: Path, kind: str, seed: int, number: int) -> tuple[Path, random.Random]:
    """The folder of a case, and the random numbers that its use goes on with."""
    rng = random.Random(f"{seed} {kind} {number}")
    folder = home / f"{kind}-{seed}-{number}"
    shutil.copytree(home / "good" / kind, folder)
    path = folder / KINDS[kind].file
    path.write_bytes(KINDS[kind].mutate(rng, path.read_bytes()))
    return folder, rng
