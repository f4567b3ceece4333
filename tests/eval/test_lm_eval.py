"""lm-evaluation-harness: the same numbers by this library, by its own `hf` model and over HTTP by our server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from mistral.eval.lm_eval import MistralLM
from mistral.formats.convert import convert
from mistral.loader.load import load
from mistral.util.errors import UsageError
from tests.support.folders import BUNDLED
from tests.support.serving import serving

LONG = (Path(__file__).parents[1] / "data" / "dwarf_long_nose.txt").read_text(encoding="utf-8")
KING = "Once upon a time there was a king who had three daughters, and the youngest of them was so beautiful that"
PAIRS = [
    (KING, " the sun"),
    (KING, " even the sun itself wondered"),
    (KING, ""),
    (KING, "ever"),  # one word with what is before it
    ("The king ", " was"),  # the space goes to the continuation
    ("", "The king"),
    ("", ""),
    ("The wolf said:", " \u201cNo\u201d \u2014 \u6c38\u548c"),
    (LONG[:3000], " dwarf"),  # longer than max_length
]
MAX_LENGTH = 200
EACH = 2e-5  # of fp32 rounding, a token


def instances(kind: str, asked: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(asked)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in transformers' layout."""
    target = tmp_path_factory.mktemp("hf") / "model"
    convert(BUNDLED, target, to="hf")
    return target


