"""Retrieval tasks: prompts of a length, one answer in each, exact scoring, results that survive a kill, intervals."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.eval.filler import Filler, filler_of, made, split_sentences
from mistral.eval.lines import LABELS, Lines, _label
from mistral.eval.longchat import read_questions
from mistral.eval.needle import depth
from mistral.eval.results import Result, ResultFile, wilson
from mistral.eval.retrieval import TASKS
from mistral.eval.tasks import Case, fit
from mistral.eval.topics import SUBJECTS, folded
from mistral.tokenizer import Tokenizer
from mistral.util.errors import FormatError, UsageError
from tests.support.commands import Command, in_process
from tests.support.folders import BUNDLED, make_folder, make_parrot

TOKENIZER = Tokenizer(BUNDLED / "tokenizer.model")
CHINESE = "从前有一个国王。他有三个女儿！她们住在山上吗？没有人知道。"
every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def case(name: str, index: int = 0, n: int = 5, seed: int = 0, filler: Filler | None = None) -> Case:
    return Case(seed, index, n, filler or TASKS[name].filler(seed))


# --- prompts


@every_task
@settings(max_examples=12)
@given(length=st.integers(200, 2000), index=st.integers(0, 4), seed=st.integers(0, 9))
def test_a_prompt_has_the_length_asked_for_and_no_unit_more_fits(name: str, length: int, index: int, seed: int) -> None:
    task, one = TASKS[name], case(name, index, seed=seed)
    found = fit(task, one, length, TOKENIZER.encode)
    assert len(found.ids) <= length
    assert found.ids == TOKENIZER.encode(task.make(one, found.size).prompt)
    assert len(TOKENIZER.encode(task.make(one, found.size + 1).prompt)) > length


@every_task
def test_what_is_asked_for_is_in_the_prompt_once_in_its_place(name: str) -> None:
    task = TASKS[name]
    for index in range(5):
        prompt, answer = task.make(case(name, index), 40)
        question = prompt.splitlines()[-1]
        told = prompt[: -len(question)]
        if name == "topics":
            assert told.index(answer) < min(told.index(s) for s in SUBJECTS if s != answer and s in told)
            continue
        assert answer not in question
        at = re.search(rf"(?<![0-9]){answer}(?![0-9])", told)
        assert at is not None
        if name == "needle":
            assert abs(at.start() / len(told) - depth(case(name, index))) < 0.1
        if name == "lines":
            label = question.split()[-2]
            assert f"line {label}: the number is <{answer}>\n" in told
            assert told.count(f"line {label}:") == 1


@every_task
def test_cases_differ_and_come_again(name: str) -> None:
    task = TASKS[name]
    prompts = [task.make(case(name, index), 30) for index in range(5)]
    assert len(set(prompts)) == 5
    assert prompts == [task.make(case(name, index), 30) for index in range(5)]
    assert task.make(case(name, seed=1), 30) != prompts[0]
    # The same case keeps its answer at every size, unless it is one of the lines.
    assert name == "lines" or task.make(case(name), 0).answer == task.make(case(name), 99).answer


def test_the_places_of_keys_are_spread() -> None:
    """Over many cases a key is as often in each third of the text."""
    task, thirds = TASKS["passkey"], [0, 0, 0]
    for index in range(300):
        prompt, answer = task.make(case("passkey", index, 300), 100)
        thirds[min(2, 3 * prompt.index(f"key is {answer}") // len(prompt))] += 1
    assert min(thirds) > 70


def test_lines_have_different_labels_beyond_the_words() -> None:
    names = [_label(list(LABELS), i) for i in (0, len(LABELS), 2 * len(LABELS))]
    assert names == [LABELS[0], f"{LABELS[0]}-2", f"{LABELS[0]}-3"]
    record = Lines().make(case("lines"), 2000).prompt
    assert len(set(re.findall(r"^line (\S+):", record, re.MULTILINE))) == 2001


def test_a_length_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--lengths 20: without any filler, passkey already needs \d+ tokens"):
        fit(TASKS["passkey"], case("passkey"), 20, TOKENIZER.encode)


# --- filler


@given(text=st.text(st.sampled_from("ab .!?。！\n…'”"), max_size=60))
def test_sentences_lose_nothing_but_blank_ones(text: str) -> None:
    sentences = list(split_sentences(text))
    assert all(sentence.strip() for sentence in sentences)
    assert "".join("".join(sentences).split()) == "".join(text.split())


def test_filler_in_any_language() -> None:
    assert [s.strip() for s in filler_of("A b. C d! E", "x").sentences] == ["A b.", "C d!", "E"]
    filler = filler_of(CHINESE, "x")
    assert len(filler.sentences) == 4
    prompt, answer = TASKS["passkey"].make(case("passkey", filler=filler), 9)
    assert CHINESE[:8] in prompt
    assert answer in prompt
    assert filler.text(0, 8) == CHINESE * 2
    assert max(map(len, split_sentences("x" * 1000))) == 300
    assert len(set(made(0).sentences)) > 3900


# --- scoring


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        ("passkey", "123", (" 123. The", "is 0123"), ("", "no", "1 123", "1234", "-")),
        ("lines", "123", (" 123", "<123>", "45 is wrong, 123 is right."), ("", "123 or 45", "1234")),
        ("needle", "123", (" 123.", "45, no, 123"), ("", "1234", "0123")),
        ("topics", "baking bread", ("It was Baking, bread!", "baking  bread and tea"), ("", "bread baking")),
    ],
)
def test_what_counts_as_right(name: str, answer: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    assert all(TASKS[name].score(text, answer) for text in right)
    assert not any(TASKS[name].score(text, answer) for text in wrong)
    assert folded("Élan, vital!") == "elan vital"


def test_wilson() -> None:
    """Values of R: prop.test(x, n, correct = FALSE)$conf.int."""
    for correct, n, low, high in (
        (0, 50, 0.0, 0.0713),
        (50, 50, 0.9287, 1.0),
        (25, 50, 0.3664, 0.6336),
        (1, 3, 0.0615, 0.7923),
    ):
        assert wilson(correct, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    with pytest.raises(UsageError, match="no cases"):
        wilson(0, 0)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_an_interval_holds_its_share(n: int, share: float) -> None:
    correct = round(share * n)
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert not math.isclose(low, high)


# --- LongChat's files


def write_questions(path: Path, task: str, expected: list[Any]) -> Path:
    """A file in LongChat's form, of prompts that our generators made."""
    entries = []
    for index, answer in enumerate(expected):
        prompt = TASKS[task].make(case(task, index), 3).prompt
        its = {"expected_number": answer, "correct_line": "x", "random_idx": [0, 0], "num_lines": 4}
        topics = {"topics": [answer, "other"]}
        entries.append({"test_id": index, "prompt": prompt, **(its if task == "lines" else topics)})
    path.write_text("\n".join(map(json.dumps, entries)) + "\n", encoding="utf-8")
    return path


