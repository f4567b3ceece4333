"""Headers of safetensors files: read as the library reads its own; what is broken is refused in one line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from mistral.formats.mistral import find_weights
from mistral.formats.safetensors_header import BITS, LONGEST, HeaderError, read_header
from mistral.formats.weights import WeightsError
from tests.support.folders import ROOT

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header: an object, a text or bytes; `length` is what it says of it."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, ValueError, OverflowError):
        return False
    return True


# --- what is complete


@given(st.data())
def test_files_of_the_library_are_read_as_it_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    names = data.draw(st.lists(text.filter(lambda name: name != "__metadata__"), unique=True, max_size=8))
    shapes = st.lists(st.integers(0, 5), max_size=4)
    tensors = {
        name: torch.zeros(data.draw(shapes), dtype=data.draw(st.sampled_from(list(DTYPES.values())))) for name in names
    }
    # Of no tensors with empty metadata the library writes what it does not read itself.
    raw = save(tensors, data.draw(st.none() | st.dictionaries(text, text, min_size=1, max_size=3)))
    path = tmp_path_factory.getbasetemp() / "drawn"
    path.write_bytes(raw)
    found = read_header(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert DTYPES[found[name].dtype] == tensor.dtype
        assert found[name].end - found[name].begin == tensor.nbytes
    assert [e.begin for e in found.values()] == sorted(e.begin for e in found.values())
    assert max((e.end for e in found.values()), default=len(raw)) == len(raw)


def test_where_a_tensor_is(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a", {"b": entry(2, 5), "__metadata__": {"format": "pt", "{": "}"}, "a": entry(0, 2)}, b"abcde"
    )
    found = read_header(path)
    assert list(found) == ["a", "b"]
    assert path.read_bytes()[found["b"].begin : found["b"].end] == b"cde"


def test_spaces_escapes_and_padding_are_json(tmp_path: Path) -> None:
    header = ' \n{ "\\u00e9\\"" :\t{ "shape" : [ 1 , 2 ],"dtype":"U8" , "data_offsets":[0,2] } , "":'
    header += '{"data_offsets":[2,2],"dtype":"F32","shape":[3, 0]} }   \n'
    found = read_header(write(tmp_path / "a", header, b"xy"))
    assert {name: e.shape for name, e in found.items()} == {'é"': (1, 2), "": (3, 0)}


@pytest.mark.parametrize("header", ["{}", " { } ", '{"__metadata__":{}}'])
def test_no_tensors_at_all(tmp_path: Path, header: str) -> None:
    assert read_header(write(tmp_path / "a", header)) == {}


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_the_size_of_every_known_dtype_is_checked(tmp_path: Path, dtype: str) -> None:
    nbytes = 16 * BITS[dtype] // 8
    path = write(tmp_path / "a", {"a": entry(0, nbytes, [4, 4], dtype)}, bytes(nbytes))
    assert read_header(path)["a"].dtype == dtype
    assert library_takes(path)
    write(path, {"a": entry(0, nbytes + 1, [4, 4], dtype)}, bytes(nbytes + 1))
    with pytest.raises(HeaderError, match=rf"'a' has {nbytes + 1} bytes, which does not fit {dtype} of shape \[4, 4\]"):
        read_header(path)


def test_a_dtype_that_nobody_knows_is_for_others_to_refuse(tmp_path: Path) -> None:
    found = read_header(write(tmp_path / "a", {"a": entry(0, 3, [7], "Q3_K"), "b": entry(3, 4)}, b"abcd"))
    assert (found["a"].dtype, found["a"].end - found["a"].begin) == ("Q3_K", 3)


# --- what is broken

TWO = {"a": entry(0, 2), "b": entry(2, 4)}
BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "cut short": (TWO, b"abc", r"its tensors end at byte \d+, but it has \d+: it was cut short, fetch it again"),
    "too long": (TWO, b"abcde", r"its tensors end at byte \d+, but it has \d+: the rest belongs to no tensor"),
    "a gap": ({"a": entry(0, 2), "b": entry(3, 4)}, b"abcd", "the 1 bytes before 'b' belong to no tensor"),
    "a gap in front": ({"a": entry(1, 2)}, b"ab", "the 1 bytes before 'a' belong to no tensor"),
    "an overlap": ({"a": entry(0, 2), "b": entry(1, 4)}, b"abcd", "'b' begins inside the tensor before it"),
    "the same bytes": ({"a": entry(0, 2), "b": entry(0, 2)}, b"ab", "'b' begins inside the tensor before it"),
    "end before begin": ({"a": entry(2, 0, [2])}, b"ab", r"data_offsets of 'a' are \[2, 0\], not a begin and an end"),
    "three offsets": ({"a": {**entry(0, 2), "data_offsets": [0, 1, 2]}}, b"ab", "not a begin and an end"),
    "a negative offset": (
        {"a": {**entry(0, 2), "data_offsets": [-2, 0]}},
        b"ab",
        "data_offsets of 'a' is no list of wh",
    ),
    "a negative size": ({"a": entry(0, 2, [-1, -2])}, b"ab", "the shape of 'a' is no list of whole numbers"),
    "a fraction": ({"a": entry(0, 2, [2.0])}, b"ab", "the shape of 'a' is no list of whole numbers"),
    "a truth": ({"a": entry(0, 1, [True])}, b"a", "the shape of 'a' is no list of whole numbers"),
    "a text": ({"a": entry(0, 2, ["2"])}, b"ab", "the shape of 'a' is no list of whole numbers"),
    "a number": ({"a": entry(0, 2, 2)}, b"ab", "the shape of 'a' is no list of whole numbers"),
    "nothing between commas": (
        '{"a":{"dtype":"U8","shape":[1,,2],"data_offsets":[0,2]}}',
        b"ab",
        "no list of whole num",
    ),
    "a leading zero": ('{"a":{"dtype":"U8","shape":[02],"data_offsets":[0,2]}}', b"ab", "no list of whole numbers"),
    "other digits": ('{"a":{"dtype":"U8","shape":[٢],"data_offsets":[0,2]}}', b"ab", "no list of whole numbers"),
    "a huge number": ({"a": entry(0, 2, [10**400])}, b"ab", "the shape of 'a' is no list of whole numbers"),
    "a huge product": ({"a": entry(0, 0, [2**62, 2**62, 0])}, b"", "the shape of 'a' is larger than any file"),
    "too many sizes": ({"a": entry(0, 1, [1] * 500)}, b"a", "the shape of 'a' is no list of whole numbers"),
    "the wrong size": ({"a": entry(0, 2, [3])}, b"ab", r"'a' has 2 bytes, which does not fit U8 of shape \[3\]"),
    "no dtype": (
        {"a": {"shape": [2], "data_offsets": [0, 2]}},
        b"ab",
        "'a' lacks its dtype, its shape or its data_off",
    ),
    "a dtype that is no text": ({"a": entry(0, 2, dtype=["U8"])}, b"ab", "the dtype of 'a' is no text"),
    "a key too many": ({"a": {**entry(0, 2), "stride": [1]}}, b"ab", "'a' has 'stride', which no tensor has"),
    "a tensor that is no object": ({"a": [0, 2]}, b"ab", "'a' is no object"),
    "a tensor twice": (json.dumps({"a": entry(0, 1), "b": entry(1, 2)}).replace("b", "a"), b"ab", "has 'a' twice"),
    "a key twice": ('{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab", "has 'dtype' twice"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", "a value in __metadata__ is no text"),
    "metadata that is no object": ({"__metadata__": "pt"}, b"", "__metadata__ is no object"),
    "a list": ("[]", b"", "its header is no object"),
    "nothing": ("", b"", "its header is no object"),
    "an end that is missing": ('{"__metadata__":{}', b"", "its header does not end"),
    "a comma at the end": ('{"__metadata__":{},}', b"", "a name in its header is no text"),
    "a value that is missing": ('{"a"}', b"", "no value follows 'a'"),
    "something after the end": ("{}{}", b"", "something follows the end of its header"),
    "a zero after the end": ("{}\0", b"", "something follows the end of its header"),
    "a name that does not end": ('{"a', b"", "a name in its header is no text"),
    "a line in a name": ('{"a\n":{}}', b"", "a name in its header is no text"),
    "half a surrogate": ('{"\\ud800":{}}', b"", "a name in its header is no text"),
    "no UTF-8": (b'{"\xff":{}}', b"", "its header is not UTF-8 at byte 10"),
    "a byte order mark": ("\ufeff{}", b"", "its header is no object"),
    "lists in lists": ("[" * 10**6, b"", "its header is no object"),
    "objects in objects": ('{"a":' * 10**6, b"", "'a' has 'a', which no tensor has"),
    "lists in a tensor": ('{"a":{"shape":' + "[" * 10**6, b"", "the shape of 'a' is no list of whole numbers"),
    "objects in metadata": ('{"__metadata__":' + '{"a":' * 10**6, b"", "a value in __metadata__ is no text"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_headers(tmp_path: Path, what: str) -> None:
    header, data, said = BROKEN[what]
    path = write(tmp_path / "consolidated.safetensors", header, data)
    with pytest.raises(HeaderError, match=said):
        read_header(path)
    with pytest.raises(WeightsError) as error:
        find_weights(tmp_path)
    assert str(error.value).startswith(f"{path} is not a complete safetensors file: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300 + len(str(path))


def test_names_in_errors_are_short_and_printable(tmp_path: Path) -> None:
    for name in ("\x1b[2J\n", "x" * 10**6):
        with pytest.raises(HeaderError) as error:
            read_header(write(tmp_path / "a", {name: entry(1, 2)}, b"ab"))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "it has 0 bytes, and the length of its header alone takes 8"),
        (bytes(7), "it has 7 bytes, and the length"),
        (bytes(8), "its header is no object"),
        ((9).to_bytes(8, "little") + b"{}", "its header takes 9 bytes, but it ends after 2 of them"),
        ((LONGEST + 1).to_bytes(8, "little"), "its header would take 100,000,001 bytes, and at most 100,000,000 are a"),
        (b"\xff" * 8, "its header would take 18,446,744,073,709,551,615 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is the pointer that Git LFS leaves .* run git lfs pull"),
    ],
)
def test_files_that_are_too_short_or_something_else(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(HeaderError, match=said):
        read_header(tmp_path / "a")
    assert not library_takes(tmp_path / "a")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "consolidated-00001-of-00001.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"00001\.safetensors cannot be read: "):
        find_weights(tmp_path)


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    """A good file with bytes changed, dropped and doubled: never another exception, never laxer than the library."""
    path, rng = tmp_path / "a", random.Random(0)
    save_file({"a": torch.zeros(3, 2), "bb": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0)}, path)
    good = path.read_bytes()
    refused = taken = 0
    for _ in range(1200):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 2)] = bytes(rng.choices(b'[]{},:"0123456789-.abeFU \\\n', k=rng.randint(0, 2)))
        path.write_bytes(raw)
        try:
            found = read_header(path)
        except HeaderError:
            refused += 1
        else:
            taken += 1
            assert library_takes(path) or any(e.dtype not in BITS for e in found.values()), raw
    assert refused > 300
    assert taken > 30


MEMORY = """
import resource, sys
from pathlib import Path
from mistral.formats.safetensors_header import HeaderError, read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        read_header(Path(name))
    except HeaderError:
        pass
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_is_that_of_the_header(tmp_path: Path) -> None:
    size = 20_000_000
    fillings = {"lists": "[],", "objects": "{},", "numbers": "1000,", "texts": '"",', "nested": "["}
    paths = []
    for name, filling in fillings.items():
        for where, front in {"shape": '{"a":{"shape":[', "metadata": '{"__metadata__":{"a":', "top": '{"a":'}.items():
            paths.append(write(tmp_path / f"{name}-{where}", front + filling * (size // len(filling))))
    paths.append(write(tmp_path / "wrong", "{}", length=LONGEST))
    words = [sys.executable, "-c", MEMORY, *map(str, paths)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * size
