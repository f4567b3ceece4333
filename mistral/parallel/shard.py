"""One rank's part of a model (tensor parallel, arXiv 1909.08053): what it holds, and where the ranks exchange numbers.

Rows of wq, wk, wv (by whole heads), w1, w3 and the output, and columns of wo and w2, are divided evenly; the experts
of a mixture each in the same way. A layer has two sums over all ranks: after wo, and after its feed-forward.
Embeddings, norms and routers are whole on every rank. `parameters(args)` says which is which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mistral.args import ModelArgs
from mistral.fast.layout import GROUP, ROWS, SUPER
from mistral.formats.folder import Folder
from mistral.formats.huggingface import reordered
from mistral.formats.mapped_tensors import Progress, touch
from mistral.formats.weights import Reader, WeightFiles
from mistral.linear import Linear
from mistral.loader.options import LoadOptions, OptionError
from mistral.loader.runtime import own_gpu
from mistral.parameters import Parameter, parameters
from mistral.quant.linear import QuantizedLinear

if TYPE_CHECKING:
    from mistral.model import Transformer


class Summed(nn.Module):
    """The sum over all ranks of what each makes of its part: [..., dim] to the same, equal bits on every rank."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x).contiguous()
        dist.all_reduce(y)
        return y


class Gathered(nn.Module):
    """The outputs of all ranks, one after the other: [..., in] to [..., out], equal bits on every rank."""

    def __init__(self, part: nn.Module, ranks: int) -> None:
        super().__init__()
        self.part, self.ranks = part, ranks

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x).contiguous()
        parts = [torch.empty_like(y) for _ in range(self.ranks)]
        dist.all_gather(parts, y)
        return torch.cat(parts, dim=-1)


