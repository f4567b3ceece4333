"""Settings for the whole test run: Hypothesis draws the same examples every time, without deadlines.

`make test` draws half as many as `make test-all`.

`pytest --mutant NAME` runs the tests on a library that makes a mistake (mistral/oracle/mutants.py); they must fail.
"""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

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
