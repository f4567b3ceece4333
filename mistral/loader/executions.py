"""How steps can be computed: a table from the name of an execution to the kind of Transformer, a row each.

`runtime.resolve` picks a name; `load` builds what the row says. A fast path that meets a module it does not know
stands aside, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mistral.model import Transformer


def _decode() -> type[Transformer]:
    from mistral.fast.decode import FastTransformer

    return FastTransformer


def _cuda_graph() -> type[Transformer]:
    from mistral.fast.cuda_graph import CudaGraphTransformer

    return CudaGraphTransformer


def _bitwise() -> type[Transformer]:
    from mistral.fast.bitwise import BitwiseTransformer

    return BitwiseTransformer


@dataclass(frozen=True)
class Execution:
    """A way to compute steps.

    Args:
        transformer: imports and returns the class of the model.
        what: human-readable, in the line that reports what was loaded; "" where there is nothing to add.
        products: whether products of few rows are computed by the C kernels.
        whole_steps: whether whole layers are, which needs every module of a layer to be known.
        otherwise: the execution to use where a module is not known; None is an error.
    """

    transformer: Callable[[], type[Transformer]]
    what: str = ""
    products: bool = False
    whole_steps: bool = False
    otherwise: str | None = None


EXECUTIONS = {
    "eager": Execution(lambda: Transformer),
    "kernels": Execution(_decode, "kernels for decode steps", products=True, whole_steps=True, otherwise="products"),
    # What "kernels" comes to in bfloat16, and with an attention backend that was asked for by name.
    "products": Execution(lambda: Transformer, "kernels for products", products=True),
    "cuda_graph": Execution(_cuda_graph, "captured decode steps", whole_steps=True, otherwise="eager"),
    "bitwise": Execution(_bitwise, "kernels for all steps; bitwise", products=True, whole_steps=True),
}
