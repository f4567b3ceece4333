"""Several adapters beside one model: each request has the numbers that it has alone with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral import load
from mistral.adapters import BASE, AdaptedLinear, Adapters
from mistral.engine import Engine
from mistral.formats.adapter import read_adapter
from mistral.generate import complete
from mistral.loader.load import Loaded
from mistral.loader.options import LoadOptions, OptionError, adapter_names
from mistral.request import Request
from mistral.sampling_params import SamplingParams
from mistral.util.errors import UsageError
from tests.support.adapters import peft_tensors, write_native, write_peft
from tests.support.commands import in_process
from tests.support.folders import PARAMS, make_folder, random_state
from tests.support.tiny import ragged

LENS = [11, 1, 23, 6, 9, 17]  # of a window of 5
WHO: list[str | None] = ["one", BASE, "two", None, "one", "two"]
PARAMS_OF_REQUESTS = SamplingParams(max_tokens=9, temperature=0, top_logprobs=5)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder, an adapter of two matrices and the output in PEFT's form, another of all in mistral-finetune's."""
    at = tmp_path_factory.mktemp("adapters")
    tensors = {n: t for n, t in peft_tensors(seed=3).items() if "q_proj" in n or ("1" in n and "up_proj" in n)}
    generator = torch.Generator().manual_seed(5)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.rand(3, 24, generator=generator) - 0.5
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.rand(4096, 3, generator=generator) - 0.5
    return make_folder(at / "base"), write_peft(at / "one", tensors), write_native(at / "two")


def run(
    loaded: Loaded, who: list[str | None], chunk_size: int | None, rows: int | None = None
) -> tuple[list[Request], list[list[dict[int, float]]]]:
    engine = Engine(loaded.model, eos_ids=(), chunk_size=chunk_size, score_prompts=True, rows=rows)
    prompts = [p.tolist() for p in ragged(LENS, PARAMS["vocab_size"], seed=4)]
    requests = [engine.add(ids, PARAMS_OF_REQUESTS, adapter=name) for ids, name in zip(prompts, who, strict=True)]
    told: dict[Request, list[dict[int, float]]] = {request: [] for request in requests}
    while not engine.done:
        for token in engine.step():
            told[token.request].append(token.top)
    assert all(request.error is None and len(request.output_ids) == 9 for request in requests)
    return requests, list(told.values())


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(
    "how",
    [{"execution": "eager"}, {"execution": "kernels"}, {"quant": "int8"}, {"execution": "eager", "draft": "ngram"}],
)
def test_each_request_has_the_numbers_of_its_adapter_alone(
    places: tuple[Path, Path, Path], how: dict[str, Any], rows: int | None, chunk_size: int | None
) -> None:
    folder, one, two = places
    options: dict[str, Any] = {"device": "cpu", **how}
    # Inputs of quantized products are rounded to 16 bits: a last bit more may be a step of 3e-5 of the largest.
    close = 1e-5 if "quant" not in how else 2e-4
    mixed = load(folder, **options, adapter=[one, two])
    assert mixed.model.adapters is not None
    assert mixed.model.adapters.names == ("one", "two")
    got, got_top = run(mixed, WHO, chunk_size, rows)
    alone = {
        BASE: load(folder, **options | {"draft": None}),
        "one": load(folder, **options | {"draft": None}, adapter=one, adapter_mode="runtime"),
        "two": load(folder, **options | {"draft": None}, adapter=two, adapter_mode="runtime"),
    }
    for name, loaded in alone.items():
        want, want_top = run(loaded, [None] * len(LENS), chunk_size, rows)
        for i, who in enumerate(WHO):
            if (who or BASE) != name:
                continue
            values = torch.tensor(got[i].prompt_logprobs), torch.tensor(want[i].prompt_logprobs)
            assert values[0].shape == values[1].shape == (LENS[i] - 1,)
            assert torch.allclose(*values, rtol=0, atol=close)
            if "quant" in how:  # such a step is enough for another token
                continue
            assert got[i].output_ids == want[i].output_ids
            for a, b in zip(got_top[i], want_top[i], strict=True):
                assert a.keys() == b.keys()
                assert max(abs(a[t] - b[t]) for t in a) < close
            if name == BASE and how == {"execution": "eager"}:  # else the base alone has a faster way, with other bits
                assert got[i].prompt_logprobs == want[i].prompt_logprobs
                assert got_top[i] == want_top[i]
    others = run(alone["one"], [None] * len(LENS), chunk_size, rows)[0]
    assert max(abs(a - b) for a, b in zip(got[2].prompt_logprobs, others[2].prompt_logprobs, strict=True)) > 0.1


