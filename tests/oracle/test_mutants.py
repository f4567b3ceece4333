"""Mutants: each must move log-probs away from the truth, or the tests above it prove nothing.

Each plant changes one thing in the library (by monkeypatch) or in the weights, then runs the
scenarios below; the largest error must be far above the tolerance, and far below it without a plant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mistral.attention
import mistral.cache
import mistral.model
from mistral.plan import Run, make_plan
from mistral.rope import Rope
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    in_chunks,
    largest,
    make_cache,
    play,
    poison_rows,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
    whole,
)

SHOWS = 1e-4
FAR = 9_000_001  # where the rounding of an fp32 angle is large enough to see
LENS = [1, 23, 40, 9]

# A hidden width equal to dim, so that w2 and w3 can be swapped; an eps large enough to matter.
ARGS = tiny_args(hidden_dim=24, sliding_window=5, rope_theta=1e6, norm_eps=1e-2)
FULL = dataclasses.replace(ARGS, sliding_window=(None, 5))

State = dict[str, Tensor]


def scenarios(damage: Callable[[State], State] | None = None) -> dict[str, float]:
    """Error against the truth in each way of running the model. Weights are damaged after the truth saw them."""
    errors: dict[str, float] = {}
    with torch.no_grad():
        for name, args in (("window", ARGS), ("full", FULL)):
            # The truth never sees the plant: it reads weights and args only.
            model = tiny_model(args, seed=1)
            prompts = ragged(LENS, args.vocab_size, seed=1)
            want, far = true_logprobs(model, prompts), true_logprobs(model, prompts, FAR)
            if damage:
                model.load_state_dict(damage({k: v.clone() for k, v in model.state_dict().items()}))
            errors[f"{name}, no cache"] = distance(whole(model, prompts), want)
            cache = make_cache(model, len(LENS), positions=max(LENS))
            errors[f"{name}, chunks"] = distance(play(model, prompts, in_chunks(LENS, 7), cache), want)
            cache = make_cache(model, len(LENS), positions=max(LENS))
            errors[f"{name}, ragged"] = distance(play(model, prompts, at_random(LENS, 3), cache), want)
            cache = make_cache(model, len(LENS), positions=max(LENS))
            errors[f"{name}, decode"] = distance(play(model, prompts, prefill_then_decode(LENS, 6), cache), want)
            cache.reset(position=FAR)
            poison_rows(cache)
            errors[f"{name}, reset far out"] = distance(play(model, prompts, at_random(LENS, 4), cache), far)
        errors["norm in bf16"] = bf16_norm()
    return errors


def bf16_norm() -> float:
    x = torch.linspace(-3, 3, 640).view(20, 32).bfloat16()
    weight = torch.linspace(0.5, 1.5, 32).bfloat16()
    norm = mistral.model.RMSNorm(32, 1e-5).bfloat16()
    norm.weight.copy_(weight)
    wide = x.float()
    want = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).bfloat16() * weight
    return largest((norm(x) - want).double().numpy())


# Each plant is a function of monkeypatch, named for what it breaks.


def patched_visible(patch, change):
    right = mistral.window.visible
    patch.setattr(mistral.attention, "visible", lambda q, k, window: change(right, q, k, window))


def window_one_more(patch):
    patched_visible(patch, lambda right, q, k, w: right(q, k, w and w + 1))


def window_one_less(patch):
    patched_visible(patch, lambda right, q, k, w: right(q, k, w and w - 1))


def no_window(patch):
    """Every layer sees everything, and keeps everything."""
    windows = property(lambda args: (None,) * args.n_layers)
    patch.setattr(mistral.args.ModelArgs, "windows", windows)


def mask_without_window(patch):
    """Only the mask forgets the window; what is offered is still bounded by the buffer."""
    patched_visible(patch, lambda right, q, k, w: right(q, k, None))


def one_window_for_all_layers(patch):
    windows = property(lambda args: (5,) * args.n_layers)
    patch.setattr(mistral.args.ModelArgs, "windows", windows)


def not_causal(patch):
    patched_visible(
        patch, lambda right, q, k, w: (k[..., None, :] >= 0) & (q[..., :, None] - k[..., None, :] < (w or 99))
    )


def self_not_seen(patch):
    patched_visible(patch, lambda right, q, k, w: right(q - 1, k, w))


def theta_ignored(patch):
    right = mistral.rope.inverse_frequencies
    patch.setattr(mistral.rope, "inverse_frequencies", lambda head_dim, theta: right(head_dim, 1e4))


def frequencies_of_the_full_dim(patch):
    def inverse_frequencies(head_dim, theta):
        return 1.0 / theta ** (torch.arange(0, head_dim // 2, device="cpu").float() / head_dim)

    patch.setattr(mistral.rope, "inverse_frequencies", inverse_frequencies)


def halves_turn_instead_of_pairs(patch):
    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    patch.setattr(mistral.model, "rotate", rotate)


def no_rotation(patch):
    patch.setattr(mistral.model, "rotate", lambda x, cos, sin: x)


def positions_begin_anew_each_step(patch):
    right = Rope.cos_sin
    patch.setattr(Rope, "cos_sin", lambda self, p: right(self, torch.arange(len(p))))


def sequences_leak(patch):
    """All packed sequences are one run of one row: a mask by position alone lets them see each other."""

    def leaky(seqlens, starts, origins, device):
        plan = make_plan(seqlens, starts, origins, device)
        n = sum(seqlens)
        return dataclasses.replace(plan, runs=(Run(slice(0, 1), slice(0, n), n),)) if n else plan

    patch.setattr(mistral.cache, "make_plan", leaky)


def eps_missing(patch):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight

    patch.setattr(mistral.model.RMSNorm, "forward", forward)


def eps_outside_the_root(patch):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    patch.setattr(mistral.model.RMSNorm, "forward", forward)


def mean_subtracted(patch):
    def forward(self, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight

    patch.setattr(mistral.model.RMSNorm, "forward", forward)


def norm_cast_after_the_weight(patch):
    def forward(self, x):
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.float()).to(x.dtype)

    patch.setattr(mistral.model.RMSNorm, "forward", forward)


def norm_in_bf16(patch):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    patch.setattr(mistral.model.RMSNorm, "forward", forward)


def patched_kernel(patch, change):
    right = mistral.model.sdpa
    patch.setattr(mistral.model, "sdpa", lambda q, k, v, mask: change(right, q, k, v, mask))


def no_scale(patch):
    patched_kernel(patch, lambda right, q, k, v, m: right(q * q.shape[-1] ** 0.5, k, v, m))


def scale_of_the_model_dim(patch):
    patched_kernel(patch, lambda right, q, k, v, m: right(q * (q.shape[-1] / ARGS.dim) ** 0.5, k, v, m))


def heads_share_by_remainder(patch):
    """Query head h reads key head h % K instead of h // G."""

    def interleaved(right, q, k, v, m):
        K, G = k.shape[2], q.shape[2] // k.shape[2]
        out = right(q.unflatten(2, (G, K)).transpose(2, 3).flatten(2, 3).contiguous(), k, v, m)
        return out.unflatten(2, (K, G)).transpose(2, 3).flatten(2, 3)

    patched_kernel(patch, interleaved)


