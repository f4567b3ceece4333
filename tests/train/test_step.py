"""The gradient of a packed batch: against plain autograd, whatever is beside, however it is split or recomputed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.args import Moe
from mistral.attention import eager, tiled
from mistral.cache import NoCache
from mistral.model import FeedForward, RMSNorm, Transformer
from mistral.rope import Rope, rotate
from mistral.train import step
from mistral.train.attention import shared_masks
from mistral.train.frugal import _feed_forward, _norm, _Rotation, use
from mistral.train.needs import activations
from mistral.train.options import RECOMPUTE
from mistral.train.recompute import recompute
from mistral.train.step import Batch, add_gradients, nats_of
from tests.support.tiny import ragged, tiny_args, tiny_model

IDS = ragged([11], 61)[0]
LENS = (11, 3, 11, 1, 17)  # longer than the window, and two alike


def make_model(what: str = "none", attend: object = shared_masks, **changes: object) -> Transformer:
    model = tiny_model(tiny_args(**changes))
    for layer in model.layers:
        layer.attention.attend = attend
    recompute(model, what, False)
    return model


def make_batch(lens: Sequence[int] = LENS, seed: int = 0, vocab_size: int = 61) -> Batch:
    ids, targets = (torch.cat(ragged(lens, vocab_size, seed + i)) for i in range(2))
    weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed))
    weights[::3] = 0
    return Batch(ids, tuple(lens), targets, weights)


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def after(model: Transformer, *batches: Batch, total: float | None = None) -> dict[str, Tensor]:
    total = sum(batch.total for batch in batches) if total is None else total
    for batch in batches:
        add_gradients(model, batch, total)
    return gradients(model)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    assert a.keys() == b.keys()
    assert a
    largest = max(t.abs().max().item() for t in b.values())
    assert largest > 1e-3  # there is something to compare
    return max((a[name] - b[name]).abs().max().item() for name in a) <= tolerance * largest


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"sliding_window": None}], ids=str)
def test_it_is_the_gradient_of_the_mean_loss(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the library's eager attention, all logits at once, and PyTorch's cross entropy."""
    monkeypatch.setattr(step, "LOGITS", 17 * 61)  # several parts
    batch = make_batch()
    got = after(make_model(**changes), batch)
    model = make_model(attend=tiled(eager), **changes)
    nll = F.cross_entropy(model.forward(batch.ids, batch.seqlens), batch.targets, reduction="none")
    loss = (nll * batch.weights).sum() / batch.weights.sum()
    loss.backward()
    assert close(got, gradients(model), 1e-5)
    assert nats_of(model, batch) / batch.total == pytest.approx(loss.item(), rel=1e-6)


def test_the_loss_of_a_large_vocabulary_is_as_exact_as_pytorchs() -> None:
    """Against float64, in which fp32 of PyTorch's own cross entropy is further away."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 50_000, generator=generator) * 3
    targets = torch.randint(0, 50_000, (20,), generator=generator)
    weights = torch.rand(20, generator=generator)
    found = []
    for like in (logits.double(), logits):
        leaf = like.clone().requires_grad_()
        nll = F.cross_entropy(leaf, targets, reduction="none")
        found.append(((nll * weights).sum().item(), *torch.autograd.grad((nll * weights).sum(), leaf)))
    (want, truth), (theirs, grad) = found
    ours, mine = step._loss_and_gradient(logits.clone(), targets, weights)
    assert abs(ours - want) <= max(abs(theirs - want), 1e-6 * want)
    assert (mine - truth).norm() < (grad - truth).norm() < 1e-5 * truth.norm()
    broken, _ = step._loss_and_gradient(torch.full((1, 9), float("nan")), targets[:1] % 9, weights[:1])
    assert broken != broken


def test_a_neighbour_in_the_row_changes_no_gradient() -> None:
    """With other neighbours, whose predictions do not count, the gradient of a sequence is what it is alone."""
    alone = make_batch((11,), seed=3)
    found = []
    for seed in (5, 6):
        before, behind = make_batch((7,), seed), make_batch((11, 4), seed + 10)
        parts = [before, alone, behind]
        weights = torch.cat([torch.zeros(7), alone.weights, torch.zeros(15)])
        ids, targets = torch.cat([b.ids for b in parts]), torch.cat([b.targets for b in parts])
        found.append(after(make_model(), Batch(ids, (7, 11, 11, 4), targets, weights)))
    assert close(found[0], found[1], 1e-6)
    assert close(found[0], after(make_model(), alone), 1e-5)


def test_accumulated_batches_have_the_gradient_of_one_large_batch() -> None:
    """Weighted by tokens: the batches have very different numbers of them."""
    one, two = make_batch((17, 11), seed=1), make_batch((2,), seed=2)
    large = Batch(
        torch.cat([one.ids, two.ids]),
        (*one.seqlens, *two.seqlens),
        torch.cat([one.targets, two.targets]),
        torch.cat([one.weights, two.weights]),
    )
    assert close(after(make_model(), one, two), after(make_model(), large), 1e-5)


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"moe": Moe(4, 2)}], ids=str)
def test_recomputing_changes_no_gradient(changes: dict[str, object]) -> None:
    kept, cheap, layers = (after(make_model(what, **changes), make_batch()) for what in RECOMPUTE)
    assert close(cheap, kept, 1e-5)
    assert all(torch.equal(cheap[name], layers[name]) for name in cheap)
    ours, theirs = (make_model(what, **changes).forward(IDS, [len(IDS)]) for what in ("cheap", "none"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_the_ends_are_added_in_place(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of embeddings and output, several times a step: no second one of their size is there."""
    monkeypatch.setattr(step, "LOGITS", 17 * 61)  # several parts
    model, plain = (make_model(what, tied_embeddings=tied) for what in ("cheap", "none"))
    batches = make_batch(seed=1), make_batch((2, 2), seed=2)
    made = []  # gradients that autograd would add
    for end in (model.tok_embeddings.weight, model.output.weight):
        end.register_hook(made.append)
    assert close(after(model, *batches, total=3.0), after(plain, *batches, total=3.0), 1e-5)
    assert all(grad is None for grad in made)


