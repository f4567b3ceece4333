"""Write the recipes in deploy/: what `python -m main deploy` writes for one release.

    python -m tools.make_recipes

The release is 7B Instruct v0.3, fetched from the hub by the machine that serves it. Nothing is downloaded here: of the
weights a header is enough, and the rest of the file is a hole.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from mistral.args import ModelArgs
from mistral.deploy.plan import Wanted, plan
from mistral.deploy.recipes import TARGETS, recipes, write
from mistral.formats.releases import COMPARED, RELEASES
from mistral.parameters import parameters

ROOT = Path(__file__).resolve().parent.parent
HUB_ID = "mistralai/Mistral-7B-Instruct-v0.3"
RELEASE = "7B v0.3"
TOKENIZER = "mistral_instruct_tokenizer_240323.model.v3"  # among mistral-common's data
# Where the files of each target go.
ROOMS = {"vllm": "vllm", "compose": "vllm", "kubernetes": "kubernetes", "skypilot": "skypilot"}


def hollow_release(folder: Path) -> Path:
    """The release's folder: params.json, tokenizer, and weights that have a header and take no room on the disk."""
    release = next(release for release in RELEASES if release.name == RELEASE)
    params = {name: getattr(release, name) for name in COMPARED}
    (folder / "params.json").write_text(json.dumps({**params, "max_seq_len": 32768}), encoding="utf-8")
    shutil.copy(str(files("mistral_common") / "data" / TOKENIZER), folder / release.tokenizer_file)
    end, header = 0, {}
    for name, parameter in parameters(ModelArgs(**params)).items():
        begin, end = end, end + 2 * math.prod(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "consolidated.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def made() -> dict[str, dict[str, str]]:
    """The files of each room."""
    with tempfile.TemporaryDirectory() as work:
        deployment = plan(str(hollow_release(Path(work))), Wanted(hub_id=HUB_ID))
    rooms: dict[str, dict[str, str]] = {room: {} for room in ROOMS.values()}
    for target in TARGETS:
        rooms[ROOMS[target]] |= recipes(target, deployment)
    return rooms


def main() -> None:
    """Write them."""
    argparse.ArgumentParser(
        prog="python -m tools.make_recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for room, recipe in made().items():
        write(recipe, ROOT / "deploy" / room)


if __name__ == "__main__":
    main()
