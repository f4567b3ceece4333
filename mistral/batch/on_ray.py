"""Lines of a batch answered on a Ray cluster: actors with this library's own engine, fed by Ray Data.

Lines and answers travel as JSON. Ray is imported where it is asked for, and not before.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mistral.batch.job import Write
from mistral.batch.lines import Answered, Line
from mistral.loader.options import LoadOptions
from mistral.util.errors import Unavailable

if TYPE_CHECKING:
    from mistral.batch.engine import LocalEngine


@dataclass(frozen=True)
class EngineSettings:
    """How to make an engine, on this machine or another.

    Args:
        folder: the model; None: the bundled one.
        options: where and how it runs.
        rows: the most sequences in a step.
        most, name, template: see `serve.settings.served_of`.
        chunk_size: see `Engine`.
    """

    folder: str | None
    options: LoadOptions
    rows: int
    most: int | None = None
    name: str | None = None
    template: str | None = None
    chunk_size: int | None = None

    def make(self, loaded: Any = None) -> LocalEngine:
        """The engine; `loaded` is the model where it is loaded already."""
        from mistral.batch.engine import LocalEngine
        from mistral.loader.load import load
        from mistral.serve.settings import served_of

        if loaded is None:
            loaded = load(self.folder, options=replace(self.options, max_batch_size=self.rows))
        served = served_of(loaded, rows=self.rows, most=self.most, name=self.name, template=self.template)
        return LocalEngine(loaded, served, rows=self.rows, chunk_size=self.chunk_size)


class Actor:
    """One of the workers: an engine that answers the lines of a block together."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = settings.make()

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        answers: list[str] = []
        lines = (Line(**json.loads(text)) for text in block["line"])
        self._engine(lines, lambda answered: answers.append(json.dumps(asdict(answered))))
        return {"answered": answers}


class OnRay:
    """Answers lines on a cluster: that of RAY_ADDRESS, or one that is started on this machine.

    Args:
        settings: of each actor's engine.
        workers: how many actors.
    """

    def __init__(self, settings: EngineSettings, *, workers: int) -> None:
        self._settings, self._workers = settings, workers
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise Unavailable(f"--ray needs Ray ({error}): pip install 'ray[data]'") from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._ray = ray

    def __call__(self, lines: Iterator[Line], write: Write) -> None:
        """Answer all lines; see `job.Runner`. An actor that dies is replaced, and its blocks are answered again.

        Raises:
            Unavailable: no cluster, or one that cannot hold the actors.
        """
        todo = list(lines)
        if not todo:
            return
        ray = self._ray
        mine = not ray.is_initialized()
        if mine:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        try:
            for row in self._dataset(todo).iter_rows():
                write(Answered(**json.loads(row["answered"])))
        except ray.exceptions.RayError as error:
            raise Unavailable(f"Ray: {_first_line(error)}") from None
        finally:
            if mine:
                ray.shutdown()

    def _dataset(self, todo: Sequence[Line]) -> Any:
        data, context = self._ray.data, self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # Small blocks: each actor is busy to the end, and little is lost with one.
        blocks = max(1, math.ceil(len(todo) / (2 * self._settings.rows)))
        dataset = data.from_items([{"line": json.dumps(asdict(line))} for line in todo], override_num_blocks=blocks)
        options = self._settings.options
        return dataset.map_batches(
            Actor,
            fn_constructor_args=(self._settings,),
            batch_size=None,
            num_cpus=options.threads or 1,
            num_gpus=1 if (options.device or "").startswith("cuda") else 0,
            compute=data.ActorPoolStrategy(size=self._workers),
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
