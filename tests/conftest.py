"""Settings for the whole test run: Hypothesis draws the same examples every time, without deadlines.

`pytest --mutant NAME` runs the tests on a library that makes a mistake (mistral/oracle/mutants.py); they must fail.
"""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "stable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("stable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutant", metavar="NAME", help="inject a mistake into the library: the tests must notice")


def pytest_configure(config: pytest.Config) -> None:
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
