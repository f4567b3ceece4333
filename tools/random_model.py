"""Write a folder of random weights in the shape of a release: what its speed and memory are can be tried without it.

    python -m tools.random_model "7B v0.1" DST [--layout mistral|hf] [--dtype bfloat16|float16|float32] [--seed 0]
    python -m tools.random_model path/to/params.json DST

The tokenizer is the release's own where mistral-common has it, or the one beside params.json. What the model says
is noise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from mistral.args import ModelArgs
from mistral.formats.convert import DTYPES, Converted, write_folder
from mistral.formats.layouts import WRITABLE
from mistral.formats.mistral import read_object, to_args
from mistral.formats.random import random_folder
from mistral.formats.releases import COMPARED, RELEASES, Release, identify
from mistral.formats.tokenizers import tokenizer_files

# The tokenizers that mistral-common carries, by the template of the releases that have them.
TOKENIZERS = {
    "v1": "tokenizer.model.v1",
    "mistrallite": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v3-tekken": "tekken_240718.json",
}


class ShapeError(ValueError):
    """Neither a release nor a params.json."""


def write_random(shape: str, dst: Path, layout: str = "mistral", dtype: str = "bfloat16", seed: int = 0) -> Converted:
    """Write a folder; it appears once it is complete, and takes the memory of about one tensor.

    Args:
        shape: a release's name, or the path of a params.json.
        dst: a folder that is not there yet, or is empty.
        layout: "mistral" or "hf".
        dtype: of the weights: float32, bfloat16 or float16.
        seed: the same one gives the same weights.

    Raises:
        ShapeError: no such release and no such file.
        ValueError: another subclass: the params.json is wrong, or the folder cannot be written.
    """
    args, release = _shape(shape)
    with tempfile.TemporaryDirectory() as described:
        found = _tokenizer(shape, release)
        if found is not None:
            source, name = found
            shutil.copyfile(source, Path(described) / name)
        folder = random_folder(args, Path(described), dtype, seed)
        return write_folder(folder, dst, layout)


def _shape(shape: str) -> tuple[ModelArgs, Release | None]:
    if shape.endswith(".json"):
        args = to_args(read_object(Path(shape)))
        return args, identify(args)[0]
    for release in RELEASES:
        if shape.lower() in (name.lower() for name in (release.name, *release.variants)):
            return ModelArgs(**{name: getattr(release, name) for name in COMPARED}), release
    names = ", ".join(release.name for release in RELEASES)
    raise ShapeError(f"no release is called {shape!r}: give the path of a params.json, or one of {names}")


def _tokenizer(shape: str, release: Release | None) -> tuple[Path, str] | None:
    """The tokenizer to take along, and the name that it gets."""
    beside = tokenizer_files(Path(shape).parent) if shape.endswith(".json") else []
    if beside:
        return beside[0], beside[0].name
    if release is None or release.template not in TOKENIZERS:
        return None
    return Path(str(files("mistral_common") / "data" / TOKENIZERS[release.template])), release.tokenizer_file


def main() -> int:
    """Read the flags, write the folder, say what was written."""
    parser = argparse.ArgumentParser(prog="python -m tools.random_model", description="Write random weights.")
    parser.add_argument("shape", help='a release, such as "7B v0.1", or the path of a params.json')
    parser.add_argument("dst", type=Path, help="a folder that is not there yet, or is empty")
    parser.add_argument("--layout", choices=tuple(WRITABLE), default="mistral")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        written = write_random(given.shape, given.dst, given.layout, given.dtype, given.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {written.describe()}")
    for note in written.notes:
        print(f"note: {note}")
    if not tokenizer_files(written.path):
        print(f"note: {written.path} has no tokenizer: copy the release's into it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