def test_rows_of_the_base_have_its_bits(places: tuple[Path, Path, Path]) -> None:
    """One product, rows of three kinds, against products of its parts."""
    folder, one, two = places
    model = load(folder, device="cpu", execution="eager", adapter=[one, two]).model
    product, adapters = model.layers[1].attention.wq, model.adapters
    assert isinstance(product, AdaptedLinear)
    assert adapters is not None
    x = torch.rand(9, 24) - 0.5
    with torch.inference_mode():
        with adapters.of(["two", BASE, "one", "two"], [2, 3, 0, 4]):
            got = product(x)
        assert torch.equal(got[2:5], product.of(x)[2:5])
        assert torch.equal(product(x), product.of(x))  # nothing declared: several have no default
        with adapters.of(["one"], [9]):
            assert not torch.allclose(product(x), got)
        with adapters.of(["two"], [9]):
            assert torch.allclose(product(x)[[0, 1, 5, 6, 7, 8]], got[[0, 1, 5, 6, 7, 8]], rtol=0, atol=1e-6)


def test_a_mistake_in_the_rows_shows(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, one, two = places
    mixed = load(folder, device="cpu", execution="eager", adapter=[one, two])
    want, _ = run(mixed, WHO, None)
    right = Adapters.of
    monkeypatch.setattr(Adapters, "of", lambda self, names, counts, device: right(self, names[::-1], counts, device))
    got, _ = run(mixed, WHO, None)
    apart = [
        max(abs(x - y) for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True))
        for a, b in zip(got, want, strict=True)
        if a.prompt_logprobs
    ]
    assert max(apart) > 0.1


def test_names_that_are_not_there(places: tuple[Path, Path, Path]) -> None:
    folder, one, two = places
    mixed = load(folder, device="cpu", adapter=[f"first={one}", f"a.b-c={two}"])
    engine = Engine(mixed.model, eos_ids=())
    with pytest.raises(UsageError, match="no adapter is called 'one'; there are first, a.b-c"):
        engine.add([1, 2], SamplingParams(), adapter="one")
    assert engine.add([1, 2], SamplingParams(), adapter="a.b-c").adapter == "a.b-c"
    assert engine.add([1, 2], SamplingParams()).adapter == BASE
    plain = Engine(load(folder, device="cpu").model, eos_ids=())
    assert plain.add([1, 2], SamplingParams(), adapter=BASE).adapter == BASE
    with pytest.raises(UsageError, match="none is beside the weights"):
        plain.add([1, 2], SamplingParams(), adapter="one")
    assert "adapters first and a.b-c at run time" in mixed.describe()
    assert any("a prompt that names none of them is continued by the base alone" in note for note in mixed.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a/lora", "b/lora"], "two adapters are called 'lora': give them names, as NAME=FOLDER"),
        (["x=a", "x=b"], "two adapters are called 'x'"),
        (["=a"], "has no name"),
        (["x="], "has no folder"),
    ],
)
def test_names_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        LoadOptions(adapter=tuple(words))


def test_names_are_those_of_folders(tmp_path: Path) -> None:
    odd = write_native(tmp_path / "a=b")
    file = odd / "lora.safetensors"
    assert adapter_names([str(odd)]) == {"a=b": str(odd)}
    assert adapter_names([str(file), "x=y/lora.safetensors"]) == {"a=b": str(file), "x": "y/lora.safetensors"}
    assert LoadOptions(adapter=odd).adapter == (str(odd),)  # type: ignore[arg-type]
    assert LoadOptions(adapter=None).adapter == ()  # type: ignore[arg-type]
    assert LoadOptions(adapter={"x": odd}).adapter == (f"x={odd}",)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="adapter is 3; it must be a folder, or several"):
        LoadOptions(adapter=3)  # type: ignore[arg-type]


