"""Break files in many ways, and see that each ends in a model that loads or in one clear error.

    python -m tools.fuzz [--mutations 10000] [--seed 0] [--only params,header] [--keep DIR]
    python -m tools.fuzz --seed 0 --only header --number 17 --keep DIR

The files are params.json, config.json, safetensors headers, index files, .gguf and .pth files, tokenizers and saved
conversations. A violation is anything else: another exception, more than 20 seconds, more memory than the files' size
and 1 GB, a crash, code from a file that runs, anything printed. It is shown with what reproduces it, and its folder is
kept. The exit code is 1 if there is one. Linux and macOS.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tools.fuzz.kinds import KINDS
from tools.fuzz.watch import Outcome, watch


def cases(kinds: list[str], mutations: int) -> Iterator[tuple[str, int]]:
    """The kinds in turn; the mutations of each are numbered from 0."""
    for i in range(mutations):
        yield kinds[i % len(kinds)], i // len(kinds)


def table(outcomes: list[Outcome]) -> str:
    """One line for each kind, and one for all."""
    titles = ("kind", "mutations", "loaded", "refused", "violations", "slowest s", "peak memory")
    rows = [titles]
    groups = {kind: [o for o in outcomes if o.kind == kind] for kind in KINDS}
    for name, group in {**groups, "all": outcomes}.items():
        if group:
            violations = sum(bool(o.violations) for o in group)
            loaded = sum(o.loaded and not o.violations for o in group)
            rows.append(
                (
                    name,
                    f"{len(group):,}",
                    f"{loaded:,}",
                    f"{len(group) - loaded - violations:,}",
                    f"{violations:,}",
                    f"{max(o.seconds for o in group):.2f}",
                    f"{max(o.memory for o in group) / 1e6:,.1f} MB",
                )
            )
    return "\n".join(f"{row[0]:13}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Read the flags, run the cases, print violations and the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description="Break files in many ways.")
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of files: %(default)s")
    parser.add_argument("--number", type=int, help="only this mutation of each kind")
    parser.add_argument("--keep", type=Path, help="where the folders of violations are kept")
    given = parser.parse_args(argv)
    kinds = given.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no kind is called {unknown.pop()!r}: {', '.join(KINDS)}")
    chosen = list(cases(kinds, given.mutations) if given.number is None else ((kind, given.number) for kind in kinds))
    keep, outcomes = given.keep, []
    with tempfile.TemporaryDirectory() as home, tqdm(total=len(chosen), unit="case", disable=None, leave=False) as bar:
        for outcome in watch(chosen, Path(home), given.seed):
            outcomes.append(outcome)
            bar.update()
            if outcome.violations:
                keep = keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
                kept = shutil.copytree(outcome.folder, keep / outcome.folder.name, symlinks=True, dirs_exist_ok=True)
                with bar.external_write_mode():
                    print(f"--seed {given.seed} --only {outcome.kind} --number {outcome.number}  {kept}")
                    print("".join(f"    {said}\n" for said in outcome.violations), end="", flush=True)
            if given.number is not None:
                print("".join(outcome.errors), end="")
    print(table(outcomes))
    return int(any(outcome.violations for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