def test_questions_are_read_as_they_are(tmp_path: Path) -> None:
    mine = [TASKS["lines"].make(case("lines", index), 3) for index in range(3)]
    path = write_questions(tmp_path / "4_lines.jsonl", "lines", [int(one.answer) for one in mine])
    found = read_questions(str(path), "lines")
    assert [(q.file, q.index, q.prompt, q.answer) for q in found] == [
        ("4_lines", index, one.prompt, one.answer) for index, one in enumerate(mine)
    ]
    topics = read_questions(str(write_questions(tmp_path / "t.jsonl", "topics", ["a b", "c"])), "topics")
    assert [q.answer for q in topics] == ["a b", "c"]


@pytest.mark.skipif("LONGCHAT" not in os.environ, reason="LONGCHAT names a folder with LongChat's own question files")
def test_longchats_own_files() -> None:
    """200_lines.jsonl, 5_topics.jsonl and their like: the model gets the prompt of each line, to the character."""
    files = (
        sorted(Path(os.environ["LONGCHAT"]).rglob("*_lines.jsonl")),
        sorted(Path(os.environ["LONGCHAT"]).rglob("*_topics.jsonl")),
    )
    assert any(files)
    for task, paths in zip(("lines", "topics"), files, strict=True):
        for path in paths:
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            found = read_questions(str(path), task)
            assert [q.prompt for q in found] == [entry["prompt"] for entry in entries]
            answers = [str(e["expected_number"]) if task == "lines" else e["topics"][0] for e in entries]
            assert [q.answer for q in found] == answers
            assert all(TASKS[task].score(f"It is {answer}.", answer) for answer in answers)


