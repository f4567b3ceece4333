"""A batch job by Ray Data's own HTTP processor: any server that speaks OpenAI's protocol, from a Ray cluster.

    python -m main serve --port 8000
    python deploy/ray/http_processor.py requests.jsonl answers http://127.0.0.1:8000/v1/completions

`answers` becomes a folder of JSON lines: custom_id, and the server's answer. The requests are in OpenAI's batch format,
all for the same path. Unlike `python -m main batch --ray` it starts from the beginning each time, and a request that
the server refuses ends the job. Needs pip install 'ray[data]' aiohttp; ray 2.60 was tried.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from ray.data.llm import HttpRequestProcessorConfig, build_processor


def main(requests: str, answers: str, url: str) -> None:
    """Read, ask, write."""
    config = HttpRequestProcessorConfig(url=url, headers={"Content-Type": "application/json"}, batch_size=8)

    def before(row: dict[str, Any]) -> dict[str, Any]:
        # Columns of a table hold null where a line has no such field.
        return {"payload": {name: value for name, value in row["body"].items() if value is not None}}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": row["custom_id"], "answer": row["http_response"]}

    processor = build_processor(config, preprocess=before, postprocess=after)
    processor(ray.data.read_json(requests, lines=True)).write_json(answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
