"""Captured decode steps: what is replayed equals the plain step. Here a replay runs the same function again on a CPU;
tests/fast/test_cuda.py does it by graphs."""

from __future__ import annotations

import pytest
import torch

from mistral import quant
from mistral.attention import eager, tiled
from mistral.cache import RollingBufferCache
from mistral.fast.cuda_graph import LEAST, CudaGraphTransformer, _layer, bucket
from mistral.loader import runtime
from mistral.loader.options import LoadOptions, OptionError
from mistral.parameters import parameters
from tests.support.tiny import (
    POISON,
    TOLERANCE,
    at_random,
    distance,
    in_chunks,
    make_cache,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
)

LENS = [23, 40, 1, 9]
WINDOWS = [5, 1, None, (None, 5), (17, 3)]


class Replayed(CudaGraphTransformer):
    """Captures by remembering the function; counts what was captured and replayed."""

    devices = ("cpu",)
    layer = staticmethod(lambda: _layer)
    captures = replays = 0

    @staticmethod
    def record(run):
        Replayed.captures += 1
        with torch.inference_mode(False), torch.no_grad():
            result = run().clone()

        def replay():
            Replayed.replays += 1
            result.copy_(run())

        return replay, result


def twin(model) -> Replayed:
    """The same weights in a model that replays."""
    with torch.device("meta"):
        other = Replayed(model.args)
    other.load_state_dict(model.state_dict(), assign=True)
    Replayed.captures = Replayed.replays = 0
    return other.eval()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_steps_equal_the_truth(window):
    model = tiny_model(tiny_args(n_layers=4, sliding_window=window), seed=1)
    prompts = ragged(LENS, model.args.vocab_size, seed=1)
    want = true_logprobs(model, prompts)
    other = twin(model)
    with torch.no_grad():
        for schedule in (prefill_then_decode(LENS, 20), in_chunks(LENS, 1), at_random(LENS, 5)):
            cache = make_cache(other, len(LENS), positions=max(LENS))
            assert distance(play(other, prompts, schedule, cache), want) < TOLERANCE
    assert Replayed.replays > 60
    assert Replayed.captures == 3  # one a cache: the bucket is the same


def test_rows_that_bring_nothing_keep_what_they_hold():
    """Also the key at the slot that comes next, to which a rewound sequence may go back."""
    model = tiny_model(tiny_args(sliding_window=3), seed=2)
    other = twin(model)
    with torch.no_grad():
        cache = make_cache(other, 2, positions=30)
        other.forward(torch.arange(1, 25), [12, 12], cache)
        before = [(layer.k[0].clone(), layer.v[0].clone()) for layer in cache.layers]
        for token in range(5):
            other.forward(torch.tensor([token]), [0, 1], cache)
    assert Replayed.replays == 5
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.k[0], k)
        assert torch.equal(layer.v[0], v)


def test_storage_that_grows_and_weights_that_change_are_captured_anew():
    model = tiny_model(tiny_args(sliding_window=None), seed=3)
    other = twin(model)
    prompt = ragged([LEAST + 40], model.args.vocab_size, seed=3)
    want = true_logprobs(model, prompt)
    with torch.no_grad():
        cache = RollingBufferCache(model.args, 1)
        assert distance(play(other, prompt, prefill_then_decode([LEAST + 40], 60), cache), want) < TOLERANCE
        assert Replayed.captures == 2
        changed = tiny_model(model.args, seed=4)
        other.load_state_dict(changed.state_dict(), assign=True)
        cache = RollingBufferCache(model.args, 1)
        want = true_logprobs(changed, prompt)
        assert distance(play(other, prompt, prefill_then_decode([LEAST + 40], 60), cache), want) < TOLERANCE


def test_a_layer_whose_weights_are_replaced():
    model = tiny_model(tiny_args(), seed=3)
    other = twin(model)
    cache = make_cache(other, 1)
    with torch.no_grad():
        other.forward(torch.tensor([1]), [1], cache)
        linear = other.layers[1].feed_forward.w2
        linear.weight = torch.nn.Parameter(linear.weight * 2)
        other.forward(torch.tensor([1]), [1], cache)
    assert Replayed.captures == 2


def test_a_cache_that_is_used_in_and_out_of_inference_mode():
    model = tiny_model(tiny_args(), seed=3)
    other = twin(model)
    cache = make_cache(other, 1)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            other.forward(torch.tensor([1]), [1], cache)
    assert Replayed.captures == 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.long
