"""What else a folder may hold in the place of weights that are read here, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

ADAPTER = "give its base model, and the adapter with --adapter"
# A pattern for names of files, and what they are. The first that matches says most about the folder.
KINDS = {
    r"adapter_(model|config)\..*": f"a PEFT adapter, not a model: {ADAPTER}",
    r"lora\.safetensors": f"a LoRA adapter of mistral-finetune, not a model: {ADAPTER}",
    r".*\.gguf": "GGUF files: give the path of one of them",
    r"consolidated\.01\.pth?": ".pth files in several parts: download the folder, and give its path",
    r"weights(\.\d+)?\.npz": "MLX's weights.npz: convert it to safetensors first",
    r"(?!consolidated|model(-.*)?\.safetensors)(.*)\.safetensors": "a safetensors file under another "
    "name: rename it to one of these",
    r"zero_to_fp32\.py|global_step\d+|.*_model_states\.pt": "what DeepSpeed saves while it trains: run its "
    "zero_to_fp32.py, which writes the weights",
    r"pytorch_model_fsdp_\d+|.*\.distcp": "what FSDP saves while it trains: run accelerate merge-weights first",
    r"hf_model_\d+_\d+\.pt": "a .pt file of torchtune: have it write safetensors",
    r".*\.incomplete": "a download that did not end: fetch it again",
    r"tf_model\.h5|flax_model\.msgpack": "weights for TensorFlow or Flax: have transformers save them as safetensors",
    r"model_weights|.*\.nemo": "a checkpoint of NeMo: export it for transformers first",
    r".*\.(zip|tar|tgz|tar\.gz|7z)": "an archive: unpack it",
    r"(?!optimizer|scheduler|scaler|rng_state|training_args|consolidated)(.*)\.(pt|pth|ckpt)": "a file of torch.save "
    "under another name: if it holds a model's tensors by name and nothing else, rename it to one of these",
    r".*\.onnx": "ONNX files: give the folder that they were made from",
}
# A pattern for names of weights, and why a program that trains gives them such names.
WRAPPED = {
    r"base_model\.model\..*|.*\.base_layer\..*": "they were saved by PEFT, before they were merged: save what "
    "merge_and_unload() gives, or give the base and the adapter with --adapter",
    r"(score|classifier)(\.dense)?\.(weight|bias)": "they are a classifier's: there is no output over words to "
    "continue a text with; use transformers",
    r"(v_head|value_head)\..*": "they have the value head of reinforcement learning, as TRL saves it: load it with "
    "TRL, and save its pretrained_model",
    r"medusa_head\..*": "they have heads that guess several tokens ahead (Medusa): give the model that those were "
    "trained for",
    r".*\.(self_attn|mlp)\.[a-z_]+\.bias": "this model has no biases: use transformers or vLLM",
    r"embed_tokens\.weight": "they were saved from AutoModel, which has no output: save AutoModelForCausalLM's",
}

# What a folder that lacks this one weight may be.
OUTPUTS = {"lm_head.weight": '"tie_word_embeddings": true', "output.weight": '"tied_embeddings": true'}


def kind_of(names: Iterable[str]) -> str | None:
    """What a folder with files of these names holds; None if it is none of KINDS."""
    last = [name.rpartition("/")[2] for name in names]
    return next((what for pattern, what in KINDS.items() if any(re.fullmatch(pattern, n) for n in last)), None)


def wrapped(names: Iterable[str], lacking: Sequence[str] = ()) -> str:
    """What to do about names of weights that another program gave, or about those that are lacking, to go behind a
    message; "" if nothing is known."""
    if not (names := list(names)) and len(lacking) == 1 and lacking[0] in OUTPUTS:
        return f": if the output is the table of the embeddings, the file of the shape says {OUTPUTS[lacking[0]]}"
    known = next((what for name in names for pattern, what in WRAPPED.items() if re.fullmatch(pattern, name)), None)
    return "" if known is None else f": {known}"
