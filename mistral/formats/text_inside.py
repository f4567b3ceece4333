"""The text model inside of one that reads images too, as Hugging Face's layout has it: its config, its names.

Runs without torch.
"""

from __future__ import annotations

import re
from typing import Any

from mistral.formats.layout import ParamsError
from mistral.formats.weights import WeightFiles, WeightsError, file_names, renamed

SEES = "mistral3"  # the model_type of the whole
# Keys of the whole that describe what is left aside, or are looked at here.
SEEING = (
    *("image_token_index", "image_token_id", "multimodal_projector_bias", "projector_hidden_act"),
    *("spatial_merge_size", "text_config", "vision_config", "vision_feature_layer", "model_type"),
)
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model: the one inside, where the model reads images as well; else the one given.

    Raises:
        ParamsError: none is inside, or the two contradict each other.
    """
    if raw.get("model_type") != SEES:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ParamsError("config.json is of type mistral3, but has no text_config")
    # What is outside and is neither known nor the image part's is refused as if it were inside.
    outside = {key: value for key, value in raw.items() if key not in SEEING}
    text = {"model_type": "mistral"} | text
    # Where they differ transformers goes by the outer one; left out there it is true. `folder` sees what is stored.
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return {**outside, **text, "tie_word_embeddings": tied}


# The text model inside of one that reads images: in files, and in memory since transformers 5.
INSIDE = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def alone(name: str) -> str:
    """The name that a tensor or module of the text model has where there is nothing around it."""
    return next((name.replace(was, now, 1) for was, now in INSIDE if name.startswith(was)), name)


def text_names(weights: WeightFiles) -> WeightFiles:
    """Weights whose text model is inside another model, under the names that it has alone."""
    found = renamed(weights, alone)
    if len(found.tensors) < len(weights.tensors):
        raise WeightsError(f"the weights in {file_names(weights.files)} hold a text model twice")
    return found
