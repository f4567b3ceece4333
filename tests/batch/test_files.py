"""Lines in, lines out: what is a request, what an output file holds, and what is left of it after any end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral.batch import lines
from mistral.batch.inputs import find_inputs, index, raw_lines
from mistral.batch.job import Job, Write
from mistral.batch.lines import Answered, Line, LineError, answer, failure, id_of, read_line
from mistral.batch.output import drop_failed, opened
from mistral.util.errors import FormatError, UsageError
from tests.support.batches import answers, by_name, request, write_lines

GOOD = request("a", "one")


def refusal(text: str | bytes) -> LineError:
    with pytest.raises(LineError) as caught:
        read_line(text if isinstance(text, bytes) else text.encode(), "x")
    return caught.value


def test_a_line_is_a_request() -> None:
    text = json.dumps(GOOD).encode()
    assert read_line(text, "x") == Line("x", "a", "/v1/completions", {"prompt": "one"})
    assert read_line(json.dumps(request("b", "é", "/v1/chat/completions")).encode(), "y").custom_id == "b"


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"custom_id": None}, "missing_required_parameter", None),
        ({"custom_id": 3}, "missing_required_parameter", None),
        ({"custom_id": ""}, "missing_required_parameter", None),
        ({"method": None}, "missing_required_parameter", "a"),
        ({"method": "GET"}, "invalid_method", "a"),
        ({"url": "/v1/embeddings"}, "invalid_url", "a"),
        ({"url": ["/v1/completions"]}, "invalid_url", "a"),
        ({"body": None}, "missing_required_parameter", "a"),
        ({"body": []}, "invalid_request", "a"),
        ({"body": {"stream": True}}, "invalid_request", "a"),
        ({"priority": 1}, "unknown_parameter", "a"),
    ],
)
def test_what_is_no_request_is_named(changes: dict, code: str, named: str | None) -> None:
    error = refusal(json.dumps({**GOOD, **changes}))
    assert (error.code, error.custom_id) == (code, named)
    assert error.message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"\xff\xfe{", b'{"a": NaN}', b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_named(text: bytes) -> None:
    assert refusal(text).code in ("invalid_json_line", "missing_required_parameter")


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_request_or_refused(text: bytes) -> None:
    try:
        found = read_line(text, "x")
    except LineError:
        return
    assert found.custom_id


def test_lines_are_found_once_whatever_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral.batch.inputs.LONGEST", 50)
    monkeypatch.setattr(lines, "LONGEST", 50)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 1}\n' + b"x" * 500 + b'\n{"b": "\xe2\x80\xa8"}')
    found = list(raw_lines([path]))
    assert [(place.number, text[:60]) for place, text, _ in found] == [
        (1, b'{"a": 1}'),
        (4, b'{"a": 1}'),
        (5, b"x" * 51),
        (6, b'{"b": "\xe2\x80\xa8"}'),
    ]
    assert len({line_id for *_, line_id in found}) == 4
    assert found[1][2] == id_of(b'{"a": 1}', 1)
    assert refusal(found[2][1]).code == "line_too_long"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_mark_is_read_as_every_other_file_is(tmp_path: Path, encoding: str) -> None:
    text = json.dumps(request("1", "The \u2028 king"), ensure_ascii=False) + "\n" + json.dumps(request("2")) + "\n"
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text(text, encoding="utf-8")
    b.write_bytes(text.encode(encoding))
    assert [found[1:] for found in raw_lines([b])] == [found[1:] for found in raw_lines([a])]
    assert len(list(raw_lines([b]))) == 2
    b.write_bytes("\ufeff{".encode("utf-16-le") + b"\x00\xd8")
    with pytest.raises(FormatError, match="b is not UTF-16 .*as its mark says"):
        list(raw_lines([b]))


def test_a_file_without_any_request_is_refused_before_anything_else(tmp_path: Path) -> None:
    """One line of JSON is enough for a job: the others get their errors."""
    path = tmp_path / "pic.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00IHDR")
    with pytest.raises(UsageError, match="is no file of requests.* line 1: it is not UTF-8 .byte 0x89."):
        index([path], {})
    path.write_bytes(b"\x89PNG\r\n" + json.dumps(request("1")).encode())
    assert len(index([path], {}).ids) == 2


def test_an_id_of_another_type_is_named() -> None:
    assert (
        refusal(json.dumps({**GOOD, "custom_id": 5})).message == "its custom_id is 5; it must be text that is not empty"
    )
    assert refusal(json.dumps({**GOOD, "custom_id": None})).message == "it has no custom_id"


def test_a_line_keeps_its_id_when_files_are_renamed_sorted_and_joined(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a", request("1"), request("2"), request("1"))
    b = write_lines(tmp_path / "b", request("3"), request("2"))
    joined = tmp_path / "joined"
    joined.write_bytes(b.read_bytes() + a.read_bytes())
    first, second = ({line_id for *_, line_id in raw_lines(files)} for files in ([a, b], [joined]))
    assert first == second
    assert len(first) == 5


def test_inputs_are_names_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "[c].jsonl", "out"):
        Path(name).touch()
    Path("folder.jsonl").mkdir()
    assert [p.name for p in find_inputs(["*.jsonl", "a.jsonl"], "out")] == ["[c].jsonl", "a.jsonl", "b.jsonl"]
    assert [p.name for p in find_inputs(["[c].jsonl"], "out")] == ["[c].jsonl"]
    assert [p.name for p in find_inputs(["*"], "a.jsonl")] == ["[c].jsonl", "b.jsonl", "out"]
    for names, said in ((["d"], "no file d"), (["folder.jsonl"], "a folder"), (["out"], "input and the output")):
        with pytest.raises(UsageError, match=said):
            find_inputs(names, "out")
    with pytest.raises(UsageError, match="no file that can be read twice"):
        find_inputs(["/dev/null"], "out")


def test_a_custom_id_belongs_to_the_first_line_and_to_one_that_was_answered(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", request("a", "one"), request("b"), request("a", "two"), request("a", "two"))
    ids = [line_id for *_, line_id in raw_lines([path])]
    assert set(index([path], {}).repeated) == {ids[2], ids[3]}
    assert set(index([path], {"a": ids[2]}).repeated) == {ids[0], ids[3]}
    assert "line 1" in index([path], {}).repeated[ids[2]]


# --- a job


def echo(todo: Iterator[Line], write: Write) -> None:
    """Answers with the prompt; fails where it is "bad"; refuses to go on at "stop"."""
    for line in todo:
        prompt = line.body["prompt"]
        if prompt == "stop":
            raise KeyboardInterrupt
        done = answer(line, 200, "r", {"model": "m", "text": prompt, "usage": {"completion_tokens": 2}})
        write(failure(line, "timeout", "too late") if prompt == "bad" else done)


def work(files: list[Path], output: Path) -> str:
    with opened(str(output)) as out:
        job = Job(files, out, lambda progress: None)
        job.run(echo)
        return job.progress.describe().partition(", 0")[0]


def test_every_line_has_one_answer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", request("a", "x"), "nonsense", request("b", "bad"), request("a", "y"))
    assert work([path], tmp_path / "out").startswith("4 of 4 lines, 3 of them errors")
    found = answers(tmp_path / "out")
    assert [one["custom_id"] for one in found] == ["a", None, "b", "a"]
    assert found[0]["response"] == {
        "status_code": 200,
        "request_id": "r",
        "body": {"model": "m", "text": "x", "usage": {"completion_tokens": 2}},
    }
    assert [one["error"] and one["error"]["code"] for one in found] == [
        None,
        "invalid_json_line",
        "timeout",
        "duplicate_custom_id",
    ]
    assert f"{path} line 4: its custom_id a is that of {path} line 1" in found[3]["error"]["message"]
    assert all(list(one) == ["id", "custom_id", "response", "error"] for one in found)


TEXTS = [request(str(i), f"prompt {i} \u2028") for i in range(4)]


@given(st.data())
def test_a_file_cut_anywhere_is_completed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = write_lines(folder / "in", *TEXTS)
    work([path], folder / "out")
    whole = (folder / "out").read_bytes()
    (folder / "out").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    work([path], folder / "out")
    assert (folder / "out").read_bytes() == whole


def test_an_interrupted_job_goes_on(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", request("a", "x"), request("b", "stop"), request("c", "z"))
    with pytest.raises(KeyboardInterrupt):
        work([path], tmp_path / "out")
    assert list(by_name(tmp_path / "out")) == ["a"]
    write_lines(path, request("c", "z"), request("a", "x"), request("d", "new"))  # grown, and in another order
    work([path], tmp_path / "out")
    assert list(by_name(tmp_path / "out")) == ["a", "c", "d"]


def test_errors_are_tried_again_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", request("a", "x"), request("b", "bad"), "{")
    out = tmp_path / "out"
    work([path], out)
    before = out.read_bytes()
    work([path], out)
    assert out.read_bytes() == before
    write_lines(path, request("a", "x"), request("b", "good"), request("c", "mended"))
    with pytest.raises(UsageError, match="2 lines not in the inputs.*--retry drops"):
        work([path], out)
    assert drop_failed(str(out)) == 2
    work([path], out)
    assert {name: one["response"]["body"]["text"] for name, one in by_name(out).items()} == {
        "a": "x",
        "b": "good",
        "c": "mended",
    }
    assert drop_failed(str(tmp_path / "none")) == 0
    assert not (tmp_path / "none").exists()


def test_an_output_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "in", GOOD), tmp_path / "out"
    for other in (json.dumps(GOOD), "text", "[1]", '{"id": 1, "custom_id": "", "response": {}, "error": null}'):
        write_lines(out, other)
        with pytest.raises(FormatError, match="out line 1 is no answer of a batch"):
            work([path], out)
        assert out.read_text() == f"{other}\n"
    out.unlink()
    work([write_lines(tmp_path / "in2", request("other"))], out)
    with pytest.raises(UsageError, match="answers to 1 line not in the inputs: give this job another output$"):
        work([path], out)
    for place in (tmp_path, Path("/dev/null"), tmp_path / "no" / "out"):
        with pytest.raises(FormatError, match="cannot be written"), opened(str(place)):
            pass
    with pytest.raises(UsageError, match="no line that is not empty"):
        work([write_lines(tmp_path / "empty")], tmp_path / "out3")
    assert not (tmp_path / "out3").exists()  # nothing is left of a job that did not begin


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_batches_do_not_share_an_output(tmp_path: Path) -> None:
    with opened(str(tmp_path / "out")), pytest.raises(UsageError, match="another batch"), opened(str(tmp_path / "out")):
        pass


@pytest.mark.parametrize("fails", [True, False])
def test_a_full_disk_leaves_whole_lines(tmp_path: Path, fails: bool) -> None:
    """Also where the system writes a part of a line, and says nothing else."""

    class Full:
        def __init__(self, file: object) -> None:
            self._file: Any = file

        def write(self, line: bytes) -> int:
            written = self._file.write(line[:10])
            if fails:
                raise OSError(28, "No space left on device")
            return int(written)

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

    with opened(str(tmp_path / "out")) as out:
        assert out.append(Answered("batch_req_1", "a", error={"code": "c", "message": "m"}))
        assert not out.append(Answered("batch_req_1", "a", error={"code": "c", "message": "m"}))
        before = (tmp_path / "out").read_bytes()
        out._file = Full(out._file)
        with pytest.raises(FormatError, match="No space left"):
            out.append(Answered("batch_req_2", "b", error={"code": "c", "message": "m"}))
    assert (tmp_path / "out").read_bytes() == before


def test_files_are_read_without_torch() -> None:
    code = "import sys, mistral.batch.job, mistral.batch.remote, mistral.batch.on_ray; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
