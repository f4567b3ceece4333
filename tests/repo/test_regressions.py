"""What reviewers got past the suite once: each of these was wrong, or could have been broken unnoticed."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.cache import CacheError, RollingBufferCache
from mistral.engine import GenerationError
from mistral.formats.folder import BUNDLED
from mistral.formats.mistral import ParamsError, to_args
from mistral.generate import complete, generate, stream
from mistral.loader.load import load
from mistral.sampling import RequestRng
from mistral.sampling_params import SamplingError, SamplingParams
from tests.support.folders import PARAMS
from tests.support.tiny import TOLERANCE, distance, ragged, tiny_args, tiny_model, true_logprobs
from tests.text.test_generate import Letters, alphabet_model

ROOT = Path(__file__).parents[2]


def test_defaults_are_the_originals() -> None:
    parameters = inspect.signature(generate).parameters
    defaults = {name: parameters[name].default for name in ("temperature", "top_p", "chunk_size", "seed")}
    assert defaults == {"temperature": 0.7, "top_p": 0.8, "chunk_size": None, "seed": None}
    assert inspect.signature(stream).parameters["top_p"].default == 0.8


def test_a_seeds_numbers_never_change() -> None:
    """The same seed must give the same text in every version."""
    draw = RequestRng(1, 2)
    assert [round(draw(), 12) for _ in range(3)] == [0.100653253838, 0.087048694703, 0.268377093061]


def test_a_stop_string_that_overlaps_itself() -> None:
    """Letter by letter, "aab" ends what "aaab" begins."""

    class Repeats(Letters):
        characters = "aaabcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"

    (result,) = complete([[60]], alphabet_model(), Repeats(), max_tokens=10, temperature=0, stop=["aab"])
    whole = complete([[60]], alphabet_model(), Repeats(), max_tokens=10, temperature=0)[0].text
    assert "aaab" in whole
    assert result.text == whole[: whole.index("aab")]
    assert result.finish_reason == "stop"


class Pieces:
    """Ids from 2 on are byte strings that split characters anywhere, as tekken's do."""

    bos_id = 0
    eos_id = 1
    pieces = (b"a", b"b", b"X\xe6", b"\xbc", b"\xa2!", b"c", b"\xf0\x9f", b"\x99\x82d", b"e\xe6")

    def encode(self, s: str) -> list[int]:
        return [2 + self.pieces.index(s.encode())]

    def decode(self, t: list[int]) -> str:
        known = [i - 2 for i in t if 2 <= i < 2 + len(self.pieces)]
        return b"".join(self.pieces[i] for i in known).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("stop", "max_tokens", "text", "reason"),
    [
        ((), 8, "bX漢!c🙂de\ufffd", "length"),  # what never became a character comes out as it stands
        (("X",), 8, "b", "stop"),  # nothing of the half character after the stop string
        (("\ufffd",), 8, "bX漢!c🙂de", "stop"),  # found in what was held back until the end
        (("d",), 7, "bX漢!c🙂", "stop"),  # with the last token: it stops, whatever the length
        (("漢!",), 8, "bX", "stop"),
    ],
)
def test_tokens_of_text_and_half_a_character(stop: Any, max_tokens: int, text: str, reason: str) -> None:
    shown = list(stream(["a"], alphabet_model(), Pieces(), max_tokens=max_tokens, temperature=0, stop=stop))
    assert "".join(piece.text for piece in shown) == text
    assert not any("\ufffd" in piece.text for piece in shown if piece.token)
    assert shown[-1].finish_reason == reason


def test_a_float64_model_generates_in_float64() -> None:
    model = tiny_model(tiny_args()).double()
    prompts = ragged([9, 3], model.args.vocab_size)
    _, scored = generate([p.tolist() for p in prompts], model, Letters(), max_tokens=0, chunk_size=2)
    for got, want, prompt in zip(scored, true_logprobs(model, prompts), prompts, strict=True):
        picked = want[range(len(prompt) - 1), prompt[1:]]
        assert got == pytest.approx(picked.tolist(), abs=1e-12)


def test_a_cache_holds_no_history() -> None:
    model = tiny_model(tiny_args())
    cache = RollingBufferCache(model.args, 1)
    for _ in range(3):
        model(torch.tensor([1, 2]), [2], cache)
    assert not cache.layer(0).k.requires_grad
    assert not cache.layer(0).v.requires_grad