def test_several_are_not_merged(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, one, two = places
    with pytest.raises(OptionError, match="merge takes one adapter, and 2 are given"):
        load(folder, device="cpu", adapter=[one, two], adapter_mode="merge")
    dora = write_peft(tmp_path / "dora", peft_tensors(dora=True), use_dora=True)
    with pytest.raises(OptionError, match="DoRA, which scales whole rows"):
        load(folder, device="cpu", adapter=[one, dora])


MOE = {"moe": {"num_experts": 3, "num_experts_per_tok": 2}}


def expert_folder(folder: Path) -> Path:
    state = random_state()
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        at = f"layers.{layer}.feed_forward"
        for name in ("w1", "w2", "w3"):
            weight = state.pop(f"{at}.{name}.weight")
            state |= {f"{at}.experts.{e}.{name}.weight": weight * (1 + 0.3 * e) for e in range(3)}
        state[f"{at}.gate.weight"] = torch.rand(3, 24, generator=generator) - 0.5
    return make_folder(folder, state, **MOE)


def expert_adapter(folder: Path, target: str, seed: int = 1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    out, inner = {"q_proj": (32, 24), "w2": (24, 40), "gate": (3, 24)}[target]
    places = {"q_proj": "self_attn.q_proj", "w2": "block_sparse_moe.experts.1.w2", "gate": "block_sparse_moe.gate"}
    at = places[target]
    name = f"base_model.model.model.layers.0.{at}"
    tensors = {
        f"{name}.lora_A.weight": torch.rand(3, inner, generator=generator) - 0.5,
        f"{name}.lora_B.weight": torch.rand(out, 3, generator=generator) - 0.5,
    }
    return write_peft(folder, tensors)


def test_experts_take_one_adapter(tmp_path: Path) -> None:
    folder = expert_folder(tmp_path / "base")
    q, w2 = expert_adapter(tmp_path / "q", "q_proj"), expert_adapter(tmp_path / "w2", "w2")
    with pytest.raises(OptionError, match=r"changes layers.0.feed_forward.experts.1.w2.weight, of an expert"):
        load(folder, device="cpu", adapter=[q, w2])
    alone = load(folder, device="cpu", execution="eager", adapter=w2, adapter_mode="runtime")
    merged = load(folder, device="cpu", execution="eager", adapter=w2)
    ids = ragged([11], PARAMS["vocab_size"])[0]
    with torch.inference_mode():
        got, want, plain = (m.model.forward(ids, [11]) for m in (alone, merged, load(folder, device="cpu")))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (plain - want).abs().max() > 1e-2 * want.abs().max()
    with pytest.raises(UsageError, match="the adapter w2 changes experts, so every request must have it"):
        Engine(alone.model, eos_ids=()).add([1], SamplingParams(), adapter=BASE)
    mixed = load(folder, device="cpu", adapter=[q, f"r={expert_adapter(tmp_path / 'r', 'q_proj', 2)}"])
    run(mixed, ["q", "r", BASE, "r", "q", None], 4)


def test_a_router_is_a_matrix_too(tmp_path: Path) -> None:
    folder, gate = expert_folder(tmp_path / "base"), expert_adapter(tmp_path / "gate", "gate")
    assert read_adapter(expert_adapter(tmp_path / "w2", "w2")).targets == ("w2",)
    assert read_adapter(gate).targets == ("gate",)
    merged = load(folder, device="cpu", execution="eager", adapter=gate)
    ids = ragged([11], PARAMS["vocab_size"])[0]
    with torch.inference_mode():
        want, plain = (m.model.forward(ids, [11]) for m in (merged, load(folder, device="cpu")))
        for execution in ("eager", "kernels"):
            beside = load(folder, device="cpu", execution=execution, adapter=gate, adapter_mode="runtime")
            assert (beside.model.forward(ids, [11]) - want).abs().max() < 1e-5 * want.abs().max()
    assert (plain - want).abs().max() > 1e-2 * want.abs().max()
    pair = load(folder, device="cpu", adapter=[gate, f"q={expert_adapter(tmp_path / 'q', 'q_proj')}"])
    run(pair, ["gate", "q", BASE, "q", "gate", None], 4)


def test_prompts_name_their_adapters(places: tuple[Path, Path, Path]) -> None:
    folder, one, two = places
    mixed = load(folder, device="cpu", adapter=[one, two])
    given: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    texts = ["Once upon a time"] * 3
    got = complete(texts, mixed.model, mixed.tokenizer, adapter=["two", None, "one"], **given)
    assert len({tuple(each.tokens) for each in got}) == 3
    for adapter, each in zip((two, None, one), got, strict=True):
        alone = load(folder, device="cpu", adapter=adapter)
        assert complete(texts[:1], alone.model, alone.tokenizer, **given)[0].tokens == each.tokens
    all_two = complete(texts, mixed.model, mixed.tokenizer, adapter="two", **given)
    assert [each.tokens for each in all_two] == [got[0].tokens] * 3
    with pytest.raises(UsageError, match="2 values of adapter for 3 prompts"):
        complete(texts, mixed.model, mixed.tokenizer, adapter=["two", None], **given)


def test_the_command_line_takes_several(
    places: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, one, two = places
    cli = in_process(capfd)
    file = tmp_path / "p.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": "Once upon", "adapter": name} for name in ("one", "x", "")]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ("complete", folder, "--file", file, "--max_tokens", "6", "--temperature", "0", "--json")
    done = cli(*words, "--adapter", one, "--adapter", f"x={two}")
    assert "adapters one and x at run time" in done.err
    found = [json.loads(line)["tokens"] for line in done.text.splitlines()]
    for adapter, tokens in zip((("--adapter", one), ("--adapter", two), ()), found, strict=True):
        file.write_text('"Once upon"', encoding="utf-8")
        assert json.loads(cli(*words, *adapter).text)["tokens"] == tokens
    file.write_text('{"prompt": "a", "adapter": "y"}', encoding="utf-8")
    refused = cli(*words, "--adapter", one, "--adapter", f"x={two}")
    assert refused.code == 2
    assert refused.err.endswith("error: no adapter is called 'y'; there are one, x\n")
    file.write_text('{"prompt": "a", "adapter": 1}', encoding="utf-8")
    assert "adapter must be the name of one" in cli(*words).error
    talk = cli("interactive", folder, "--instruct", "--adapter", one, "--adapter", two, stdin="/adapter one")
    assert "adapter: one, of one, two" in talk.err
