"""How an engine for a batch is made, on this machine or another. Runs without torch, until one is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.batch.output import OURS, Output
from mistral.loader.options import LoadOptions, adapter_names
from mistral.util.errors import UsageError

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

    @property
    def is_elsewhere(self) -> bool:
        """Whether the folder is not on this machine, nor on the hub."""
        from mistral.formats.hub import is_hub_id

        return self.folder is not None and not Path(self.folder).exists() and not is_hub_id(self.folder)

    def make(self, loaded: Loaded | None = None) -> LocalEngine:
        """The engine; `loaded` is the model where it is loaded already."""
        from mistral.batch.engine import LocalEngine
        from mistral.loader.load import load
        from mistral.serve.settings import served_of

        if loaded is None:
            loaded = load(self.folder, options=replace(self.options, max_batch_size=self.rows))
        served = served_of(loaded, rows=self.rows, most=self.most, name=self.name, template=self.template)
        mark = self.fingerprint(loaded.folder)
        return LocalEngine(loaded, served, rows=self.rows, chunk_size=self.chunk_size, fingerprint=mark)

    def fingerprint(self, folder: Path) -> str:
        """What answers are marked with: made of the model in `folder` and the adapters; see `formats.fingerprint`."""
        from mistral.formats.fingerprint import fingerprint

        places = adapter_names(self.options.adapter)
        if len(places) < 2:  # a single one is not asked for by its name
            whole = fingerprint(folder, next(iter(places.values()), None))
        else:
            parts = [fingerprint(folder), *(f"{name} {fingerprint(folder, places[name])}" for name in sorted(places))]
            whole = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return OURS + whole[:32]

    def require_same(self, output: Output, *, going_on: bool) -> None:
        """Refuse an output that another model has begun; the weights are not loaded for that.

        Args:
            going_on: whether more answers will be written, so that what requests call the model matters too.

        Raises:
            UsageError: it was another one.
        """
        if output.earlier.model is None:  # nothing has been answered
            return
        from mistral.formats.folder import BUNDLED
        from mistral.formats.hub import locate
        from mistral.serve.settings import model_name

        folder = BUNDLED if self.folder is None else locate(self.folder)
        before, called = output.earlier.fingerprint, self.name or model_name(folder)
        if before is not None and before != self.fingerprint(folder):
            raise UsageError(
                f"{output.path} has answers of another model, or with other adapters ({output.earlier.model}), than "
                f"{called} as it is now: give another output"
            )
        names = {called, *adapter_names(self.options.adapter)}
        if output.earlier.model not in names and (going_on or before is None):
            what = f"{output.path} has answers of {output.earlier.model}, and this is {called}"
            raise UsageError(f"{what}: give another output, or the name that it had with --name")
