"""Calls from Python that cannot be meant: each is a MistralError of the right kind, in one sentence, as docs/python.md
promises; and what looks odd but is meant is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mistral
from mistral import Chat, LoadOptions, OutOfMemory, SamplingParams, complete, load, stream
from mistral.args import ArgsError, ModelArgs
from mistral.cache import CacheError, RollingBufferCache
from mistral.chat import session
from mistral.chat.messages import Message, TemplateError
from mistral.chat.session import SessionError
from mistral.chat.templates import Template, find_template
from mistral.engine import Engine
from mistral.formats.convert import convert
from mistral.generate import generate
from mistral.grammar import Grammars
from mistral.loader.load import Loaded
from mistral.loader.options import OptionError
from mistral.model import Transformer
from mistral.request import GenerationError
from mistral.sampling_params import SamplingError
from mistral.stored_ids import StoredIds
from mistral.tokenizer import Tokenizer, TokenizerError
from mistral.util.errors import ConvertError, FormatError, MistralError, UsageError
from tests.support.tiny import tiny_args, tiny_model

BUNDLED = Path(mistral.__path__[0]) / "bundled"
ARGS = tiny_args()
PARAMS = SamplingParams(max_tokens=2, temperature=0)


@dataclass
class Given:
    """What the calls below are made with."""

    loaded: Loaded
    template: Template
    small: Transformer
    out: Path

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def words(self) -> Any:
        return self.loaded.tokenizer

    def engine(self, **named: Any) -> Engine:
        return Engine(self.model, **{"eos_ids": [], **named})

    def chat(self, **named: Any) -> Chat:
        return Chat(self.model, self.words, self.template, **{"max_tokens": 2, "seed": 1, **named})

    def cache(self, **changes: Any) -> RollingBufferCache:
        return RollingBufferCache(replace(ARGS, **changes), 2)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    loaded = load(device="cpu")
    template = find_template(loaded.tokenizer, folder=loaded.folder)
    return Given(loaded, template, tiny_model(ARGS), tmp_path_factory.mktemp("out"))


Call = tuple[Callable[[Given], object], type[MistralError], str]


def ids(*given: Any, **named: Any) -> torch.Tensor:
    return torch.tensor(list(given), **named)


def bad_ids(tensor: Any) -> Callable[[Given], object]:
    return lambda g: g.small(tensor, [2])


def bad_lengths(seqlens: Any) -> Callable[[Given], object]:
    return lambda g: g.small(ids(1, 5, 9), seqlens)


def bad_args(**changes: Any) -> Callable[[Given], object]:
    return lambda g: tiny_args(**changes)


def bad_params(**fields: Any) -> Callable[[Given], object]:
    return lambda g: SamplingParams(**fields)


def bad_load(*folder: Any, **options: Any) -> Callable[[Given], object]:
    return lambda g: load(*folder, **options)


def bad_prompts(prompts: Any) -> Callable[[Given], object]:
    return lambda g: complete(prompts, g.model, g.words, params=PARAMS)


def bad_option(**named: Any) -> Callable[[Given], object]:
    return lambda g: list(stream(["a"], g.model, g.words, **{"max_tokens": 2, **named}))


MODEL: list[Call] = [
    (bad_ids(ids(1, 61)), UsageError, "has the id 61, outside the vocabulary of 61: ids are 0 to 60"),
    (bad_ids(ids(-1, 5)), UsageError, "has the id -1, outside"),
    (bad_ids(ids(1.0, 2.0)), UsageError, "is of .*float32; it must be dense and of torch.int64"),
    (bad_ids(ids(True, False)), UsageError, "is of .*bool"),
    (bad_ids(ids(1, 2).to_sparse()), UsageError, "is of torch.sparse_coo"),
    (bad_ids(ids([1, 2])), UsageError, r"input_ids has shape \(1, 2\): pack"),
    (bad_ids(torch.tensor(1)), UsageError, r"input_ids has shape \(\)"),
    (bad_ids([1, 2]), UsageError, r"input_ids is \[1, 2\]; it must be a tensor: torch.tensor\(ids\)"),
    (bad_ids(np.array([1, 2])), UsageError, "must be a tensor"),
    (bad_ids(None), UsageError, "input_ids is None"),
    (bad_ids(ids(1, 2, device="meta")), UsageError, r"is on meta, and the model on cpu: ids.to\(model.device\)"),
    (bad_lengths([2, 2]), UsageError, r"seqlens sum to 4, but input_ids has shape \(3,\)"),
    (bad_lengths([]), UsageError, "seqlens sum to 0"),
    (bad_lengths([4, -1]), UsageError, r"negative sequence length in \[4, -1\]: give 0 or more"),
    (bad_lengths(3), UsageError, "seqlens is 3; it must be a list of whole numbers"),
    (bad_lengths([3.0]), UsageError, r"seqlens is \[3.0\]"),
    (bad_lengths("3"), UsageError, "seqlens is '3'"),
    (bad_lengths([[3]]), UsageError, r"seqlens is \[\[3\]\]"),
    (bad_lengths(torch.tensor(3)), UsageError, "seqlens is tensor"),
    (lambda g: g.small.forward_partial(ids(1.5), [1]), UsageError, "float32"),
    (lambda g: g.small(ids(1, 2), [2], "cache"), UsageError, "cache is 'cache'; it must be a RollingBufferCache"),
    (lambda g: g.small(ids(1, 2), [2], g.cache(n_layers=3)), CacheError, "is of 3 layers .*, the model of 2 layers"),
    (lambda g: g.small(ids(1, 2), [2], g.cache(n_layers=1)), CacheError, "is of 1 layers"),
    (lambda g: g.small(ids(1, 2), [2], g.cache(n_kv_heads=1)), CacheError, "2 layers of 1 key heads of 8, the model"),
    (lambda g: g.small(ids(1, 2), [2], g.cache(head_dim=4)), CacheError, "key heads of 4"),
    (lambda g: g.small(ids(1, 2, 3), [1, 1, 1], g.cache()), CacheError, "3 sequences for a cache of 2 rows"),
    (
        lambda g: g.small(ids(1), [1], RollingBufferCache(ARGS, 1, device="meta")),
        CacheError,
        r"the cache is on meta, and the model on cpu: use model.make_cache\(rows\)",
    ),
    (lambda g: g.small.make_cache(0), CacheError, "rows is 0; it must be at least 1"),
    (lambda g: g.small.make_cache("2"), CacheError, "rows is '2'; it must be a whole number"),
    (lambda g: g.small.make_cache(True), CacheError, "rows is True"),
    (lambda g: g.small.make_cache(10**12), CacheError, "rows is 1000000000000; it must be at most"),
    (lambda g: g.small.make_cache(1, -1), CacheError, "positions is -1"),
    (lambda g: g.small.make_cache(1, 1.5), CacheError, "positions is 1.5"),
    (
        lambda g: RollingBufferCache(replace(ARGS, sliding_window=None), 10**6, positions=10**6),
        OutOfMemory,
        "1000000 rows of 1000000 positions need 256000.0 GB, but cpu has .*: ask for fewer",
    ),
    (
        lambda g: RollingBufferCache(ARGS, 1, dtype="float32"),
        CacheError,
        "dtype is 'float32'; it must be torch.float32",
    ),  # type: ignore[arg-type]
    (lambda g: RollingBufferCache(ARGS, 1, dtype=torch.int64), CacheError, "dtype is torch.int64"),
    (lambda g: RollingBufferCache(ARGS, 1, device="gpu"), CacheError, "device is 'gpu', which .*: use model.device"),
    (lambda g: RollingBufferCache({}, 1), CacheError, r"args is \{\}; it must be ModelArgs"),  # type: ignore[arg-type]
    (lambda g: g.cache().reset(2), CacheError, "no row 2 in a cache of 2 rows"),
    (lambda g: g.cache().reset("0"), CacheError, "no row '0'"),  # type: ignore[arg-type]
    (lambda g: g.cache().reset(0, 1.5), CacheError, "position is 1.5"),  # type: ignore[arg-type]
    (lambda g: g.cache().rewind(0, 5), CacheError, "it cannot be rewound to 5"),
    (lambda g: g.cache().rewind(0, "x"), CacheError, "length is 'x'"),  # type: ignore[arg-type]
    (lambda g: g.cache().copy(0, 7), CacheError, "no row 7"),
    (lambda g: g.cache().grow(2, -5), CacheError, "positions is -5"),
    (lambda g: Transformer("x"), UsageError, "args is 'x'; it must be ModelArgs"),  # type: ignore[arg-type]
    (lambda g: Transformer(ARGS, "sdpa"), UsageError, "attend is 'sdpa'; it must be a function"),  # type: ignore[arg-type]
    (lambda g: Transformer(ARGS, None, "float32"), UsageError, "compute_dtype is 'float32'"),  # type: ignore[arg-type]
    (lambda g: Transformer.from_folder("nowhere"), FormatError, "no such folder: nowhere"),
    (bad_args(dim=0), ArgsError, "dim is 0; it must be at least 1"),
    (bad_args(dim="48"), ArgsError, "dim is '48'; it must be a whole number"),
    (bad_args(n_kv_heads=3), ArgsError, "n_kv_heads 3 does not divide n_heads 4"),
    (bad_args(head_dim=5), ArgsError, "head_dim 5 is odd"),
    (bad_args(norm_eps=float("nan")), ArgsError, "norm_eps is nan"),
    (bad_args(sliding_window=4.5), ArgsError, "sliding_window is 4.5; it must be a whole number"),
    (bad_args(sliding_window=[4, "x"]), ArgsError, "sliding_window is 'x'; it must be a whole number"),
    (bad_args(rope_theta="x"), ArgsError, "rope_theta must be a number"),
    (bad_args(yarn={}), ArgsError, r"yarn must be a Yarn or None, not \{\}"),
    (bad_args(vocab_size=2**40), ArgsError, "it must be at most"),
]

TEXT: list[Call] = [
    (lambda g: g.words.encode(5), TokenizerError, "5 is no text: give a str"),
    (lambda g: g.words.encode(b"abc"), TokenizerError, "b'abc' is no text"),
    (lambda g: g.words.encode("a\ud800"), TokenizerError, "not valid Unicode at character 1"),
    (lambda g: g.words.encode_parts([1.5]), TokenizerError, "1.5 is no text"),
    (lambda g: g.words.encode_parts("abc"), TokenizerError, "parts is 'abc'"),
    (lambda g: g.words.decode("x"), TokenizerError, "ids is 'x'; it must be a list of whole numbers"),
    (lambda g: g.words.decode([1.5]), TokenizerError, r"ids is \[1.5\]"),
    (lambda g: g.words.decode(5), TokenizerError, "ids is 5"),
    (lambda g: g.words.decode([[1]]), TokenizerError, r"ids is \[\[1\]\]"),
    (lambda g: g.words.decode([-1]), TokenizerError, "id -1 is below 0"),
    (lambda g: setattr(g.words, "eos_ids", ["x"]), TokenizerError, r"eos_ids is \['x'\]"),
    (lambda g: g.words.has_control(5), TokenizerError, "5 is no text"),
    (lambda g: Tokenizer(5), TokenizerError, "the tokenizer is 5; it must be a path"),  # type: ignore[arg-type]
    (lambda g: Tokenizer("a\0b"), TokenizerError, "no name can have the character 0"),
    (lambda g: Tokenizer("nowhere"), TokenizerError, "no tokenizer at nowhere"),
    (lambda g: StoredIds(5), FormatError, "ids is 5; it must be a path"),  # type: ignore[arg-type]
    (bad_params(max_tokens="5"), SamplingError, "max_tokens is '5'; it must be a whole number"),
    (bad_params(max_tokens=1.5), SamplingError, "max_tokens is 1.5"),
    (bad_params(temperature="hot"), SamplingError, "temperature is 'hot'; it must be a number"),
    (bad_params(temperature=None), SamplingError, "temperature is None"),
    (bad_params(top_p=2), SamplingError, "top_p is 2; it must be at most 1"),
    (bad_params(seed=1.5), SamplingError, "seed is 1.5"),
    (bad_params(stop=5), SamplingError, "stop is 5; it must be strings"),
    (bad_params(logit_bias={"a": 1}), SamplingError, "an id of logit_bias is 'a'"),
    (bad_params(logits_processor=5), SamplingError, "logits_processor is 5; it must be a function"),
    (bad_prompts("text"), GenerationError, "prompts is one string; give a list of them"),
    (bad_prompts(5), GenerationError, "prompts is 5; it must be a list of strings or of lists of ids"),
    (bad_prompts({"a": 1}), GenerationError, r"prompts is \{'a': 1\}"),
    (bad_prompts([]), GenerationError, "no prompts: give at least one"),
    (bad_prompts([5]), GenerationError, "prompt 0 is 5; it must be a string or a list of ids"),
    (bad_prompts(["a", [1.5]]), GenerationError, r"prompt 1 is \[1.5\]"),
    (bad_prompts([[True]]), GenerationError, r"prompt 0 is \[True\]"),
    (bad_prompts([[]]), GenerationError, "prompt 0 has no tokens"),
    (bad_prompts([[4096]]), GenerationError, "prompt 0 has the id 4096, outside the vocabulary of 4096"),
    (lambda g: complete(["a"], g.loaded, g.words), GenerationError, "Loaded is no model .* take .model"),  # type: ignore[arg-type]
    (lambda g: complete(["a"], None, g.words), GenerationError, "NoneType is no model"),  # type: ignore[arg-type]
    (lambda g: complete(["a"], g.model, "m"), TokenizerError, "str is no tokenizer that can be used"),  # type: ignore[arg-type]
    (lambda g: complete(["a"], g.model, None), TokenizerError, "prompts must be lists of ids"),
    (bad_option(params=5), UsageError, r"params is 5; it must be SamplingParams\(\.\.\)"),
    (bad_option(params=[5]), UsageError, "params is 5"),
    (bad_option(max_tokens=[1, 2]), GenerationError, "2 values of max_tokens for 1 prompt"),
    (bad_option(eos_ids="x"), GenerationError, "eos_ids is 'x'; it must be a list of whole numbers"),
    (bad_option(eos_ids=[1.5]), GenerationError, r"eos_ids is \[1.5\]"),
    (bad_option(chunk_size=0), GenerationError, "chunk_size is 0; it must be at least 1"),
    (bad_option(cache=5), UsageError, "cache is 5; it must be a RollingBufferCache"),
    (bad_option(cache=RollingBufferCache(ARGS, 1)), CacheError, "the cache is of 2 layers"),
    (bad_option(progress=5), GenerationError, "progress is 5; it must be a function"),
    (bad_option(thoughts=5), GenerationError, "thoughts is 5"),
    (bad_option(adapter="formal"), UsageError, "no adapter is called 'formal'"),
    (bad_option(top_logprobs=5000), GenerationError, "the vocabulary has only 4096 tokens"),
    (bad_option(logits_processor=lambda *_: 5), SamplingError, "logits_processor gave 5; it must return logits"),
    (lambda g: generate("a", g.model, g.words, max_tokens=2), GenerationError, "prompts is one string"),
    (lambda g: generate(["a"], g.model, g.words, max_tokens="x"), SamplingError, "max_tokens is 'x'"),
    (lambda g: generate(["a"], 5, g.words, max_tokens=2), GenerationError, "int is no model"),  # type: ignore[arg-type]
    (lambda g: g.engine(eos_ids=None), GenerationError, "eos_ids is None"),
    (lambda g: g.engine(rows=0), GenerationError, "rows is 0; it must be at least 1"),
    (lambda g: g.engine(step_tokens="x"), GenerationError, "step_tokens is 'x'"),
    (lambda g: g.engine(cache=RollingBufferCache(ARGS, 1)), CacheError, "the cache is of 2 layers"),
    (lambda g: g.engine().add([1.5], PARAMS), GenerationError, r"prompt 0 is \[1.5\]; it must be a list of ids"),
    (lambda g: g.engine().add("abc", PARAMS), GenerationError, "prompt 0 is 'abc'"),  # type: ignore[arg-type]
    (lambda g: g.engine().add([1], None), GenerationError, "params is None; it must be SamplingParams"),  # type: ignore[arg-type]
    (lambda g: g.engine().add([1], PARAMS, "x"), GenerationError, "there is no row 'x'"),  # type: ignore[arg-type]
    (lambda g: g.engine().add([1], PARAMS, sample=5), GenerationError, "sample is 5; it must be at least 0 and less"),
    (lambda g: g.engine().stop(5), GenerationError, "request is 5"),  # type: ignore[arg-type]
    (lambda g: g.engine().stop(g.engine().add([1], PARAMS)), GenerationError, "is of another engine"),
    (lambda g: Grammars(g.words, [2]).choice("yes"), SamplingError, "choice is 'yes'; it must be a list of texts"),
    (lambda g: Grammars(g.words, [2]).choice([]), SamplingError, "at least one"),
    (lambda g: Grammars(g.words, [2]).regex("("), SamplingError, "the grammar cannot be used"),
    (lambda g: Grammars(g.words, [2]).json(5), SamplingError, "schema is 5"),  # type: ignore[arg-type]
]

CHAT: list[Call] = [
    (lambda g: Chat("m", g.words, g.template), GenerationError, "str is no model"),  # type: ignore[arg-type]
    (lambda g: Chat(g.model, "x", g.template), TokenizerError, "str is no tokenizer"),  # type: ignore[arg-type]
    (lambda g: Chat(g.model, g.words, "v1"), TemplateError, r"template is 'v1'; it must be what find_template\("),  # type: ignore[arg-type]
    (lambda g: g.chat(system=5), GenerationError, "a system prompt is text, and not 5"),
    (lambda g: g.chat(n=2), GenerationError, "n is 2; a conversation has one answer"),
    (lambda g: g.chat().answer(5), GenerationError, "a question is text, and not 5"),  # type: ignore[arg-type]
    (lambda g: list(g.chat().answer("x", progress=5)), GenerationError, "progress is 5"),  # type: ignore[arg-type]
    (lambda g: g.chat().undo(), GenerationError, "there is nothing to undo"),
    (lambda g: g.chat().resume(), GenerationError, "there is no answer to go on with"),
    (lambda g: g.chat().set_adapter("x"), UsageError, "no adapter is called 'x'"),
    (lambda g: setattr(g.chat(), "params", 5), GenerationError, "params is 5"),
    (lambda g: g.template.encode_chat([]), TemplateError, "at least one message"),
    (lambda g: g.template.encode_chat(["x"]), TemplateError, r"must be a list of Message\(role"),  # type: ignore[list-item]
    (lambda g: g.template.encode_chat([Message("x", "y")]), TemplateError, "no role is called 'x'"),
    (lambda g: g.template.encode_chat([Message("user", 5)]), TemplateError, "5 is no text"),  # type: ignore[arg-type]
    (lambda g: session.save(g.chat(), 5, "m"), SessionError, "the file of a conversation is 5; it must be a path"),  # type: ignore[arg-type]
    (lambda g: session.load(g.chat(), g.out / "nowhere", "m"), SessionError, "nowhere cannot be read: No such file"),
    (lambda g: find_template(g.words, name="nope"), TemplateError, "no template is called 'nope': v1, "),
    (lambda g: find_template(g.words, name=5), TemplateError, "name is 5"),  # type: ignore[arg-type]
    (lambda g: find_template(g.words, folder=5), TemplateError, "folder is 5; it must be a path"),  # type: ignore[arg-type]
]

FILES: list[Call] = [
    (bad_load(5), UsageError, "the folder is 5; it must be a path or a hub id"),
    (bad_load("nowhere"), FormatError, "no such folder: nowhere"),
    (bad_load(device="gpu"), OptionError, "device 'gpu' is not one of cpu, cuda"),
    (bad_load(dtype="int4"), OptionError, "dtype 'int4' is not one of"),
    (bad_load(threads="x"), OptionError, "threads is 'x'; it must be a whole number"),
    (bad_load(quant=[]), OptionError, r"quant \[\] is not one of int8, int4"),
    (bad_load(kernels="x"), OptionError, "kernels is 'x'; it must be True, False or None"),
    (bad_load(deterministic="x"), OptionError, "deterministic is 'x'"),
    (bad_load(options=5), UsageError, r"options is 5; it must be LoadOptions\(\.\.\)"),
    (bad_load(options=LoadOptions(), tokenizer=5), TokenizerError, "int is no tokenizer"),
    (bad_load(sliding_window=1.5), OptionError, "sliding_window is 1.5"),
    (lambda g: g.loaded.save(5), ConvertError, "the folder to write is 5; it must be a path"),  # type: ignore[arg-type]
    (lambda g: g.loaded.save("a\0b"), ConvertError, "no name can have the character 0"),
    (lambda g: g.loaded.save(BUNDLED), ConvertError, "is the folder to convert"),
    (lambda g: g.small.save(None), ConvertError, "the folder to write is None"),  # type: ignore[arg-type]
    (lambda g: mistral.save(5, g.out / "a"), UsageError, "model is 5; it must be a model: loaded.model"),
    (lambda g: mistral.save(g.small, g.out / "b", "x"), UsageError, "source is 'x'; it must be a Path"),
    (lambda g: convert(BUNDLED, g.out / "c", "xx"), ConvertError, "no layout is called 'xx': mistral or hf"),
    (lambda g: convert(BUNDLED, b"x", "hf"), ConvertError, "the folder to write is b'x'"),  # type: ignore[arg-type]
    (lambda g: convert(BUNDLED, g.out / "d", "hf", shard_size=0), ConvertError, "shard_size is 0"),
    (lambda g: convert(BUNDLED, g.out / "e", "mistral", calibrate=5), ConvertError, "calibrate is 5"),  # type: ignore[arg-type]
]

CALLS = {
    f"{part}-{i}": call
    for part, calls in globals().copy().items()
    if part.isupper() and isinstance(calls, list)
    for i, call in enumerate(calls)
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_refused_in_a_sentence(given: Given, call: Call) -> None:
    function, kind, message = call
    with pytest.raises(kind, match=message) as refused:
        function(given)
    text = str(refused.value)
    assert text.isprintable()
    assert len(text) < 300
    assert refused.value.exit_code == 2
    assert list(given.out.iterdir()) == []


def test_accepted(given: Given) -> None:
    """What looks odd, and is meant."""
    small = given.small
    want = small(ids(1, 5, 9), [3])
    for same, lengths in (
        (ids(1, 5, 9, dtype=torch.int32), [3]),
        (ids(1, 5, 9), torch.tensor([3])),
        (ids(1, 5, 9), (np.int64(3),)),
    ):
        assert torch.equal(small(same, lengths), want)
    assert small(ids(dtype=torch.int64), [0]).shape == (0, ARGS.vocab_size)
    first = complete([[1, 5]], given.model, given.words, params=PARAMS)[0].tokens
    for prompt in (np.array([1, 5]), torch.tensor([1, 5]), (1, 5), iter([1, 5])):
        assert complete([prompt], given.model, given.words, params=PARAMS)[0].tokens == first
    assert given.words.decode([10**9]) == ""  # a padded model may make it
    assert given.words.decode(np.array(first)) == given.words.decode(torch.tensor(first)) == given.words.decode(first)


def test_a_refused_step_leaves_the_cache_as_it_was(given: Given) -> None:
    cache = given.small.make_cache(1)
    given.small(ids(1, 5), [2], cache)
    for wrong in (ids(99), ids(1.5), [7]):
        with pytest.raises(UsageError):
            given.small(wrong, [1], cache)
    assert cache.lengths == [2]
    assert given.small(ids(7), [1], cache).shape == (1, ARGS.vocab_size)


def test_unknown_names_are_python_s_affair(given: Given) -> None:
    for function in (
        lambda: load(colour=5),
        lambda: complete(["a"], given.model, given.words, tempurature=1),
        lambda: ModelArgs(dim=5),
    ):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="colour|tempurature|missing"):
            function()