def patched_tile(patch, change):
    right = mistral.cache.RollingBuffer.tile

    def tile(self, plan, run, start, stop):
        return change(self, plan, right(self, plan, run, start, stop))

    patch.setattr(mistral.cache.RollingBuffer, "tile", tile)


def slots_one_further(patch):
    patched_tile(patch, lambda s, _p, t: dataclasses.replace(t, slots=(t.slots + 1) % s.capacity))


def slot_positions_one_off(patch):
    patched_tile(patch, lambda _s, _p, t: dataclasses.replace(t, k_pos=torch.where(t.k_pos < 0, -1, t.k_pos + 1)))


def one_slot_too_few(patch):
    """W + block - 2 slots: a tile overwrites one key that its first query still sees."""
    right = mistral.cache.RollingBuffer.capacity_for
    patch.setattr(
        mistral.cache.RollingBuffer,
        "capacity_for",
        lambda s, n: right(s, n) if s.window is None else min(right(s, n), s.window + s.block - 2),
    )


def w_slots_for_tiles_of_any_size(patch):
    """A buffer of W slots that is written before it is read."""
    right = mistral.cache.RollingBuffer.capacity_for
    patch.setattr(
        mistral.cache.RollingBuffer,
        "capacity_for",
        lambda s, n: right(s, n) if s.window is None else min(n, s.window),
    )