class SomeRows(nn.Module):
    """Rows first .. first + n of a quantized product: [..., in] to [..., n]."""

    def __init__(self, whole: QuantizedLinear, first: int, n: int) -> None:
        super().__init__()
        begin = first // ROWS * ROWS  # rows are interleaved: whole blocks
        self.blocks = whole.part(begin, min(-(-(first + n) // ROWS) * ROWS, whole.out_features))
        self.skipped, self.n = first - begin, n

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).narrow(-1, self.skipped, self.n)


class FromFirst(nn.Module):
    """What the first rank computed. Two ranks need not round alike, and must not choose different experts."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        y = self.whole(x).contiguous()
        dist.broadcast(y, src=0)
        return y


@dataclass(frozen=True)
class Slice:
    """Reads rows or columns of a weight: of what is mapped, only they are brought into memory.

    Args:
        whole: the reader of the weight.
        dim: 0 for rows, 1 for columns.
        first, length: which.
    """

    whole: Reader
    dim: int
    first: int
    length: int

    def __call__(self, progress: Progress = None) -> Tensor:
        part = self.whole().narrow(self.dim, self.first, self.length)
        if self.dim == 1:
            part = part.clone(memory_format=torch.contiguous_format)
        elif progress is not None:
            touch(part)
        if progress is not None:
            progress(part.nbytes)
        return part


@dataclass(frozen=True)
class Shard:
    """One rank's part; a `loader.division.Division`.

    Args:
        rank: from 0.
        ranks: how many there are.
    """

    unknown: ClassVar[str] = "layers.0.attention.wo (Summed)"  # as `connect` puts it in place

    rank: int
    ranks: int

    def options(self, found: Folder, options: LoadOptions) -> LoadOptions:
        """The options of this rank: those given, and a GPU of its own where there are GPUs, or else the CPU.

        Raises:
            OptionError: one GPU or an Apple GPU was asked for; a size that the ranks do not divide, groups of weights
                that would be cut, weights that are stored quantized, or an option that goes with a whole model only.
        """
        what = f"parallel {self.ranks}"
        if found.quant is not None:
            raise OptionError(
                f"{what}: the weights of {found.path} are stored in {found.quant}, in an order that cannot be divided: "
                "take the folder that they were made of, and --quant"
            )
        if options.draft is not None:  # how many tokens are guessed depends on time, which ranks measure differently
            raise OptionError(f"{what} has no drafts: omit draft")
        if options.adapter_mode == "runtime" or len(options.adapter) > 1:
            raise OptionError(f"{what} takes one adapter, merged into the weights: omit adapter_mode")
        self._check_sizes(found.args, options.quant)
        device = options.device
        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise OptionError(f"{what} is for cpu or cuda, where each rank takes a GPU of its own, not for {device}")
        return replace(options, device=str(own_gpu(self.rank)) if device == "cuda" else device)

    def _check_sizes(self, args: ModelArgs, quant: str | None) -> None:
        what = f"parallel {self.ranks}"
        sizes = ("n_kv_heads", "hidden_dim", "vocab_size")
        if wrong := [f"{name} {getattr(args, name)}" for name in sizes if getattr(args, name) % self.ranks]:
            raise OptionError(f"{what} does not divide {' and '.join(wrong)}: every rank takes as much as the others")
        if quant == "int4":
            local = self.args(args)
            for name, columns in (("wo", local.n_heads * local.head_dim), ("w2", local.hidden_dim)):
                if columns % GROUP:
                    raise OptionError(
                        f"{what}: each rank has {columns} columns of {name}, and int4 rounds groups of {GROUP} "
                        "together: use --quant int8"
                    )

    def args(self, args: ModelArgs) -> ModelArgs:
        """The shape of the part. Its vocabulary stays whole: the embeddings are."""
        return replace(
            args,
            n_heads=args.n_heads // self.ranks,
            n_kv_heads=args.n_kv_heads // self.ranks,
            hidden_dim=args.hidden_dim // self.ranks,
        )

    def notes(self, args: ModelArgs, quant: str | None) -> tuple[str, ...]:
        """Sentences on what is divided, and on what is rounded otherwise than in the whole model.

        Args:
            args: of the whole model.
        """
        whole = "embeddings, norms and routers" if args.moe is not None else "embeddings and norms"
        divided = f"{self.ranks} ranks ({dist.get_backend()}) divide the model; each has all of the {whole}"
        local = self.args(args)
        columns = {"wo": local.n_heads * local.head_dim, "w2": local.hidden_dim}
        if quant == "int4":  # groups that share the scale of their scales
            columns = {name: n for name, n in columns.items() if n % (GROUP * SUPER)}
        if quant is None or not columns:
            return (divided,)
        what = " and ".join(columns)
        return divided, f"{quant}: each rank rounds its columns of {what} alone, which changes numbers a little"

    def part(self, found: Folder) -> Folder:
        """A folder whose shape is that of this rank's part, and whose readers read nothing else."""
        known = parameters(found.args)
        tensors, readers = dict(found.weights.tensors), dict(found.weights.readers)
        for name, reader in found.weights.readers.items():
            parameter = known[name]
            if parameter.split is None:
                continue
            readers[name] = self._sliced(parameter, reader)
            tensors[name] = replace(tensors[name], shape=self._shape(parameter))
        weights = WeightFiles(found.weights.files, tensors, readers)
        return replace(found, args=self.args(found.args), weights=weights)

    def _shape(self, parameter: Parameter) -> tuple[int, ...]:
        rows, columns = parameter.shape
        return (rows // self.ranks, columns) if parameter.split == "rows" else (rows, columns // self.ranks)

    def _sliced(self, parameter: Parameter, reader: Reader) -> Reader:
        if isinstance(reader, partial) and reader.func is reordered:  # heads keep to themselves: the order within them
            stored, heads = reader.args
            return partial(reordered, self._sliced(parameter, stored), heads // self.ranks)
        dim = 0 if parameter.split == "rows" else 1
        length = parameter.shape[dim] // self.ranks
        return Slice(reader, dim, self.rank * length, length)

    def shape(self, model: Transformer) -> None:
        """Give a model on the meta device its part of the output; of one that is tied, `connect` takes a part."""
        if not model.args.tied_embeddings:
            with torch.device("meta"):
                model.output = Linear(model.args.dim, model.args.vocab_size // self.ranks)

    def connect(self, model: Transformer) -> None:
        """Have a model that has its weights compute with the other ranks."""
        for block in model.layers:
            attention, feed_forward = block.get_submodule("attention"), block.get_submodule("feed_forward")
            attention.wo = Summed(attention.get_submodule("wo"))
            if model.args.moe is not None:
                feed_forward.gate = FromFirst(feed_forward.get_submodule("gate"))
            block.feed_forward = Summed(feed_forward)
        output: nn.Module = model.output
        if model.args.tied_embeddings:
            output = self._rows_of(model.output)
        model.output = Gathered(output, self.ranks)  # type: ignore[assignment]  # computes what a Linear does

    def _rows_of(self, whole: nn.Module) -> nn.Module:
        """This rank's rows of a product, in the memory where they are."""
        assert isinstance(whole, Linear | QuantizedLinear)
        n = whole.out_features // self.ranks
        if isinstance(whole, QuantizedLinear):
            return SomeRows(whole, self.rank * n, n)
        with torch.device("meta"):
            part = type(whole)(whole.in_features, n)
        rows = whole.weight.detach()[self.rank * n : (self.rank + 1) * n]
        part.weight = nn.Parameter(rows, requires_grad=False)
        return part


def shard_of_this_process() -> Shard | None:
    """This process's part, if it is one of several ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return Shard(dist.get_rank(), dist.get_world_size())