@pytest.mark.parametrize(
    ("text", "task", "error"),
    [
        ("", "lines", "has no questions"),
        ("{", "lines", "line 1 is not JSON"),
        ("[1]", "lines", "line 1 has no prompt"),
        ('{"prompt": "x"}', "lines", "no expected_number"),
        ('\n{"prompt": "x", "expected_number": 1}', "topics", "line 2 has no topics"),
        ('{"prompt": "x", "topics": []}', "topics", "has no topics"),
        ("x", "needle", "not for needle"),
    ],
)
def test_questions_that_are_refused(tmp_path: Path, text: str, task: str, error: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises((FormatError, UsageError), match=error):
        read_questions(str(path), task)
    with pytest.raises(FormatError, match="cannot be read"):
        read_questions(str(tmp_path / "none"), "lines")


# --- results in a file


def result(index: int, group: str = "8") -> Result:
    return Result(group, index, 8, "1", "é\ud800 1", True)


def test_a_file_is_continued_and_a_cut_line_dropped(tmp_path: Path) -> None:
    path, header = tmp_path / "r.jsonl", {"task": "passkey", "seed": 0}
    first = ResultFile(str(path), header)
    first.add(result(0))
    first.add(result(1))
    first.close()
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = ResultFile(str(path), header)
        assert again.resumed == whole[:cut].count(b"\n") - 1
        for index in range(again.resumed, 2):
            again.add(result(index))
        again.close()
        assert path.read_bytes() == whole


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ResultFile(str(path), {"task": "passkey", "seed": 0}).close()
    with pytest.raises(FormatError, match="was made with another seed"):
        ResultFile(str(path), {"task": "passkey", "seed": 1})
    for content in (b"", b"hello\n", b"{}\n{}\n", b'{"task": "passkey", "seed": 0}\n{"group": 1}\n'):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="holds something else"):
            ResultFile(str(path), {"task": "passkey", "seed": 0})
        assert path.read_bytes() == content


# --- the command


@pytest.mark.skipif(os.name == "nt", reason="without locks there")
def test_two_evaluations_do_not_write_to_one_file(tmp_path: Path) -> None:
    path, header = str(tmp_path / "results.jsonl"), {"task": "passkey"}
    first = ResultFile(path, header)
    with pytest.raises(UsageError, match="another evaluation writes to it"):
        ResultFile(path, header)
    first.add(Result("g", 0, 5, "a", "a", True))
    first.close()
    again = ResultFile(path, header)
    assert again.resumed == 1
    again.close()


def test_right_answers_are_counted(cli: Command, tmp_path: Path) -> None:
    """A model that says 7 whatever it reads."""
    parrot = make_parrot(tmp_path / "parrot", "7\n")
    questions = write_questions(tmp_path / "few_lines.jsonl", "lines", [7, 8, 7, 7])
    report = json.loads(cli("eval", parrot, "--task", "lines", "--questions", questions, "--json").text)
    (row,) = report["rows"]
    assert (row["group"], row["cases"], row["correct"], row["accuracy"]) == ("few_lines", 4, 3, 0.75)
    assert [row["low"], row["high"]] == [pytest.approx(x) for x in wilson(3, 4)]
    assert report["cases"] == {"few_lines/0": True, "few_lines/1": False, "few_lines/2": True, "few_lines/3": True}
    assert report["n"] is None


