"""Run the notebooks and keep what they show: text, and pictures that matplotlib drew.

    python -m tools.notebooks                       runs all of notebooks/, and writes their outputs
    python -m tools.notebooks notebooks/start.ipynb

Cells are plain Python, run one after the other in one namespace, as Jupyter does; no Jupyter is needed for it.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

from mistral.util.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(notebook: dict[str, Any]) -> None:
    """Run the code cells, and put what they show in their outputs.

    Raises:
        Exception: whatever a cell raises, with a note that names the cell.
    """
    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        source = "".join(cell["source"])
        try:
            cell["outputs"] = _run(source, f"<cell {count}>", names)
        except Exception as error:
            error.add_note(f"in cell {count}:\n{source}")
            raise
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count


def _run(source: str, name: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of one cell: what it printed, the value of a last expression, pictures."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if last is not None and isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    pictures = list(_pictures())
    if value is not None and not pictures:
        data = {"text/plain": _lines(repr(value))}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    outputs += [{"output_type": "display_data", "metadata": {}, "data": {"image/png": png}} for png in pictures]
    return outputs


def _pictures() -> list[str]:
    """The open figures, each as base64 of a PNG; they are closed."""
    from matplotlib import pyplot

    found = []
    for number in pyplot.get_fignums():
        buffer = io.BytesIO()
        # Nothing in the file that differs from run to run.
        pyplot.figure(number).savefig(buffer, format="png", dpi=70, bbox_inches="tight", metadata={"Software": None})
        found.append(base64.b64encode(buffer.getvalue()).decode())
    pyplot.close("all")
    return found


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def as_text(notebook: dict[str, Any]) -> str:
    """A notebook as its file has it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks or NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        execute(notebook)
        with write_atomic(path) as beside:
            beside.write_text(as_text(notebook), encoding="utf-8")
        print(f"ran {path}")


if __name__ == "__main__":
    main()
