"""How much memory a conversion takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support.commands import ENVIRONMENT
from tests.support.folders import ROOT

# glibc gives back at once what is freed: what it would keep is some megabytes, now more and now less.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
SCRIPT = """
import json, sys
from mistral.formats import writer
from mistral.formats.convert import convert
def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
write, peak = writer._write_tensor, 0
def write_tensor(file, *rest):
    class File:
        def write(self, data):
            global peak
            peak = max(peak, anonymous())
            return file.write(data)
    write(File(), *rest)
writer._write_tensor = write_tensor
small, large = map(json.loads, sys.argv[1:])
convert(**small)  # what libraries need for themselves
begin, peak = anonymous(), 0
convert(**large)
print(peak - begin)
"""


def memory_of_convert(small: dict[str, Any], large: dict[str, Any]) -> int:
    """Bytes that a conversion takes at most while tensors are written, without the pages of files. Linux only.

    Args:
        small: arguments of a conversion like it, which is made first: what libraries need counts there.
        large: those of the conversion.
    """
    given = (json.dumps({name: str(x) for name, x in arguments.items()}) for arguments in (small, large))
    words = [sys.executable, "-c", SCRIPT, *given]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT | AT_ONCE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