def empty_slots_are_position_zero(patch):
    patched_tile(patch, lambda _s, _p, t: dataclasses.replace(t, k_pos=t.k_pos.clamp(min=0)))


def empty_slots_are_the_newest_key(patch):
    patched_tile(
        patch, lambda _s, _p, t: dataclasses.replace(t, k_pos=torch.where(t.k_pos < 0, t.q_pos[:, -1:], t.k_pos))
    )


def slots_before_the_origin_are_visible(patch):
    """After a reset to a later position, what the slots held before counts as held."""

    def tile(self, plan, t):
        last = t.q_pos[:, -1:]
        return dataclasses.replace(t, k_pos=last - (last - torch.arange(t.k_pos.shape[1])) % self.capacity)

    patched_tile(patch, tile)


def keys_stored_before_rotation(patch):
    """k goes in unrotated: only q turns."""
    calls = []

    def rotate(x, cos, sin):
        calls.append(1)
        return mistral.rope.rotate(x, cos, sin) if len(calls) % 2 else x

    patch.setattr(mistral.model, "rotate", rotate)


def values_rotated_too(patch):
    right = mistral.model.Attention.forward

    def forward(self, x, cos, sin, plan, store, *scales):
        plain = self.attend
        self.attend = lambda q, k, v, *rest: plain(q, k, mistral.rope.rotate(v, cos, sin), *rest)
        try:
            return right(self, x, cos, sin, plan, store, *scales)
        finally:
            self.attend = plain

    patch.setattr(mistral.model.Attention, "forward", forward)


def lengths_never_advance(patch):
    patch.setattr(mistral.cache.RollingBufferCache, "commit", lambda self, plan: self._settle())


def angles_in_bf16(patch):
    right = Rope.cos_sin
    patch.setattr(Rope, "cos_sin", lambda self, p: tuple(x.bfloat16().float() for x in right(self, p)))


def angles_in_double(patch):
    """More exact, and so another model far out: the released weights met fp32 angles."""

    def cos_sin(self, positions):
        angles = torch.outer(positions.double(), self.frequencies.double())
        return angles.cos().float(), angles.sin().float()

    patch.setattr(Rope, "cos_sin", cos_sin)


def table_of_positions_ends(patch):
    """A table of 128,000 positions, read at its last entry beyond."""
    right = Rope.cos_sin
    patch.setattr(Rope, "cos_sin", lambda self, p: right(self, p.clamp(max=127_999)))


def gelu_for_silu(patch):
    patch.setattr(mistral.model.F, "silu", torch.nn.functional.gelu)


def no_final_norm(patch):
    right = mistral.model.Transformer.__init__

    def init(self, *args, **kwargs):
        right(self, *args, **kwargs)
        self.norm.forward = lambda x: x

    patch.setattr(mistral.model.Transformer, "__init__", init)


def heads_of(name: str) -> int:
    return ARGS.n_heads if "wq" in name else ARGS.n_kv_heads


# Mistakes in the weights.


