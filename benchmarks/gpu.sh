#!/usr/bin/env bash
# Everything about a GPU that is not measured yet, on the one that is here, in less than 8 minutes, into one JSON file:
# the tests that need one, then the parts of benchmarks/gpu.py. Each has a limit of its own, so one that hangs costs no
# other; what it had measured before is kept, and the file has which part ended how.
#
#   benchmarks/gpu.sh FILE.json [--device cpu --shape tiny]     (the latter tries the script itself)
#
# PYTHON is the interpreter (default: .venv/bin/python where there is one); it needs torch with CUDA, what
# requirements.txt lists, and pytest. Rows beside transformers and xformers are left out where these are not installed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/gpu.sh FILE.json [flags of benchmarks/gpu.py]}
shift
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
"$python" -c 'import torch, mistral.eval.bench' || exit 2
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
trap 'exit 130' INT TERM

# part NAME SECONDS COMMAND..: its output on the terminal, how it ended and how long it took in the folder.
part() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    echo "==> $name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$parts/$name.log"
    code=${PIPESTATUS[0]}
    echo "$code $((SECONDS - began))" >"$parts/$name.ended"
    [ "$code" = 0 ] || echo "==> $name: exit code $code (124 and 137: cut off)"
}

part tests 110 "$python" -m pytest -q -rs tests/fast/test_cuda.py
for asked in decode:100 prefill:60 transformers:90 quant:70 attention:40; do
    part "${asked%:*}" "${asked#*:}" "$python" -m benchmarks.gpu --part "${asked%:*}" --rounds 3 --json "$parts/${asked%:*}.json" "$@"
done

"$python" - "$parts" "$out" <<'END'
import json, sys
from pathlib import Path
from mistral.util.files import write_atomic

parts, told = Path(sys.argv[1]), {}
for ended in sorted(parts.glob("*.ended"), key=lambda path: path.stat().st_mtime):
    code, seconds = map(int, ended.read_text().split())
    log = ended.with_suffix(".log").read_text(errors="replace").splitlines()
    told[ended.stem] = {"exit_code": code, "seconds": seconds, "last_lines": log[-15:]}
    figures = ended.with_suffix(".json")
    if figures.exists():
        told[ended.stem] |= json.loads(figures.read_text())
with write_atomic(sys.argv[2]) as beside:
    beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
failed = [name for name, part in told.items() if part["exit_code"]]
print(f"{sys.argv[2]}: {len(told)} parts in {sum(part['seconds'] for part in told.values())} s"
      + (f"; not to their end: {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
END
