"""The newer members, as text: folders that transformers writes of tiny random ones give its numbers, in both layouts.

Prompts and answers run beyond the original context, where scaled positions and queries differ from plain ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral import load
from mistral.args import ModelArgs, QueryScaling, Yarn
from mistral.cache import RollingBufferCache
from mistral.chat.conversation import Chat
from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.formats.convert import convert
from mistral.formats.folder import BUNDLED, read_folder
from mistral.formats.layout import ParamsError
from mistral.formats.mistral import to_args
from mistral.formats.releases import COMPARED, PARTS, RELEASES, Release, identify
from mistral.rope import Rope, yarn_frequencies, yarn_ramp
from tests.chat.test_templates import LATER, later
from tests.formats.test_releases import assert_quantized
from tests.support.folders import PARAMS, make_folder
from tests.support.tiny import (
    TOLERANCE,
    distance,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    whole,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")

LENS = [90, 1, 33, 61]
NEW = 50
ORIGINAL = 32
TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e9}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# As Medium 3.5 spells it: no query grows, and the attention factor is the usual one.
MEDIUM = {**YARN, "type": "yarn", "factor": 64.0, "beta_fast": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}
MEDIUM |= {"llama_4_scaling_beta": 0}
NO_FACTOR = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
GROWS = {**NO_FACTOR, "llama_4_scaling_beta": 0.5}

# model_type of the text model, whether it is inside one that reads images, whether it is tied, its rope_parameters.
KINDS: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {
    "small-3.1": ("mistral", True, False, PLAIN),
    "ministral-3-3b": ("ministral3", True, True, GROWS),
    "ministral-3-8b": ("ministral3", True, False, GROWS),
    "ministral-3-14b": ("ministral3", True, False, {**GROWS, "rope_theta": 1e9}),
    "devstral-small-2": ("ministral3", True, False, {**GROWS, "rope_theta": 1e8, "factor": 48.0}),
    "devstral-2": ("ministral3", False, False, MEDIUM),
    "medium-3.5": ("ministral3", True, False, MEDIUM),
    "text-alone": ("ministral3", False, False, GROWS),
    "yarn-alone": ("mistral", False, False, YARN),
    "another-factor": ("mistral", False, True, {**YARN, "factor": 10.0, "attention_factor": 1.3}),
    "two-mscales": ("mistral", False, False, {**YARN, "factor": 6.0, "mscale": 0.7, "mscale_all_dim": 1.1}),
}


def written_by_transformers(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a kind, whose folder transformers has written."""
    model_type, inside, tied, rope = KINDS[kind]
    text = {**TEXT, "tie_word_embeddings": tied, "rope_parameters": dict(rope)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if inside:
            config = transformers.Mistral3Config(
                text_config={"model_type": model_type, **text},
                vision_config={"model_type": "pixtral", **VISION},
                tie_word_embeddings=tied,
            )
            model = transformers.Mistral3ForConditionalGeneration(config)
        else:
            of_type = "Ministral3" if model_type == "ministral3" else "Mistral"
            model = getattr(transformers, f"{of_type}ForCausalLM")(getattr(transformers, f"{of_type}Config")(**text))
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    return model.float()


def theirs(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return [model(input_ids=p[None], use_cache=False).logits[0] for p in prompts]


def greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    """50 ids, each likeliest, by a cache."""
    cache = RollingBufferCache(model.args, 1, positions=len(prompt) + NEW)
    ids, step = [], prompt
    with torch.inference_mode():
        for _ in range(NEW):
            logits = model.forward(step, [len(step)], cache)[-1]
            step = logits.argmax()[None]
            ids.append(int(step))
    return ids


def their_greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    out = model.generate(
        input_ids=prompt[None],
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_loads_and_is_transformers(tmp_path: Path, kind: str) -> None:
    """Both layouts, converted both ways; logits and 50 greedy tokens, all beyond the original context."""
    other = written_by_transformers(tmp_path / "hf", kind)
    prompts = ragged(LENS, TEXT["vocab_size"], seed=3)
    want, want_ids = theirs(other, prompts), their_greedy(other, prompts[0])
    convert(tmp_path / "hf", tmp_path / "mistral", "mistral")
    convert(tmp_path / "mistral", tmp_path / "back", "hf")
    found = [load(tmp_path / name, device="cpu") for name in ("hf", "mistral", "back")]
    assert found[0].args == found[1].args == found[2].args
    for one in found:
        with torch.inference_mode():
            assert distance(whole(one.model, prompts), want) < TOLERANCE
            cache = RollingBufferCache(one.args, len(prompts), positions=max(LENS))
            assert distance(play(one.model, prompts, prefill_then_decode(LENS, 9), cache), want) < TOLERANCE
    assert greedy(found[0].model, prompts[0]) == greedy(found[1].model, prompts[0]) == want_ids
    classes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert distance(theirs(classes, prompts), want) < TOLERANCE
    assert (found[0].args.llama_4_scaling is None) == (not KINDS[kind][3].get("llama_4_scaling_beta"))
    seen = [note for note in found[0].notes if "reads images" in note]
    assert len(seen) == KINDS[kind][1]
    assert found[0].args.tied_embeddings == KINDS[kind][2]


@pytest.mark.parametrize("kind", ["ministral-3-3b", "text-alone"])
def test_the_scaling_matters(tmp_path: Path, kind: str) -> None:
    """Each part of it: without, the same folder gives other numbers, and only beyond the original context."""
    other = written_by_transformers(tmp_path, kind)
    prompts = ragged(LENS, TEXT["vocab_size"], seed=3)
    want = theirs(other, prompts)
    raw = json.loads((tmp_path / "config.json").read_text())
    text = raw.get("text_config", raw)
    for drop in ("llama_4_scaling_beta", "mscale"):
        kept = dict(text["rope_parameters"])
        del text["rope_parameters"][drop]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        text["rope_parameters"] = kept
        with torch.inference_mode():
            got = whole(load(tmp_path, device="cpu").model, prompts)
        assert distance(got, want) > 1e-3
        if drop == "llama_4_scaling_beta":
            assert distance([x[:ORIGINAL] for x in got], [x[:ORIGINAL] for x in want]) < TOLERANCE


# --- in fp8


def in_fp8(folder: Path) -> None:
    """The text model's layers as the releases store them: a scale for each matrix, and one for its inputs."""
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if "_proj" in n and "language_model" in n]:
        weight, path = state.pop(name).float(), name.removesuffix(".weight")
        scale = (weight.abs().max() / 448).bfloat16()
        state[name] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        state |= {f"{path}.weight_scale_inv": scale, f"{path}.activation_scale": torch.tensor(0.02).bfloat16()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    raw["quantization_config"] = {
        **{"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        "modules_to_not_convert": skipped,
    }
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("kind", ["ministral-3-3b", "medium-3.5"])
def test_a_member_in_fp8_is_transformers(tmp_path: Path, kind: str) -> None:
    """Which dequantizes to bf16 where there is no GPU; and both ways out of it."""
    pytest.importorskip("accelerate", reason="needs accelerate, without which transformers reads no fp8")
    written_by_transformers(tmp_path / "fp8", kind, torch.bfloat16)
    in_fp8(tmp_path / "fp8")
    classes = transformers.Mistral3ForConditionalGeneration
    other = classes.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16).eval().float()
    prompts = ragged(LENS, TEXT["vocab_size"], seed=3)
    want = theirs(other, prompts)
    convert(tmp_path / "fp8", tmp_path / "mistral", "mistral")
    convert(tmp_path / "mistral", tmp_path / "back", "hf")
    for name in ("fp8", "mistral", "back"):
        found = load(tmp_path / name, device="cpu")
        with torch.inference_mode():
            assert distance(whole(found.model, prompts), want) < TOLERANCE
        for said in ("the weights are quantized (fp8)", "14 tensors of scales for activations"):
            assert any(said in note for note in found.notes) == (name == "fp8")


# --- in conversation

WITH_TEKKEN = [r for r in RELEASES if r.tokenizer_file == "tekken.json"]
CHATS = {r.name: r.template for r in WITH_TEKKEN if r.template.partition("-")[0] in LATER}

# The first of each version, and the other ones of it.
FIRST = {template: name for name, template in reversed(CHATS.items())}
FEW = [pytest.param(name, marks=[] if name in FIRST.values() else [pytest.mark.long]) for name in CHATS]


def scaled_down(release: str, folder: Path, words: bool = True) -> Path:
    """A tiny random folder with what a release's row says of positions and output.

    Args:
        words: whether it has a tekken file of its version, and so many words.
    """
    row = next(r for r in RELEASES if r.name == release)
    assert identify(row_args(row), "tekken", row.tokenizer_version)[0] is row
    changes: dict[str, Any] = {"yarn": row.yarn, "llama_4_scaling": row.llama_4_scaling, "sliding_window": None}
    changes |= {"tied_embeddings": row.tied_embeddings} | ({"vocab_size": row.vocab_size} if words else {})
    args = tiny_args(**changes)
    state = {n: w for n, w in tiny_model(args).state_dict().items() if n != "output.weight" or not row.tied_embeddings}
    make_folder(folder, state, tokenizer=False, **args.to_params())
    if words:
        later(CHATS[release].partition("-")[0], folder)
    return folder


@pytest.mark.parametrize("release", FEW)
def test_a_member_chats(tmp_path: Path, release: str) -> None:
    """In the template of its version; the second turn takes in what is new."""
    pytest.importorskip("mistral_common")
    folder = scaled_down(release, tmp_path / "model")
    loaded = load(folder, device="cpu")
    template = find_template(loaded.tokenizer, folder=folder)
    assert template.name == CHATS[release]
    chat = Chat(loaded.model, loaded.tokenizer, template, system="Be brief.", temperature=0, max_tokens=5)
    for question in ("Hi", "Bye"):
        text = "".join(piece.text for piece in chat.answer(question))
        assert text == chat.messages[-1].content
    before = template.encode_chat([Message("system", "Be brief."), *chat.messages[:2], Message("user", "Bye")])
    assert chat.prefilled_tokens + chat.cached_tokens == len(before)
    assert chat.prefilled_tokens < len(before) / 2 + 2


@pytest.mark.parametrize("release", FEW)
def test_a_member_is_quantized(tmp_path: Path, release: str) -> None:
    """int8 and int4 of --quant: close to what they were made from, and the same when they were converted before."""
    folder = scaled_down(release, tmp_path / "model", words=False)
    assert_quantized(folder, tmp_path)


def row_args(row: Release) -> ModelArgs:
    return ModelArgs(**{n: getattr(row, n) for n in (*COMPARED, *PARTS, "tied_embeddings")})


# --- the formulas, against what the releases have

MINISTRAL = Yarn(16, 16384, 32, 1, 1.0)


def test_golden_frequencies() -> None:
    got = yarn_frequencies(128, 1e6, MINISTRAL)
    golden = {0: 1, 1: 0.8058422, 20: 0.01333521, 21: 0.010153464, 28: 0.00132517959, 36: 4.961135e-5}
    golden |= {37: 2.1238802e-5, 63: 7.755861e-8}
    for i, value in golden.items():
        assert float(got[i]) == pytest.approx(value, rel=5e-7)
    ramp = yarn_ramp(128, 1e6, MINISTRAL)
    assert ramp[20] == 0 < ramp[21]
    assert ramp[36] < ramp[37] == 1


@pytest.mark.parametrize("kind", [k for k, (*_, rope) in KINDS.items() if rope["rope_type"] == "yarn"])
def test_frequencies_are_transformers_bit_for_bit(tmp_path: Path, kind: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    other = written_by_transformers(tmp_path, kind)
    config = getattr(other.config, "text_config", other.config)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    rope = Rope(read_folder(tmp_path).args)
    assert torch.equal(rope.frequencies, frequencies)
    assert rope.scale == pytest.approx(factor, rel=1e-12)


def test_golden_query_scale_and_attention_factor() -> None:
    args = to_args({**PARAMS, "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1}})
    assert args.llama_4_scaling == QueryScaling(16384, 0.1)
    got = Rope(args).query_scale(torch.tensor([0, 16383, 16384, 32768, 262143]))
    assert got[:, 0].tolist() == pytest.approx([1, 1, 1.0693147, 1.1098612, 1.2772589], rel=1e-7)
    yarn = {"factor": 64, "original_max_position_embeddings": 4096, "beta": 4, "alpha": 1}
    for applied, factor in ((True, 1.4158883), (None, 1.4158883), (False, 1.0)):
        found = to_args({**PARAMS, "yarn": {**yarn, "apply_scale": applied}}).yarn
        assert found is not None
        assert found.attention_factor == pytest.approx(factor, rel=1e-7)
        assert to_args({**PARAMS, "yarn": found.to_params()}).yarn == found


YARN_PARAMS = {"factor": 16, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"yarn": {"factor": 16}}, "yarn lacks original_max_position_embeddings"),
        ({"yarn": {**YARN_PARAMS, "gamma": 1}}, "yarn has 'gamma', which no supported release has"),
        ({"yarn": {**YARN_PARAMS, "factor": 0.5}}, "yarn.factor is 0.5; it must be at least 1"),
        ({"yarn": {**YARN_PARAMS, "factor": "16"}}, "yarn.factor must be a number"),
        ({"yarn": {**YARN_PARAMS, "beta": 1, "alpha": 2}}, "yarn.beta_fast 1 is below yarn.beta_slow 2"),
        ({"yarn": {**YARN_PARAMS, "apply_scale": 1}}, "apply_scale 1; it must be true or false"),
        ({"yarn": 16}, "yarn must be an object"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling lacks original_max_position_embeddings"),
        ({"llama_4_scaling": {"beta": -1, "original_max_position_embeddings": 8}}, "llama_4_scaling.beta is -1"),
    ],
)
def test_params_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamsError) as error:
        to_args({**PARAMS, **given})
    assert said in str(error.value)
