"""Folders that have a tokenizer.json only, of each kind that there is, small enough to be quick."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import mistral_common

from mistral.formats.folder import BUNDLED
from mistral.formats.hf_tokenizer import to_tokenizer_config, to_tokenizer_json
from mistral.tokenizer import Tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
KINDS = ("sentencepiece", "v3", "metaspace", "byte level", "tekken")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# As the releases' own files have it: no system prompt, roles that alternate.
STRICT_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def small_tekken(path: Path, words: int = 5000) -> Path:
    """A tekken.json with the first words of a real one."""
    raw = json.loads((DATA / "tekken_240911.json").read_text(encoding="utf-8"))
    special = raw["config"]["default_num_special_tokens"]
    raw["config"]["default_vocab_size"] = words + special
    raw["config"]["num_vocab_tokens"] = words
    raw["vocab"] = raw["vocab"][:words]
    path.write_text(json.dumps(raw))
    return path


@functools.cache
def contents(kind: str, scratch: Path) -> tuple[str, dict[str, Any]]:
    """A tokenizer.json and a tokenizer_config.json."""
    if kind == "byte level":
        return _byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if kind == "tekken":
        made = Tokenizer(small_tekken(scratch / "tekken.json"))
    else:
        name = BUNDLED / "tokenizer.model" if kind != "v3" else DATA / "mistral_instruct_tokenizer_240323.model.v3"
        made = Tokenizer(name)
    text = to_tokenizer_json(made)
    assert text is not None
    if kind == "metaspace":  # how later transformers write it: only the first piece of a text gets a space
        raw = json.loads(text)
        raw["normalizer"] = None
        raw["pre_tokenizer"] = {
            **{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
            "split": False,
        }
        text = json.dumps(raw)
    return text, to_tokenizer_config(made)


def _byte_level() -> str:
    """As GPT-2 has it, learned from a book's first pages."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Theirs(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    book = Path(__file__).parents[1] / "data" / "dwarf_long_nose.txt"
    made.train_from_iterator([book.read_text(encoding="utf-8")[:20_000]], trainer)
    return str(made.to_str())


def write_tokenizer(
    folder: Path, kind: str, scratch: Path, template: Any = None, added: tuple[str, ...] = (), **config: Any
) -> Path:
    """A folder with a tokenizer.json, and a tokenizer_config.json with what is asked for."""
    text, told = contents(kind, scratch)
    folder.mkdir(parents=True, exist_ok=True)
    told = {**told, **config}
    if added:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Theirs

        made = Theirs.from_str(text)
        made.add_tokens([AddedToken(word, special=True, normalized=False) for word in added])
        text = made.to_str()
    if template is not None:
        told["chat_template"] = template
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


PIECES = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        " " * 17,
        "the",
        " king",
        "Wolf",
        "'s",
        "don't",
        "x²",
        "1234",
        "3.14",
        "__init__",
    ),
    *(
        "é",
        "ß",
        "naïve",
        "Жили",
        " были",
        "永和",
        "九年",
        "龘𠮷",
        "ひら",
        "カナ",
        "한국어",
        "مرحبا",
        "שלום",
        "हिन्दी",
        "🙂",
        "👩‍👩‍👧",
        "🇫🇷",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "[INST]",
        "[/INST]",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<0x41>",
        "[IMG]",
        "<",
        ">",
    ),
    *(
        "\0",
        "\x7f",
        "\u200b",
        "\ue000",
        "\ufffd",
        "\u2581",
        "e\u0301",
        "ﬁ",
        "①",
        "½",
        "\u3000",
        "\xa0",
        "\ufeff",
        "\u2028",
    ),
    *(".", ",", "!?", "...", "(", ")", "{}", "//", "\\n", "#!", "==", "->", "https://a.b/c?d=e"),
)


def fuzz_texts(n: int, seed: int = 0) -> list[str]:
    """Texts of all sorts, the empty one among them."""
    dice = random.Random(seed)
    texts = ["", *PIECES]
    while len(texts) < n:
        if dice.random() < 0.15:
            kinds = ((32, 127), (0x80, 0x250), (0x400, 0x500), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (0, 0xD800))
            texts.append("".join(chr(dice.randrange(*dice.choice(kinds))) for _ in range(dice.randrange(1, 40))))
        else:
            texts.append("".join(dice.choices(PIECES, k=dice.randrange(1, 14))))
    return texts