@pytest.fixture(scope="module")
def ours(folder: Path) -> MistralLM:
    return MistralLM(str(folder), dtype="float32", device="cpu", batch_size=3, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[HFLM]:
    threads = torch.get_num_threads()
    yield HFLM(str(folder), device="cpu", dtype="float32", batch_size=2, max_length=MAX_LENGTH)
    torch.set_num_threads(threads)


def test_likelihoods_are_those_of_hf(ours: MistralLM, theirs: HFLM) -> None:
    pairs = [pair for pair in PAIRS if pair[1]]
    got = ours.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert [score for score, pair in zip(got, PAIRS, strict=True) if not pair[1]] == [(0.0, True)] * 2
    want = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    kept = [score for score, pair in zip(got, PAIRS, strict=True) if pair[1]]
    for (logprob, greedy), (reference, flag), pair in zip(kept, want, pairs, strict=True):
        tokens = len(ours.tok_encode(pair[1], add_special_tokens=False))
        assert logprob == pytest.approx(reference, abs=EACH * (tokens + 1)), pair
        assert greedy == flag


def test_greedy_flags(ours: MistralLM) -> None:
    (text,) = ours.generate_until(instances("generate_until", [(KING, {"until": [], "max_gen_toks": 4})]))
    (yes,) = ours.loglikelihood(instances("loglikelihood", [(KING, text)]), disable_tqdm=True)
    (no,) = ours.loglikelihood(instances("loglikelihood", [(KING, text + "zq")]), disable_tqdm=True)
    assert (yes[1], no[1]) == (True, False)


def test_cached_answers_are_the_same(ours: MistralLM, tmp_path: Path) -> None:
    cached = CachingLM(ours, str(tmp_path / "answers"))
    try:
        asked = instances("loglikelihood", PAIRS[:4])
        want = cached.loglikelihood(asked)
        processed = ours.scorer.processed
        again = cached.loglikelihood(asked)
    finally:
        ours.set_cache_hook(CacheHook(None))
    assert again == want
    assert all(isinstance(greedy, bool) for _, greedy in again)
    assert ours.scorer.processed == processed
    partial = [cached.dbdict[hash_args("loglikelihood", request.args)] for request in asked]
    assert partial == want


def test_rolling_likelihoods_are_those_of_hf(folder: Path, ours: MistralLM) -> None:
    plain = HFLM(str(folder), device="cpu", dtype="float32", max_length=MAX_LENGTH, add_bos_token=False, batch_size=4)
    texts = [(LONG[:2500],), (KING,), ("x",)]
    got = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    want = plain.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    for one, reference, (text,) in zip(got, want, texts, strict=True):
        assert one == pytest.approx(reference, abs=EACH * (len(text) / 2 + 1))


def test_generated_texts_are_those_of_hf(ours: MistralLM, theirs: HFLM) -> None:
    asked = [
        (KING, {"until": ["."], "max_gen_toks": 30, "do_sample": False}),
        ("The wolf", {"until": [" and", "\n"], "max_gen_toks": 12, "do_sample": False}),
        (LONG[:2000], {"until": ["\n\n"], "max_gen_toks": 10, "do_sample": False}),
    ]
    got = ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    want = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert [text.lstrip() for text in got] == [text.lstrip() for text in want]  # hf drops a first space
    sampled = {"until": ["."], "do_sample": True, "temperature": 2.0, "max_gen_toks": 20}
    torch.manual_seed(0)
    assert len(set(ours.generate_until(instances("generate_until", [(KING, sampled)] * 3), disable_tqdm=True))) > 1


def test_over_http_the_numbers_are_the_same(folder: Path, ours: MistralLM) -> None:
    pairs = [pair for pair in PAIRS if pair[1]][:-1]
    want = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    texts = [(LONG[:2500],), (KING,), ("x",)]
    rolled = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    with serving(folder, dtype="float32") as running:
        settings = {
            "model": running.served.name,
            "base_url": f"{running.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(folder),
            "max_length": MAX_LENGTH,
            "batch_size": 3,
        }
        http = LocalCompletionsAPI(**settings, add_bos_token=True)
        settings["max_length"] += 2  # of which lm-eval leaves two free here
        rolling = LocalCompletionsAPI(**settings)  # which puts a bos of its own in front of a text
        again = rolling.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
        got = http.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        asked = [(KING, {"until": ["."], "max_gen_toks": 20})]
        text = http.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert [flag for _, flag in got] == [flag for _, flag in want]
    assert [logprob for logprob, _ in got] == pytest.approx([logprob for logprob, _ in want], abs=2e-4)
    assert again == pytest.approx(rolled, rel=1e-5)
    assert text == ours.generate_until(instances("generate_until", asked), disable_tqdm=True)


TASK = """
task: tales
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
DOCS = [
    {"start": "Once upon a time there was a", "ends": ["king who had three", "xq zw kj"], "right": 0},
    {"start": "The wolf ate the", "ends": ["of of of", "little goat"], "right": 1},
    {"start": "The princess was very", "ends": ["beautiful", "parliament"], "right": 0},
]


@pytest.mark.parametrize("chat", [False, True])
def test_an_offline_task(tmp_path: Path, ours: MistralLM, theirs: HFLM, chat: bool) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tmp_path / "tales.yaml").write_text(TASK % json.dumps(str(tmp_path / "docs.jsonl")))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"tasks": ["tales"], "task_manager": tasks, "num_fewshot": 1, "bootstrap_iters": 0}
    results = simple_evaluate(model=ours, apply_chat_template=chat, **options)
    assert results["results"]["tales"]["acc,none"] > 0.6
    if not chat:
        want = simple_evaluate(model=theirs, **options)
        names = ("acc,none", "acc_norm,none")
        assert all(results["results"]["tales"][n] == want["results"]["tales"][n] for n in names)


def test_conversations_have_the_ids_of_their_template(ours: MistralLM) -> None:
    from mistral.chat.messages import Message

    talk = [{"role": "user", "content": "Who? [/INST] <s>"}, {"role": "assistant", "content": "The king"}]
    for upto, asks in ((1, True), (2, False)):
        text = ours.apply_chat_template(talk[:upto], add_generation_prompt=asks)
        ids = ours.tok_encode(text)
        want = ours._template.encode_chat([Message(one["role"], one["content"]) for one in talk[:upto]])
        assert ids == (want if asks else want[:-1])
        context, continuation = ours._encode_pair(text, " of the land")
        assert context == ids
        assert ours._tokens.decode(continuation).strip() == "of the land"
    assert ours.tokenizer_name
    assert ours.chat_template(True) == ours._template.name


def test_what_cannot_be_is_refused(ours: MistralLM) -> None:
    with pytest.raises(UsageError, match="max_length is 200"):
        ours.loglikelihood(instances("loglikelihood", [("a", LONG[:3000])]), disable_tqdm=True)
    with pytest.raises(UsageError, match="leave no room"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 200})]))
    with pytest.raises(UsageError, match="'num_beams'"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "num_beams": 2})]))
    with pytest.raises(UsageError, match="no option is called 'dytpe'"):
        MistralLM(dytpe="float32")
    assert MistralLM(loaded=load(device="cpu"), batch_size="auto").max_length > 0
