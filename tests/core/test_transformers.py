"""The same weights in transformers' Mistral: log-probs equal, and the window is the same window."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mistral.model import Transformer
from mistral.oracle.layerwise import their_config
from mistral.window import visible
from tests.support.tiny import TOLERANCE, at_random, distance, make_cache, play, ragged, tiny_args, tiny_model, whole

transformers = pytest.importorskip("transformers", reason="needs transformers")

LENS = [33, 1, 6, 21]


def halves(weight: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Rows of q or k from adjacent pairs (ours) to halves (theirs)."""
    dim = weight.shape[1]
    return weight.view(heads, head_dim // 2, 2, dim).transpose(1, 2).reshape(heads * head_dim, dim)


def twin(model: Transformer, window: int | None, permute: bool = True) -> torch.nn.Module:
    """transformers' model with our model's weights, in fp32 with eager attention."""
    a = model.args
    shape = dataclasses.replace(a, sliding_window=window)
    config = their_config(shape, tie_word_embeddings=False, attn_implementation="eager")
    ours = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["tok_embeddings.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["output.weight"],
    }
    table = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(a.n_layers):
        for their_name, our_name in table.items():
            weight = ours[f"layers.{i}.{our_name}.weight"]
            if permute and our_name in ("attention.wq", "attention.wk"):
                weight = halves(weight, a.n_heads if our_name.endswith("wq") else a.n_kv_heads, a.head_dim)
            theirs[f"model.layers.{i}.{their_name}.weight"] = weight
    with torch.random.fork_rng(devices=[]):
        other = transformers.MistralForCausalLM(config).float().eval()
    other.load_state_dict(theirs, strict=True)
    return other


def their_logits(other: torch.nn.Module, prompts: list[torch.Tensor], start: int = 0) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            other(p[None], position_ids=torch.arange(start, start + len(p))[None], use_cache=False).logits[0]
            for p in prompts
        ]


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("window", [1, 4, 7, None])
def test_logprobs_are_transformers(window, theta):
    model = tiny_model(tiny_args(sliding_window=window, rope_theta=theta, n_layers=3), seed=1)
    prompts = ragged(LENS, model.args.vocab_size, seed=1)
    want = their_logits(twin(model, window), prompts)
    with torch.no_grad():
        assert distance(whole(model, prompts), want) < TOLERANCE
        assert distance(play(model, prompts, at_random(LENS, 1), make_cache(model, 4)), want) < TOLERANCE


def test_logprobs_are_transformers_far_out():
    model = tiny_model(tiny_args(), seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    want = their_logits(twin(model, 5), prompts, start=131_072)
    with torch.no_grad():
        got = play(model, prompts, at_random(LENS, 2), make_cache(model, 4, start=131_072))
    assert distance(got, want) < TOLERANCE


def test_their_own_cache_agrees_token_by_token():
    """Their decode with a sliding cache, against ours: the same window on both of their paths."""
    model = tiny_model(tiny_args(), seed=3)
    other = twin(model, 5)
    prompt = ragged([25], model.args.vocab_size, seed=3)[0]
    pieces, past = [], None
    with torch.no_grad():
        for token in prompt:
            out = other(token[None, None], past_key_values=past, use_cache=True)
            pieces.append(out.logits[0])
            past = out.past_key_values
        assert distance(whole(model, [prompt]), [torch.cat(pieces)]) < TOLERANCE


def test_their_window_counts_as_ours_does():
    """They honour W keys, the query's own included; W - 1, W + 1 and none all differ from it."""
    masking = pytest.importorskip("transformers.masking_utils")
    positions = torch.arange(30)
    for window in (1, 2, 5, 29, 30):
        theirs = masking.sliding_window_causal_mask_function(window)
        dense = torch.tensor([[bool(theirs(0, 0, q, k)) for k in positions] for q in positions])
        assert torch.equal(dense, visible(positions, positions, window))
    model = tiny_model(tiny_args(), seed=4)
    prompts = ragged(LENS, model.args.vocab_size, seed=4)
    with torch.no_grad():
        ours = whole(model, prompts)
    for window in (4, 6, None):
        assert distance(ours, their_logits(twin(model, window), prompts)) > 1e-3


def test_rows_that_are_not_permuted_show():
    model = tiny_model(tiny_args(), seed=5)
    prompts = ragged(LENS, model.args.vocab_size, seed=5)
    with torch.no_grad():
        assert distance(whole(model, prompts), their_logits(twin(model, 5, permute=False), prompts)) > 1e-3


def test_the_permutation_comes_back():
    w = torch.arange(4 * 8 * 3).view(32, 3)
    back = halves(w, 4, 8).view(4, 2, 4, 3).transpose(1, 2).reshape(32, 3)
    assert torch.equal(back, w)
    assert not torch.equal(halves(w, 4, 8), w)
    # Row 2i of a head goes to row i, row 2i + 1 to row i + D/2.
    assert torch.equal(halves(w, 4, 8)[:8], w[:8][[0, 2, 4, 6, 1, 3, 5, 7]])
