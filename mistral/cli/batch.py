"""`batch`: files of requests answered, by our engine, a server or a Ray cluster."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

from mistral.cli import flags
from mistral.cli.parallel import divisible, in_first
from mistral.cli.prompts import default_folder, key_of, note_if_assumed, open_model
from mistral.cli.terminal import echo_err
from mistral.loader.options import LoadOptions
from mistral.util.english import counted
from mistral.util.errors import ChecksFailed, UsageError
from mistral.util.flat import flat
from mistral.util.progress import Bar

if TYPE_CHECKING:
    from pathlib import Path

    from mistral.batch.job import Job, Progress, Runner
    from mistral.batch.settings import EngineSettings
    from mistral.loader.load import Loaded

EVERY = 30.0  # seconds between lines about the progress, where stderr is no terminal


@flat(options=LoadOptions(), omit=("max_batch_size",))
@divisible
def batch(
    input: list[str],
    output: str,
    *,
    retry: bool = False,
    model: str | None = None,
    rows: int = 16,
    max_positions: int | None = None,
    name: str | None = None,
    template: str | None = None,
    chunk_size: int | None = None,
    engine: str | None = None,
    key_env: str = "MISTRAL_API_KEY",
    concurrency: int = 32,
    attempts: int = 6,
    timeout: int = 600,
    ray: bool = False,
    workers: int = 2,
    options: LoadOptions,
) -> None:
    """Answer files of requests, in OpenAI's batch format; whatever ends it, the same command goes on from there.

    python -m main batch requests.jsonl answers.jsonl
    python -m main batch in/*.jsonl answers.jsonl --model mistral-7B-Instruct-v0.3 --dtype bfloat16
    python -m main batch requests.jsonl answers.jsonl --engine http://localhost:8000 --concurrency 64
    python -m main batch requests.jsonl answers.jsonl --ray --workers 4

    A line of INPUT is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {..}}, or has the
    url /v1/completions; a body means what `serve` makes of it. OUTPUT gets one line for each, in the order in which
    they are done. A line that cannot be answered gets a line that says why, and the others go on; the exit code is 1
    then. There may be several INPUTs, patterns in quotes among them; OUTPUT is the last word.

    Args:
        retry: answer lines again that OUTPUT has an error for
        model: the model folder; default: MISTRAL_MODEL, else the bundled model
        rows: the most sequences in a step, for each engine
        max_positions: the most tokens of a prompt and its answer; default: the training length, or what memory holds
        name: what bodies call the model; default: the name of its folder
        template: of conversations: v1 to v15, mistrallite or a .jinja file; default: the one that goes with the model
        chunk_size: most prompt tokens of a sequence in a step; default: 512 of all, GPU: 2048; changes rounding only
        engine: the address of a server that speaks OpenAI's protocol: it answers, and no model is loaded here
        key_env: the variable that holds the server's key, if it wants one
        concurrency: the most requests at once to the server
        attempts: how often a line is sent to the server, where it is busy or fails
        timeout: seconds that an answer of the server may take
        ray: answer on a Ray cluster, that of RAY_ADDRESS, or one on this machine
        workers: engines on the Ray cluster, each with --threads CPUs (1), and a GPU with --device cuda
    """
    flags.require_at_least(
        1, rows=rows, max_positions=max_positions, chunk_size=chunk_size, workers=workers, attempts=attempts
    )
    flags.require_at_least(1, concurrency=concurrency, timeout=timeout)
    ours = _given(model=model, rows=rows, max_positions=max_positions, name=name, template=template)
    ours += _given(chunk_size=chunk_size, ray=ray)
    theirs = _given(key_env=key_env, concurrency=concurrency, attempts=attempts, timeout=timeout)
    _require_one_way(engine, ray, options, ours, theirs, _given(workers=workers))
    from mistral.batch import inputs
    from mistral.batch.settings import EngineSettings

    files = inputs.find_inputs(input, output)
    settings = None
    if engine is None:
        settings = EngineSettings(_folder(model), options, rows, max_positions, name, template, chunk_size)
    # Where only the workers of a cluster have the folder, the first of their answers shows which model it is.
    known = settings if settings is not None and not (ray and settings.is_elsewhere) else None

    def runner(load: Callable[[], Loaded]) -> AbstractContextManager[Runner]:
        if settings is None:
            return nullcontext(remote(str(engine), key_env, concurrency, attempts, timeout))
        return nullcontext(on_ray(settings, workers)) if ray else local(settings, load)

    in_first(
        partial(open_model, model, replace(options, max_batch_size=rows)),
        lambda load: answer(files, output, retry, known, settings is None, partial(runner, load)),
    )


def _require_one_way(
    engine: str | None, ray: bool, options: LoadOptions, ours: list[str], theirs: list[str], of_cluster: list[str]
) -> None:
    """Refuse flags of one way to answer beside those of another.

    Args:
        engine, ray, options: as `batch` has them: which way it is.
        ours, theirs, of_cluster: flags that were given and are about a model here, a server, a Ray cluster.

    Raises:
        UsageError: some do not go together.
    """
    if engine is not None and (ours or options != LoadOptions()):
        what = ", ".join(ours) or "options of how a model is loaded"
        raise UsageError(f"--engine asks a server, which has its own model: {what} cannot go with it")
    if engine is None and theirs:
        raise UsageError(f"{theirs[0]} is about a server: add --engine and its address, or omit it")
    if of_cluster and not ray:
        raise UsageError(f"{of_cluster[0]} is about a Ray cluster: add --ray, or omit it")
    if ray and options.parallel > 1:
        raise UsageError("--ray gives each worker all of the model, and --parallel divides it: omit one of them")


def _folder(model: str | None) -> str | None:
    """The folder of a model as workers elsewhere find it too."""
    folder = default_folder(model)
    return os.path.abspath(folder) if folder is not None and os.path.exists(folder) else folder


def _given(**values: object) -> list[str]:
    """The flags, with dashes, whose values are not those that they have by default."""
    known = signature(batch).parameters
    return [f"--{name}" for name, value in values.items() if value != known[name].default]


def answer(
    files: list[Path],
    output: str,
    retry: bool,
    known: EngineSettings | None,
    elsewhere: bool,
    runner: Callable[[], AbstractContextManager[Runner]],
) -> None:
    """Answer the lines that have none yet.

    Args:
        retry: also those that have an error.
        known: the engine, where it is known which model it has.
        elsewhere: whether a server answers.
        runner: makes what answers; not called where nothing is left.
    """
    from mistral.batch.job import Job
    from mistral.batch.output import drop_failed, opened

    if retry and known is not None and os.path.isfile(output):
        with opened(output) as out:
            known.require_same(out, going_on=True)
    if retry and (dropped := drop_failed(output)):
        echo_err(f"{counted(dropped, 'error')} of {output} {'is' if dropped == 1 else 'are'} tried again")
    with opened(output) as out:
        job = Job(files, out, Report())
        if known is not None:
            known.require_same(out, going_on=job.left > 0)
        if job.left:
            if job.progress.earlier:
                echo_err(f"{output} has {job.progress.earlier:,} of {counted(job.progress.total, 'line')} already")
            if elsewhere and out.earlier.fingerprint is not None:
                echo_err(f"note: {output} has answers of {out.earlier.model}, run here; a server answers the rest")
            with runner() as made:
                run(job, output, made)
        conclude(job.progress, output)


def run(job: Job, output: str, runner: Runner) -> None:
    """Answer; what ends it early leaves a word about how to go on."""
    try:
        job.run(runner)
    except BaseException:
        echo_err(f"{output}: {job.progress.describe()}; the same command goes on from there")
        raise


def conclude(progress: Progress, output: str) -> None:
    """The last word, and the exit code.

    Raises:
        ChecksFailed: some lines are errors.
    """
    echo_err(f"{output}: {progress.describe()}")
    if progress.failed:
        if progress.first_error is not None:
            echo_err(f"the first of this run's errors: {progress.first_error}")
        raise ChecksFailed(f"{counted(progress.failed, 'error')} in {output}")


class Report:
    """The progress on stderr: a bar at a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar = Bar("batch", "line", lines=False)  # this one has more to tell
        self._told = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        self._bar(progress.done, progress.total)
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._told > EVERY and progress.done < progress.total:
            self._told = now
            echo_err(progress.describe())


def remote(url: str, key_env: str, concurrency: int, attempts: int, timeout: int) -> Runner:
    from mistral.batch.remote import Remote

    return Remote(url, key_of(key_env), concurrency=concurrency, attempts=attempts, timeout=timeout)


def on_ray(settings: EngineSettings, workers: int) -> Runner:
    from mistral.batch.on_ray import OnRay

    return OnRay(settings, workers=workers)


@contextmanager
def local(settings: EngineSettings, load: Callable[[], Loaded]) -> Iterator[Runner]:
    """Our engine, its model loaded."""
    made = settings.make(load())
    try:
        if made.served.template is None:
            echo_err(f"note: no chat completions: {made.served.no_template}")
        made.on_chat = partial(note_if_assumed, made.served.template, made.served.tokenizer)
        yield made
    finally:
        made.close()
