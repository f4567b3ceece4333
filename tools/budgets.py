"""The error budget of each pair of dtypes at each length, and how near every backend comes.

    python -m tools.budgets [FOLDER] [--lens 16,256,2048]

FOLDER is the bundled model unless given. For each length one random prompt of it goes through every variant of
`verify`; the table has the error budget of log-probs (root mean square, largest) and what each variant has of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mistral.cli.flags import numbers
from mistral.formats.folder import BUNDLED, read_folder
from mistral.oracle.metrics import short, table
from mistral.oracle.verify import Row, verify
from mistral.util.errors import UsageError


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=BUNDLED)
    parser.add_argument("--lens", default="16,256,2048")
    given = parser.parse_args()
    try:
        lens = numbers("lens", given.lens)
        found = read_folder(given.folder)
        rows: list[tuple[int, Row]] = []
        for n in lens:
            report = verify(found, lens=[n])
            rows += [(n, row) for row in report.rows if row.window == report.rows[0].window]
    except (UsageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    rows.sort(key=lambda pair: tuple(map(str, pair[1].dtypes)))
    cells = [("weights/compute", "length", "budget rms", "largest", "who", "attention", "x rms", "x largest")]
    for n, row in rows:
        b, e = row.budget, row.errors
        cells.append(
            (
                f"{short(row.dtypes[0])}/{short(row.dtypes[1])}",
                str(n),
                f"{b.rms:.1e}",
                f"{b.largest:.1e}",
                row.name if row.device == "cpu" else f"{row.name}, {row.device}",
                row.attention,
                f"{e.rms / b.rms:.2f}",
                f"{e.largest / b.largest:.2f}",
            )
        )
    print("\n".join(table(cells, right=(1, 2, 3, 6, 7))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