def test_a_layer_is_compiled_whole_and_once_for_all(bits, monkeypatch):
    """Traced by PyTorch's compiler and run without its code: whatever changes from bucket to bucket does so once."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = torch.compile(_layer, fullgraph=True, backend=backend)
    monkeypatch.setattr(Replayed, "layer", staticmethod(lambda: layer))
    lens = [LEAST * 4 + 9, 20]
    model = tiny_model(tiny_args(n_layers=5, sliding_window=None), seed=4)
    prompts = ragged(lens, model.args.vocab_size, seed=4)
    other = twin(model)
    if bits:
        state, expected = model.state_dict(), parameters(model.args)
        there = {
            n: quant.on_gpu(quant.quantize(p, state[n], bits), torch.device("cpu"))
            for n, p in expected.items()
            if p.quantized
        }
        quant.put_quantized(other, there)
        model.load_state_dict({n: module.rows(0, module.out_features) for n, module in there.items()}, strict=False)
    want = true_logprobs(model, prompts)
    with torch.no_grad():
        for buckets in (60, LEAST * 3):
            got = play(other, prompts, prefill_then_decode(lens, buckets), RollingBufferCache(model.args, 2))
            assert distance(got, want) < TOLERANCE
    assert Replayed.captures > 3
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_two_models_and_two_caches_do_not_mix():
    a, b = (tiny_model(tiny_args(), seed=seed) for seed in (5, 6))
    prompts = ragged(LENS, a.args.vocab_size, seed=5)
    first, second = twin(a), twin(b)
    with torch.no_grad():
        for model, other in ((a, first), (b, second), (a, first)):
            cache = make_cache(other, len(LENS))
            got = play(other, prompts, prefill_then_decode(LENS, 9), cache)
            assert distance(got, true_logprobs(model, prompts)) < TOLERANCE


def test_a_cache_that_begins_further_on():
    model = tiny_model(tiny_args(), seed=7)
    prompts = ragged(LENS, model.args.vocab_size, seed=7)
    other = twin(model)
    with torch.no_grad():
        cache = make_cache(other, len(LENS), start=100_000)
        got = play(other, prompts, in_chunks(LENS, 1), cache)
    assert distance(got, true_logprobs(model, prompts, 100_000)) < TOLERANCE


def test_what_is_not_replayed():
    model = tiny_model(tiny_args(), seed=8)
    other = twin(model)
    ids = torch.tensor([1, 2, 3])
    cache = make_cache(other, 1)
    with torch.no_grad():
        assert torch.equal(other.forward(ids, [3]), model.forward(ids, [3]))
        other.forward(ids, [3], cache)
    other.forward(ids[:1], [1], cache)  # gradients are asked for
    assert Replayed.replays == 0
    with torch.no_grad():
        real = CudaGraphTransformer(model.args)
        real.forward(ids[:1], [1], RollingBufferCache(model.args, 1))  # a CPU
    assert Replayed.captures == 0


def test_a_step_that_breaks_off_leaves_a_cache_that_says_so(monkeypatch):
    model = tiny_model(tiny_args(), seed=9)
    other = twin(model)
    cache = make_cache(other, 1)

    def broken(run):
        return lambda: (_ for _ in ()).throw(RuntimeError("out of memory")), run()

    monkeypatch.setattr(Replayed, "record", staticmethod(broken))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="out of memory"):
            other.forward(torch.tensor([1]), [1], cache)
        with pytest.raises(ValueError, match="did not finish"):
            other.forward(torch.tensor([1]), [1], cache)


def test_the_backend_comes_back_after_a_capture():
    model = tiny_model(tiny_args(), seed=9)
    other = twin(model)
    attend = tiled(eager)
    for layer in other.layers:
        layer.attention.attend = attend
    with torch.no_grad():
        other.forward(torch.tensor([1]), [1], make_cache(other, 1))
    assert all(layer.attention.attend is attend for layer in other.layers)


def test_poison_is_never_read():
    model = tiny_model(tiny_args(sliding_window=7), seed=10)
    other = twin(model)
    with torch.no_grad():
        cache = make_cache(other, 3, positions=600)
        assert float(cache.layers[0].k.max()) == POISON
        h = other.forward_partial(torch.tensor([1, 2]), [1, 0, 1], cache)
    assert h.abs().max() < 100


def test_buckets():
    def at(*starts):
        cache = RollingBufferCache(tiny_args(), len(starts))
        cache.lengths = list(starts)
        return bucket(cache.plan([1] * len(starts)))

    assert [at(0), at(LEAST - 1), at(LEAST), at(1000, 3)] == [LEAST, LEAST, 2 * LEAST, 1024]


def test_it_is_asked_for_on_cuda_alone(monkeypatch):
    facts = {"stored": torch.float32, "called": "float32", "parameters": 1, "head_dim": 8}
    with pytest.raises(OptionError, match="cuda_graph is for CUDA, not for cpu"):
        runtime.resolve(LoadOptions(device="cpu", dtype="float16", execution="cuda_graph"), **facts)
    monkeypatch.setattr(runtime, "pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(runtime, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(runtime.memory, "available", lambda device: None)
    monkeypatch.setattr(runtime.backends, "resolve", lambda *_: ("sdpa", tiled(eager)))
    assert runtime.resolve(LoadOptions(device="cuda", execution="cuda_graph"), **facts).execution == "cuda_graph"
    assert runtime.resolve(LoadOptions(device="cuda"), **facts).execution == "eager"