def test_a_step_that_broke_off_is_not_built_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_args())
    cache = RollingBufferCache(model.args, 1)
    ids = ragged([40], model.args.vocab_size)[0]
    with torch.inference_mode():
        model(ids[:20], [20], cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.layers[1], "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model(ids[20:], [20], cache)
        with pytest.raises(CacheError, match="did not finish"):
            model(ids[20:], [20], cache)
        cache.reset()
        assert distance([model(ids, [40], cache)], true_logprobs(model, [ids])) < TOLERANCE


def test_a_cache_made_in_inference_mode_works_outside() -> None:
    model = tiny_model(tiny_args())
    with torch.inference_mode():
        cache = RollingBufferCache(model.args, 1)
        model(torch.tensor([1, 2]), [2], cache)
    with torch.no_grad():
        model(torch.tensor([3]), [1], cache)
    assert cache.lengths == [3]


def test_a_loaded_model_follows_its_weights() -> None:
    model = load(device="cpu", dtype="float32").model.to(torch.float64)
    assert model.dtype == torch.float64
    assert model(torch.tensor([1, 5]), [2]).dtype == torch.float64


def test_copies_and_pickles() -> None:
    model = tiny_model(tiny_args())
    ids = torch.tensor([1, 2, 3])
    want = model(ids, [3])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids, [3]), want)


def test_a_default_device_does_not_reach_the_random_streams() -> None:
    with torch.device("meta"):
        assert 0 <= RequestRng(1, 1)() < 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 2.5}, "top_k"),
        ({"temperature": "1"}, "temperature"),
        ({"chunk_size": 2.5}, "chunk_size"),
        ({"top_logprobs": 1.5}, "top_logprobs"),
        ({"stop": [3]}, "stop"),
    ],
)
def test_wrong_types_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises((GenerationError, SamplingError), match=name):
        stream([[5]], alphabet_model(), Letters(), **options)


def test_wrong_prompts_are_named() -> None:
    for prompts in (None, [b"ab"], [None]):
        with pytest.raises(GenerationError, match="prompt"):
            stream(prompts, alphabet_model(), Letters())  # type: ignore[arg-type]


def test_lengths_may_be_a_tensor() -> None:
    model = tiny_model(tiny_args())
    cache = RollingBufferCache(model.args, 2)
    model(torch.arange(3), torch.tensor([1, 2]), cache)  # type: ignore[arg-type]
    assert cache.lengths == [1, 2]


def test_what_is_neither_tied_nor_not_and_zero_windows_are_refused() -> None:
    assert to_args({**PARAMS, "tied_embeddings": True}).tied_embeddings
    assert not to_args({**PARAMS, "tied_embeddings": None}).tied_embeddings
    with pytest.raises(ParamsError, match="tied_embeddings must be true or false"):
        to_args({**PARAMS, "tied_embeddings": 1})
    with pytest.raises(ParamsError, match="sliding_window is 0"):
        to_args({**PARAMS, "sliding_window": "0"})


def test_a_model_padded_past_its_tokenizer(tmp_path: Path) -> None:
    """Ids that have no word may be made, and have no text; the note says how many there are."""
    from safetensors.torch import load_file, save_file

    state = load_file(BUNDLED / "consolidated.safetensors")
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name] = torch.cat([state[name], state[name][:64] * 50])
    save_file(state, tmp_path / "consolidated.safetensors")
    params = json.loads((BUNDLED / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "vocab_size": 4160}))
    (tmp_path / "tokenizer.model").write_bytes((BUNDLED / "tokenizer.model").read_bytes())
    loaded = load(tmp_path, device="cpu")
    assert any("64 ids" in note for note in loaded.notes)
    results = complete(["Once"], loaded.model, loaded.tokenizer, max_tokens=50, temperature=3.0, top_p=1.0, seed=1)
    assert any(token >= 4096 for token in results[0].tokens)


def test_greedy_needs_no_random_numbers_of_a_valid_type() -> None:
    assert SamplingParams(temperature=0).greedy
    with pytest.raises(SamplingError, match="temperature"):
        SamplingParams(temperature=True)


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "main", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, text=True, timeout=300, **options)


def test_a_mistyped_folder_is_not_a_prompt() -> None:
    for words in (["--folder=nosuch"], ["tests/nosuch"], ["no/such/folder"], ["nosuch/"], ["nosuch", "hello"]):
        run = command("complete", *words, capture_output=True, stdin=subprocess.DEVNULL)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr.startswith("error: no such folder: ")


def test_closed_streams(tmp_path: Path) -> None:
    """Closed by the shell with >&- or 2>&-: nothing is lost to the other stream, and nothing breaks."""
    script = f"{sys.executable} -m main complete hi --max_tokens 2 --temperature 0"
    run = subprocess.run(f"{script} >&-", shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0
    assert "Traceback" not in run.stderr
    run = subprocess.run(f"{script} 2>&-", shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0
    assert "loaded" not in run.stdout