def test_a_run_that_was_cut_off_goes_on(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out, picture = make_folder(tmp_path / "model"), tmp_path / "out.jsonl", tmp_path / "p.svg"
    words = ("eval", folder, "--task", "passkey", "--lengths", "160,200", "--n", "3", "--json")
    alone = json.loads(cli(*words).text)
    add = ResultFile.add

    def interrupted(self: ResultFile, found: Result) -> None:
        if len(self.found) == 4:
            raise KeyboardInterrupt
        add(self, found)

    monkeypatch.setattr(ResultFile, "add", interrupted)
    stopped = cli(*words, "--output", out)
    assert stopped.code == 130
    assert f"what was measured is in {out}; the same command goes on from there" in stopped.err
    monkeypatch.setattr(ResultFile, "add", add)
    with open(out, "ab") as file:
        file.write(b'{"group": "160", "ind')
    again = cli(*words, "--output", out, "--plot", picture)
    report = json.loads(again.text)
    assert report["resumed"] == 4
    assert report["cases"] == alone["cases"]
    assert report["rows"] == alone["rows"]
    assert 0 < report["processed_tokens"] <= report["prompt_tokens"] < alone["prompt_tokens"]
    assert all(row["tokens_max"] <= int(row["group"]) for row in report["rows"])
    assert alone["processed_tokens"] < alone["prompt_tokens"]
    assert "<svg" in picture.read_text()
    text = cli(*words[:-1], "--output", out).text
    assert re.search(r"^ +160 .* 0/3 +0.0%  0.0% to 56.1%$", text, re.MULTILINE)
    other = cli(*words, "--output", out, "--seed", "1")
    assert other.error == f"{out} was made with another filler, seed: give the same, or another file to --output" or (
        other.error == f"{out} was made with another seed: give the same, or another file to --output"
    )


def test_lengths_beyond_what_a_model_was_trained_on_are_noted(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    words = ("eval", folder, "--task", "passkey", "--lengths", "160", "--n", "1")
    assert "trained on" not in cli(*words).err
    params = json.loads((folder / "params.json").read_text())
    for length, noted in ((100, True), (2000, False)):
        (folder / "params.json").write_text(json.dumps({**params, "max_seq_len": length}))
        assert ("trained on sequences of up to 100 tokens, and the longest here has 1" in cli(*words).err) == noted
    (folder / "params.json").write_text(json.dumps({**params, "max_seq_len": 15}))
    reach = ("eval", folder, "--task", "reach", "--lengths", "16", "--n", "1", "--json")
    found = cli(*reach)
    assert "up to 15 tokens, and the longest here has 16" in found.err
    assert json.loads(found.text)["trained_length"] == 15


def test_needle_and_topics_and_filler(cli: Command, tmp_path: Path) -> None:
    folder, picture = make_folder(tmp_path / "model"), tmp_path / "n.svg"
    text = tmp_path / "zh.txt"
    text.write_text(CHINESE, encoding="utf-8")
    short = ("--lengths", "256", "--n", "2")
    report = json.loads(
        cli("eval", folder, "--task", "needle", *short, "--filler", text, "--plot", picture, "--json").text
    )
    assert report["filler"] == str(text)
    assert "<svg" in picture.read_text()
    assert "the first topic" in cli("eval", folder, "--task", "topics", *short).text
    asked = json.loads(cli("eval", folder, "--task", "needle", *short, "--instruct", "--json").text)
    assert (asked["template"], report["template"]) == ("v1", None)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "missing: --task"),
        (("--task", "x"), "--task is 'x'; it must be one of passkey, lines, topics, needle, reach, position"),
        (("--task", "passkey", "--lengths", "1m"), "--lengths is '1m'; it must be whole numbers"),
        (("--task", "passkey", "--lengths", "1k,1024"), "--lengths 1k,1024 has a length twice"),
        (("--task", "passkey", "--lengths", "9"), "--lengths 9: without any filler, passkey already needs"),
        (("--task", "passkey", "--n", "0"), "--n is 0; it must be at least 1"),
        (("--task", "passkey", "--seed", "-1"), "--seed is -1"),
        (("--task", "passkey", "--windows", "4"), "--windows is for reach and position; for passkey give one"),
        (("--task", "reach", "--windows", "4,x"), "--windows has 'x'"),
        (("--task", "reach", "--windows", "4,none,none"), "--windows 4,none,none has a window twice"),
        (("--task", "reach", "--lengths", "1"), "--lengths must be at least 2"),
        (("--task", "passkey", "--lengths", "1000000000"), "whole numbers from 1 on, of at most nine digits"),
        (("--task", "reach", "--windows", "auto"), "--windows has 'auto'"),
        (("--task", "reach", "--lengths", "40,50"), "reach measures texts of one length"),
        (("--task", "reach", "--instruct"), "--instruct is for questions; reach measures plain text"),
        (("--task", "reach", "--output", "x"), "--output is for the single results of retrieval"),
        (("--task", "lines", "--filler", "x"), "--filler is not for lines"),
        (("--task", "needle", "--questions", "x"), "--questions are for lines and topics, not for needle"),
        (("--task", "lines", "--questions", "x", "--n", "3"), "--questions have their own lengths and number"),
        (("--task", "topics", "--filler", "/none"), "/none cannot be read"),
        (("--task", "passkey", "--template", "v1"), "--template belongs to a conversation"),
        (("--task", "passkey", "--plot", "x.doc"), "--plot x.doc: the name must end in one of"),
        (("--task", "passkey", "--output", "/none/x"), "/none/x cannot be written"),
    ],
)
def test_words_that_are_refused(cli: Command, words: tuple[str, ...], error: str) -> None:
    assert error in cli("eval", *words).error


def test_without_memory_for_more_rows_each_prompt_is_processed_by_itself(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", make_folder(tmp_path / "model"), "--task", "passkey", "--lengths", "160", "--n", "3", "--json")
    shared = json.loads(cli(*words).text)
    monkeypatch.setattr("mistral.eval.retrieval.rows_that_fit", lambda model, rows, positions: 2)
    alone = cli(*words)
    assert "common beginnings were processed again each time" in alone.err
    report = json.loads(alone.text)
    assert report["processed_tokens"] == report["prompt_tokens"] == shared["prompt_tokens"]
    assert shared["shared_beginnings"]
    assert report["cases"] == shared["cases"]
