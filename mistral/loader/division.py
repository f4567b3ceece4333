"""What `load` asks of a division of a model among processes. The one that there is: `parallel.shard`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from mistral.args import ModelArgs
    from mistral.formats.folder import Folder
    from mistral.loader.options import LoadOptions
    from mistral.model import Transformer


class Division(Protocol):
    """The part of a model that this process has, and how the parts work together.

    Attributes:
        unknown: name and class of a module of every such model that no fast path knows.
    """

    unknown: ClassVar[str]

    def notes(self, args: ModelArgs, quant: str | None) -> tuple[str, ...]:
        """Sentences on it for people: `args` is the whole model's shape, `quant` what its weights are rounded to."""

    def options(self, found: Folder, options: LoadOptions) -> LoadOptions:
        """The options of this process: those given, on a device of its own.

        Raises:
            OptionError: names what cannot be divided.
        """

    def part(self, found: Folder) -> Folder:
        """A folder whose shape is that of this process's part, and whose readers read nothing else."""

    def shape(self, model: Transformer) -> None:
        """Give a model on the meta device, made for the part's shape, what the shape does not say."""

    def connect(self, model: Transformer) -> None:
        """Have a model that has its weights compute with the other processes."""
