"""Parcels shown flat: the signature, the calls, and help texts from docstrings."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

from mistral.loader.options import LoadOptions, OptionError
from mistral.sampling_params import SamplingError, SamplingParams
from mistral.util.flat import field_help, flat


@flat(params=SamplingParams(max_tokens=35), options=LoadOptions())
def demo(folder: str | None = None, *, loud: bool = False, params: SamplingParams, options: LoadOptions) -> tuple:
    return folder, loud, params, options


def test_the_signature_has_the_fields_and_the_defaults_given() -> None:
    shown = inspect.signature(demo).parameters
    assert list(shown)[:3] == ["folder", "loud", "max_tokens"]
    assert shown["max_tokens"].default == 35
    assert shown["top_p"].default == SamplingParams().top_p
    assert "params" not in shown
    assert "options" not in shown


def test_calls_by_field_and_by_parcel() -> None:
    assert demo() == (None, False, SamplingParams(max_tokens=35), LoadOptions())
    assert demo("x", temperature=0, device="cpu") == (
        "x",
        False,
        SamplingParams(max_tokens=35, temperature=0),
        LoadOptions(device="cpu"),
    )
    whole = SamplingParams(top_k=3)
    assert demo(params=whole)[2] is whole
    assert demo(params=whole, top_p=0.5)[2] == SamplingParams(top_k=3, top_p=0.5)
    with pytest.raises(TypeError, match="tempurature"):
        demo(tempurature=1)


@pytest.mark.parametrize("kind", [SamplingParams, LoadOptions])
def test_every_field_has_help(kind: type) -> None:
    told = field_help(kind)
    assert list(told) == list(kind.__dataclass_fields__)
    assert all(text and "\n" not in text and len(text) < 100 for text in told.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"max_tokens": True},
        {"stop": ("",)},
        {"stop": (1,)},
        {"seed": "1"},
    ],
)
def test_sampling_is_checked_on_construction(wrong: dict) -> None:
    with pytest.raises(SamplingError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("wrong", [{"execution": "fast"}, {"threads": 0}, {"threads": 2.0}, {"max_batch_size": -1}])
def test_options_are_checked_on_construction(wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        LoadOptions(**wrong)


def test_parcels_are_frozen_and_pickle() -> None:
    for parcel in (SamplingParams(stop="x", seed=3), LoadOptions(device=torch.device("cpu"), dtype=torch.bfloat16)):
        assert pickle.loads(pickle.dumps(parcel)) == parcel
        with pytest.raises(AttributeError):
            parcel.seed = 1
    assert LoadOptions(dtype=torch.bfloat16) == LoadOptions(dtype="bfloat16")
    assert SamplingParams(stop="x").stop == ("x",)