def test_a_rotation_is_turned_back() -> None:
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.rand(5, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    cos, sin = Rope(tiny_args()).cos_sin(torch.arange(5) * 7)
    found = []
    for turn in (rotate, _Rotation.apply):
        leaf = x.clone().requires_grad_()
        out = turn(leaf, cos, sin)
        found.append((out.detach(), *torch.autograd.grad((out * up).sum(), leaf)))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_norms_and_gates_have_the_gradients_of_their_operations(dtype: torch.dtype) -> None:
    args = tiny_args()
    for module, x in (
        (RMSNorm(24, 1e-5), torch.rand(7, 24) * 3 - 1),
        (FeedForward(args), torch.rand(7, 24) - 0.5),
    ):
        module.to(dtype)
        if isinstance(module, RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        other = copy.deepcopy(module)
        use(other, partial(_norm if isinstance(other, RMSNorm) else _feed_forward, other))
        found = []
        for one in (module, other):
            leaf = x.to(dtype).requires_grad_()
            cotangent = torch.linspace(-1, 1, 7 * 24).view(7, 24).to(dtype)
            grads = torch.autograd.grad((one(leaf) * cotangent).sum(), [leaf, *one.parameters()])
            found.append([one(leaf), *grads])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            assert (a - b).abs().max() <= (1e-12 if dtype == torch.float64 else 0.05) * a.abs().max()


def test_what_a_gate_gave_is_not_kept() -> None:
    """w2 multiplies it, and its gradient has the same bits without."""
    args = tiny_args(hidden_dim=400)
    x, part = torch.rand(50, 24), FeedForward(args)
    found = []
    for again in (False, True):
        held: list[Tensor] = []

        def keep(tensor: Tensor, held: list[Tensor] = held) -> Tensor:
            held.append(tensor)
            return tensor

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = _feed_forward(part, leaf, again=again)
        gated = sum(t.shape == (50, 400) for t in held)
        assert gated == (2 if again else 3)
        found.append(torch.autograd.grad(out.square().sum(), [leaf, *part.parameters()]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("what", "share"), [("cheap", 0.85), ("layers", 0.2)])
def test_recomputing_keeps_less(what: str, share: float) -> None:
    assert kept_bytes(make_model(what)) < share * kept_bytes(make_model())


def kept_bytes(model: Transformer, batch: Batch | None = None) -> int:
    """Bytes that a forward keeps for its gradient, but for weights."""
    batch = make_batch() if batch is None else batch
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no other takes its place
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.forward_partial(batch.ids, batch.seqlens)
    return sum(seen.values())


@pytest.mark.parametrize("what", RECOMPUTE)
def test_what_is_kept_was_foreseen(what: str) -> None:
    """The estimate that refuses a run is no less than what is kept, and not twice as much."""
    args = tiny_args(dim=64, n_layers=6, hidden_dim=160, n_heads=8, head_dim=16, sliding_window=30)
    batch = make_batch((90, 60, 50))
    model = tiny_model(args)
    for layer in model.layers:
        layer.attention.attend = shared_masks
    recompute(model, what, False)
    foreseen = 4 * 200 * activations(args, what)
    # "layers" keeps little, and beside it a whole layer's while its gradient is computed.
    assert 1 <= foreseen / kept_bytes(model, batch) < (8 if what == "layers" else 1.6)


@given(
    lens=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 24)),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
)
def test_attention_is_that_of_the_library(lens: list[int], window: int | None, heads: tuple[int, int]) -> None:
    H, K = heads
    args = tiny_args(sliding_window=window, n_heads=H, n_kv_heads=K)
    generator = torch.Generator().manual_seed(sum(lens))
    wide = {"generator": generator, "dtype": torch.float64}
    q, k, v = (torch.rand(sum(lens), n, 8, **wide).requires_grad_() for n in (H, K, K))
    cotangent = torch.rand(sum(lens), H, 8, **wide)
    found = []
    for attend in (shared_masks, tiled(eager)):
        keys = NoCache(args, "cpu")
        plan = keys.plan(lens)
        out = attend(q, k, v, keys.layer(0), plan)
        found.append((out, *torch.autograd.grad((out * cotangent).sum(), (q, k, v))))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-12


def test_attention_over_many_tiles_shares_its_masks() -> None:
    """Beyond the window all tiles of all layers have one mask: the memory is linear in the length."""
    args = tiny_args(sliding_window=130)
    keys = NoCache(args, "cpu")
    plan = keys.plan([1000])
    q, k, v = (torch.rand(1000, n, 8) for n in (4, 2, 2))
    ours = shared_masks(q, k, v, keys.layer(0), plan)
    assert (ours - tiled(eager)(q, k, v, keys.layer(0), keys.plan([1000]))).abs().max() < 2e-6
    assert len(plan.memo) == 4  # two tiles while the window fills, the others, and the last, which is shorter


def test_bf16_arithmetic_has_fp32_gradients() -> None:
    model = make_model("cheap")
    model.compute_dtype = torch.bfloat16
    got = after(model, make_batch())
    assert {g.dtype for g in got.values()} == {torch.float32}
    assert close(got, after(make_model(), make_batch()), 0.1)
