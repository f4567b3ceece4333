"""Send the server what its own OpenAPI document allows, and what it does not, by schemathesis: nothing may be a 500.

    python -m venv /tmp/schemathesis && /tmp/schemathesis/bin/pip install schemathesis
    python -m tools.check_api --program /tmp/schemathesis/bin/schemathesis [--examples 500] [--seed 0]

A server of the bundled model is started, and ended again. Schemathesis has an environment of its own: it wants other
versions of libraries than the tests. Its report is printed; the exit code is its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tools.fuzz.bodies import server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,unsupported_method"


def main(argv: list[str] | None = None) -> int:
    """Read the flags, start a server, and run schemathesis against it."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_api", description="Check the server by its document.")
    parser.add_argument("--program", default="schemathesis", help="schemathesis: %(default)s")
    parser.add_argument("--examples", type=int, default=500, help="bodies of each kind for each path: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    flags = ["--checks", CHECKS, "--max-examples", str(given.examples), "--seed", str(given.seed), "--no-color"]
    flags += ["--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-shrink"]
    flags += ["--request-timeout", "120"]
    with server(positions=100) as url:  # answers that end soon
        return subprocess.run([given.program, "run", f"{url}/openapi.json", *flags]).returncode


if __name__ == "__main__":
    sys.exit(main())