def halves(name: str, w: Tensor) -> Tensor:
    return w.view(heads_of(name), ARGS.head_dim // 2, 2, -1).transpose(1, 2).reshape(w.shape)


def permutation_missing(state: State) -> State:
    """q and k rows in Hugging Face's order."""
    return {n: halves(n, w) if n.endswith(("wq.weight", "wk.weight")) else w for n, w in state.items()}


def permutation_of_q_only(state: State) -> State:
    return {n: halves(n, w) if n.endswith("wq.weight") else w for n, w in state.items()}


def permutation_of_v_too(state: State) -> State:
    return {n: halves(n, w) if n.endswith("wv.weight") else w for n, w in state.items()}


def permutation_backwards(state: State) -> State:
    """Hugging Face to Mistral applied to rows that are Mistral's already."""

    def back(name: str, w: Tensor) -> Tensor:
        return w.view(heads_of(name), 2, ARGS.head_dim // 2, -1).transpose(1, 2).reshape(w.shape)

    return {n: back(n, w) if n.endswith(("wq.weight", "wk.weight")) else w for n, w in state.items()}


def swapped(state: State, a: str, b: str) -> State:
    names = {n: n.replace(a, "?").replace(b, a).replace("?", b) for n in state}
    return {n: state[names[n]] for n in state}


def w2_and_w3_swapped(state: State) -> State:
    return swapped(state, "w2", "w3")


def w1_and_w3_swapped(state: State) -> State:
    return swapped(state, "w1", "w3")


def norms_swapped(state: State) -> State:
    return swapped(state, "attention_norm", "ffn_norm")


def layers_swapped(state: State) -> State:
    return swapped(state, "layers.0", "layers.1")


def output_tied_to_embeddings(state: State) -> State:
    return {**state, "output.weight": state["tok_embeddings.weight"]}


IN_THE_CODE = [
    window_one_more,
    window_one_less,
    no_window,
    mask_without_window,
    one_window_for_all_layers,
    not_causal,
    self_not_seen,
    theta_ignored,
    frequencies_of_the_full_dim,
    halves_turn_instead_of_pairs,
    no_rotation,
    positions_begin_anew_each_step,
    sequences_leak,
    eps_missing,
    eps_outside_the_root,
    mean_subtracted,
    norm_cast_after_the_weight,
    norm_in_bf16,
    no_scale,
    scale_of_the_model_dim,
    heads_share_by_remainder,
    slots_one_further,
    slot_positions_one_off,
    one_slot_too_few,
    w_slots_for_tiles_of_any_size,
    empty_slots_are_position_zero,
    empty_slots_are_the_newest_key,
    slots_before_the_origin_are_visible,
    keys_stored_before_rotation,
    values_rotated_too,
    lengths_never_advance,
    angles_in_bf16,
    angles_in_double,
    table_of_positions_ends,
    gelu_for_silu,
    no_final_norm,
]
IN_THE_WEIGHTS = [
    permutation_missing,
    permutation_of_q_only,
    permutation_of_v_too,
    permutation_backwards,
    w2_and_w3_swapped,
    w1_and_w3_swapped,
    norms_swapped,
    layers_swapped,
    output_tied_to_embeddings,
]


def name_of(find_mutant: Callable) -> str:
    return find_mutant.__name__


def test_without_a_plant_nothing_shows():
    errors = scenarios()
    assert len(errors) == 11
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("plant", IN_THE_CODE, ids=name_of)
def test_a_mistake_in_the_code_shows(plant, monkeypatch):
    with monkeypatch.context() as patch:
        plant(patch)
        errors = scenarios()
    assert max(errors.values()) > SHOWS, errors


@pytest.mark.parametrize("plant", IN_THE_WEIGHTS, ids=name_of)
def test_a_mistake_in_the_weights_shows(plant):
    errors = scenarios(plant)
    assert max(errors.values()) > SHOWS, errors
