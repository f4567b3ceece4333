"""A batch job by Ray Data's own vLLM processor: engines of vLLM on the GPUs of a Ray cluster.

    python deploy/ray/vllm_processor.py requests.jsonl answers mistralai/Mistral-7B-Instruct-v0.3

The requests are in OpenAI's batch format, all for /v1/chat/completions; `answers` becomes a folder of JSON lines. The
engine's options are those of deploy/vllm/serve.sh, as keywords. Needs pip install 'ray[llm]', which pins a vLLM of its
own (0.29 for ray 2.60), and GPUs. Here only the configuration was checked, by Ray: there was no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

# What `python -m main deploy FOLDER --target vllm` gives, with underscores.
ENGINE = {
    "tokenizer_mode": "mistral",
    "config_format": "mistral",
    "load_format": "mistral",
    "dtype": "bfloat16",
    "max_model_len": 32768,
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": 0.9,
    "generation_config": "vllm",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop")


def configuration(model: str) -> Any:
    """How each engine is made."""
    from ray.data.llm import vLLMEngineProcessorConfig

    return vLLMEngineProcessorConfig(
        model_source=model, engine_kwargs=ENGINE, concurrency=1, batch_size=64, chat_template_stage=True
    )


def before(row: dict[str, Any]) -> dict[str, Any]:
    """A request as the processor takes it; what it would not pass on is refused."""
    body = {name: value for name, value in row["body"].items() if value is not None}
    unknown = body.keys() - {"model", "messages", *SAMPLING}
    if unknown:
        raise ValueError(f"{row['custom_id']} has {', '.join(sorted(unknown))}, which is not passed on")
    params = {name: body[name] for name in SAMPLING if name in body}
    return {"messages": body["messages"], "sampling_params": params}


def after(row: dict[str, Any]) -> dict[str, Any]:
    """A line of the output."""
    return {"custom_id": row["custom_id"], "text": row["generated_text"]}


def main(requests: str, answers: str, model: str) -> None:
    """Read, answer, write."""
    import ray
    from ray.data.llm import build_processor

    processor = build_processor(configuration(model), preprocess=before, postprocess=after)
    processor(ray.data.read_json(requests, lines=True)).write_json(answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
