"""How an engine for a batch is made, on this machine or another. Runs without torch, until one is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistral.loader.options import LoadOptions

if TYPE_CHECKING:
    from mistral.batch.engine import LocalEngine
    from mistral.loader.load import Loaded


@dataclass(frozen=True)
class EngineSettings:
    """How to make an engine.

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

    def make(self, loaded: Loaded | None = None) -> LocalEngine:
        """The engine; `loaded` is the model where it is loaded already."""
        from mistral.batch.engine import LocalEngine
        from mistral.loader.load import load
        from mistral.serve.settings import served_of

        if loaded is None:
            loaded = load(self.folder, options=replace(self.options, max_batch_size=self.rows))
        served = served_of(loaded, rows=self.rows, most=self.most, name=self.name, template=self.template)
        return LocalEngine(loaded, served, rows=self.rows, chunk_size=self.chunk_size)
