"""Settings for the whole test run: what a test draws and finds does not depend on the tests before it, nor on the load.

Hypothesis draws the same examples every time, without deadlines; `make test` draws half as many as `make test-all`.

`pytest --mutant NAME` runs the tests on a library that makes a mistake (mistral/oracle/mutants.py); they must fail.
"""

from __future__ import annotations

import os
import random
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from mistral.util.cores import FREE_CORES

for name, examples in {"stable": 50, "quick": 25}.items():
    settings.register_profile(
        name,
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile("stable")
# It also draws numbers and words that stand in the modules of this project imported so far: after other tests, others.
none_of_ours = providers._local_constants
providers._get_local_constants = lambda: none_of_ours
# As many threads as a test asks for, whatever else the machine does: sums of two threads have other last bits.
FREE_CORES._clock = float  # it stands still, so that nobody looks again; and can be pickled, as models are

# What a shell may have set for this project, for terminals, or for the way to other machines.
for name in ("MISTRAL_MODEL", "MISTRAL_API_KEY", "NO_COLOR", "COLUMNS", "LINES", "LC_ALL", "PYTHONUNBUFFERED"):
    os.environ.pop(name, None)
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))

THREADS: dict[str, int] = {}  # of PyTorch, before any test asked for others


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutant", metavar="NAME", help="inject a mistake into the library: the tests must notice")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") == "not long":  # `make test`; the others draw twice as much
        settings.load_profile("quick")
    # A shell that starts a job in the background has it ignore SIGINT, and so would every process that a test starts:
    # tests of Ctrl-C would wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = config.getoption("--mutant")
    if name is None:
        return
    from mistral.oracle.mutants import mutated
    from mistral.util.errors import UsageError

    mistake = mutated(name)
    try:
        mistake.__enter__()
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    config.add_cleanup(lambda: mistake.__exit__(None, None, None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own, and its threads, do not depend on those before it."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
        torch.set_num_threads(THREADS.setdefault("at first", torch.get_num_threads()))
