"""Long runs: memory that stays constant, a rate that stays, and a rolled cache that does not drift.

    python -m benchmarks.endurance stream --tokens 1000000 --out stream.json --plot stream.svg
    python -m benchmarks.endurance chat --tokens 200000 --out chat.json --plot chat.svg
    python -m benchmarks.endurance prompt --tokens 10000000 --out prompt.json

`stream` generates one sequence with the bundled model. `chat` holds a conversation, in which `/undo` drops a turn now
and then. `prompt` reads ids from a .npy file. Ctrl-C ends a run, and what it measured so far is printed. With
`--state FILE` the same command goes on where it was, on another evening or after a kill: the file is replaced at every
measurement. Rates are tokens a second of CPU time: other programs may run beside it. They slow it down all the same, by
the caches that they share, so `stream` has a second sequence beside it, of a few tokens and again and again from the
beginning: what slows both is no fault of the length.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.resumable import BLOCK, Log, State, of_row, put_row, resident
from mistral.cache import RollingBufferCache
from mistral.chat import session
from mistral.chat.conversation import Chat
from mistral.chat.templates import find_template
from mistral.engine import Engine
from mistral.eval import filler
from mistral.eval.perplexity import perplexity
from mistral.loader.load import Loaded, load
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.sampling_params import SamplingParams
from mistral.stored_ids import StoredIds
from mistral.util.files import write_atomic

EVERY = 200  # tokens of a stream, after which the sequence beside it gets a tenth as many
TIMES = 4  # contract, rule 11: an fp32 path may be this many times as far from float64 as another one
ASKED = {"stream": ("places",), "chat": ("undo_every", "question", "answer"), "prompt": ()}  # what decides a run
QUESTIONS = ("Who is there?", "And what did the king say?", "Tell me more of the wolf.", "Where did they go then?")


# --- a stream


class Beside:
    """A sequence that begins again at every measurement, to tell a long stream's slowness from a busy machine's."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._cache = model, RollingBufferCache(model.args, 1, dtype=model.dtype, positions=1)
        self._tokens, self._seconds = 0, 0.0
        self.again()

    def again(self) -> float:
        """Begin again; returns the tokens a second since the last beginning."""
        rate = self._tokens / self._seconds if self._tokens else math.nan
        self._cache.reset()
        self._engine = Engine(self._model, eos_ids=(), cache=self._cache)
        self._engine.add([1], SamplingParams(max_tokens=BLOCK, temperature=1.0, seed=2), 0)
        self._tokens, self._seconds = 0, 0.0
        return rate

    def go_on(self, tokens: int) -> None:
        began = time.process_time()
        for _ in range(tokens):
            self._engine.step()
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + time.process_time() - began


def stream(
    loaded: Loaded, exact: Transformer, tokens: int, places: int, block: int, minutes: float, state: State | None = None
) -> dict[str, Any]:
    """Generate one sequence; at `places` positions compare the rolled cache with a fresh prefill.

    Args:
        loaded: the model that generates.
        exact: the same weights in float64.
        tokens: to generate; fewer if `minutes` of CPU time are over.
        block: tokens between two measurements.
        state: what to go on from, and where to keep it.
    """
    model, state = loaded.model, state or State()
    held = state.held
    ids = held["ids"].tolist() if held else [1]
    log, drift = Log(block, held.get("log")), list[dict[str, float]](held.get("drift", []))
    beside = Beside(model)
    cache = RollingBufferCache(model.args, 2, dtype=model.dtype, positions=len(ids))  # row 1 is for comparing
    if held:
        put_row(cache, 0, held["row"])
    engine = Engine(model, eos_ids=(), cache=cache)
    made = len(ids) - 1
    request = engine.add(ids, SamplingParams(max_tokens=max(0, tokens - made), temperature=1.0, seed=1), 0)
    for _ in range(made):
        if request.rng is not None:  # the numbers that the tokens so far were drawn with
            request.rng()
    wanted = {tokens * (i + 1) // places - 1 for i in range(places)}
    with suppress(KeyboardInterrupt), tqdm(total=tokens, initial=made, disable=None, unit="token") as bar:
        log.resume(made)
        while not engine.done and log.spent < minutes * 60:
            bar.update(len(engine.step()))
            count = made + len(request.output_ids)
            measured = log.at(count)
            stopped = time.process_time()
            if count % EVERY == 0:
                beside.go_on(EVERY // 10)
            if measured:
                log.points[-1]["beside"] = beside.again()
            if count in wanted:
                before = [*ids, *request.output_ids]
                drift.append(compare(model, exact, cache, before[:-1], before[-1]))
            if measured:
                done = torch.tensor([*ids, *request.output_ids], dtype=torch.int32)
                state.save({"ids": done, "row": of_row(cache, 0), "log": log.to_hold(), "drift": drift})
            log.skip(time.process_time() - stopped)
    return {"tokens": made + len(request.output_ids), "points": log.points, "drift": drift}


@torch.inference_mode()
def compare(
    model: Transformer, exact: Transformer, cache: RollingBufferCache, ids: list[int], token: int
) -> dict[str, float]:
    """How far the rolled cache and a fresh prefill are from float64: the largest difference of log-probabilities.

    Args:
        cache: holds `ids` in row 0; row 1 is free.
        token: the next one.
    """
    cache.copy(0, 1)
    rolled = logprobs(model.forward(torch.tensor([token]), [0, 1], cache))
    windows = [w for w in model.args.windows if w is not None]
    span = sum(windows) if len(windows) == len(model.args.windows) else len(ids) + 1
    first = max(0, len(ids) + 1 - span)
    last = torch.tensor([*ids, token][first:])
    truth, fresh = (_fresh(one, last, first) for one in (exact, model))
    return {
        "position": len(ids),
        "rolled": float((rolled - truth).abs().max()),
        "fresh": float((fresh - truth).abs().max()),
        "between": float((rolled - fresh).abs().max()),
    }


def _fresh(model: Transformer, ids: Tensor, position: int) -> Tensor:
    """Log-probabilities after ids that begin at a position, by a cache of their own."""
    cache = model.make_cache(1)
    cache.reset(position=position)
    return logprobs(model.logits(model.forward_partial(ids, [len(ids)], cache)[-1:]))


# --- a conversation


def talk(
    loaded: Loaded,
    tokens: int,
    *,
    undo_every: int,
    answer: int,
    question: int,
    block: int,
    minutes: float,
    state: State | None = None,
) -> dict[str, Any]:
    """A conversation of `tokens` tokens, in which every `undo_every`th turn is dropped and another one asked.

    Args:
        answer: the most tokens of an answer.
        question: about so many characters of text that a question quotes.
        state: what to go on from, and where to keep it.
    """
    state = state or State()
    model, tokenizer = loaded.model, loaded.tokenizer
    params = SamplingParams(max_tokens=answer, temperature=1.0, seed=1)
    chat = Chat(model, tokenizer, find_template(tokenizer), params=params)
    held: dict[str, Any] = {"turn": 0, "length": 0, "processed": 0, "undone": [], "log": None, **state.held}
    log, undone = Log(block, held["log"]), list[dict[str, float]](held["undone"])
    turn, length, processed = held["turn"], held["length"], held["processed"]
    again = bool(state.held)  # the first answer of another process prefills the conversation again
    if again:
        _put_conversation(chat, held["conversation"])
    with suppress(KeyboardInterrupt), tqdm(total=tokens, initial=length, disable=None, unit="token") as bar:
        while length < tokens and log.spent < minutes * 60:
            turn += 1
            made = _ask(chat, turn, question)
            before, length = length, chat.cached_tokens + chat.prefilled_tokens + made
            processed += chat.prefilled_tokens + made
            bar.update(max(0, length - before))
            measured = not again and log.at(length)
            if again:
                log.resume(length)
            again = False
            stopped = time.process_time()
            if turn % undo_every == 0:
                chat.undo()
                made = _ask(chat, turn + 1, 0)
                length = chat.cached_tokens + chat.prefilled_tokens + made
                processed += chat.prefilled_tokens + made
                spent = time.process_time() - stopped
                undone.append({"length": length, "prefilled": chat.prefilled_tokens, "seconds": spent})
            if measured and state.path is not None:
                counted = {"turn": turn, "length": length, "processed": processed, "undone": undone}
                state.save({**counted, "log": log.to_hold(), "conversation": _conversation(chat)})
            log.skip(time.process_time() - stopped)
    return {"tokens": length, "turns": turn, "processed": processed, "points": log.points, "undone": undone}


def _conversation(chat: Chat) -> str:
    """A conversation as `/save` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        session.save(chat, f"{folder}/chat.json", "endurance")
        return Path(folder, "chat.json").read_text(encoding="utf-8")


def _put_conversation(chat: Chat, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "chat.json").write_text(text, encoding="utf-8")
        session.load(chat, f"{folder}/chat.json", "endurance")


def _ask(chat: Chat, turn: int, characters: int) -> int:
    """Ask about a piece of text; return how many tokens were generated."""
    sentences = filler.made(0)
    quoted = ""
    while len(quoted) < characters:
        quoted += sentences[turn * 31 + len(quoted)]
    asked = f"{quoted}{QUESTIONS[turn % len(QUESTIONS)]}"
    return sum(piece.token is not None for piece in chat.answer(asked))


# --- a prompt in a file


def prompt(model: Transformer, tokens: int, block: int, minutes: float, state: State | None = None) -> dict[str, Any]:
    """Have an engine read a prompt of random ids from a file, and score the beginning by perplexity too."""
    state = state or State()
    log = Log(block, state.held.get("log"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.npy"
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(tokens,))
        draw = np.random.default_rng(0)
        for first in range(0, tokens, 1 << 20):
            stored[first : first + (1 << 20)] = draw.integers(3, model.args.vocab_size, min(1 << 20, tokens - first))
        del stored
        before = resident()
        cache = RollingBufferCache(model.args, 1, dtype=model.dtype, positions=tokens)
        if state.held:
            put_row(cache, 0, state.held["row"])
        engine = Engine(model, eos_ids=(), cache=cache)
        request = engine.add(StoredIds(path), SamplingParams(max_tokens=1, temperature=0), 0)
        began = request.num_computed
        with suppress(KeyboardInterrupt), tqdm(total=tokens, initial=began, disable=None, unit="token") as bar:
            log.resume(began)
            while not engine.done and log.spent < minutes * 60:
                engine.step()
                bar.update(request.num_computed - bar.n)
                if log.at(request.num_computed) and not engine.done:
                    state.save({"row": of_row(cache, 0), "log": log.to_hold()})
        few = min(tokens, 10 * BLOCK)
        scored = perplexity(model, StoredIds(path)[:few]).perplexity if engine.done else None
    return {"tokens": request.num_computed, "before": before, "points": log.points, "perplexity": scored}


# --- what is printed and drawn


def summary(what: str, found: dict[str, Any]) -> Iterator[str]:
    """What a run came to, a line each."""
    points = found["points"]
    if not points:
        yield f"{what}: {found['tokens']:,} tokens; too few to measure"
        return
    memory = [point["bytes"] / 1e6 for point in points]
    rates = [point["rate"] for point in points]
    middle = float(np.median(rates))
    sittings = int(points[-1]["sitting"])
    yield f"{what}: {found['tokens']:,} tokens" + (f", in {sittings} processes one after the other" * (sittings > 1))
    yield (
        f"memory: {memory[0]:.1f} MB after the first {points[0]['tokens']:,.0f}, {memory[-1]:.1f} MB at the end, "
        f"{max(memory):.1f} MB at most"
    )
    yield (
        f"rate: {rates[0]:.0f} tokens/s of CPU time over the first, {middle:.0f} in the median "
        f"({middle / rates[0] - 1:+.1%}), {rates[-1]:.0f} at the end ({rates[-1] / rates[0] - 1:+.1%})"
    )
    if shares := [point["rate"] / point["beside"] for point in points if point.get("beside", math.nan) > 0]:
        yield (
            f"beside a sequence of at most {max(1, points[0]['tokens'] // 10):,.0f} tokens at the same time: "
            f"{np.median(shares):.3f} of its rate in the median, {min(shares):.3f} to {max(shares):.3f}"
        )
    if drift := found.get("drift"):
        worst = max(drift, key=lambda place: place["rolled"])
        times = max(place["rolled"] / max(place["fresh"], 1e-12) for place in drift)
        rms = {name: math.sqrt(sum(p[name] ** 2 for p in drift) / len(drift)) for name in ("rolled", "fresh")}
        yield (
            f"drift: {len(drift)} places; rolled {rms['rolled']:.1e}, fresh {rms['fresh']:.1e} from float64 "
            f"(root mean square of the largest errors); at worst {worst['rolled']:.1e} at position "
            f"{worst['position']:,}; rolled / fresh at most {times:.1f} (limit: {TIMES})"
        )
    if undone := found.get("undone"):
        last = undone[-1]
        yield (
            f"undo: {len(undone)} times in {found['turns']:,} turns; {found['processed']:,} tokens processed in all; "
            f"the last one prefilled {last['prefilled']:,} tokens in {last['seconds']:.1f} s of CPU time"
        )


def plot(what: str, found: dict[str, Any], path: str) -> None:
    """Memory and rate against tokens."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    points = found["points"]
    tokens = [point["tokens"] for point in points]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, name, scale, unit in zip(
        figure.subplots(1, 2),
        ("bytes", "rate"),
        (1e-6, 1),
        ("resident memory, MB", "tokens/s of CPU time"),
        strict=True,
    ):
        values = [point[name] * scale for point in points]
        axes.plot(tokens, values, "-", linewidth=1)
        axes.set(xlabel="tokens", ylabel=unit, ylim=(0, 1.3 * max(values)))
        if name == "rate":
            axes.axhspan(0.95 * values[0], 1.05 * values[0], alpha=0.2, label="the first block, ± 5%")
            axes.legend(loc="lower right")
    figure.suptitle(f"{what}: the bundled model, {found['processor']}", fontsize=10)
    with write_atomic(path) as beside:
        figure.savefig(beside, format=Path(path).suffix[1:], metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "chat", "prompt"))
    parser.add_argument("--folder", help="default: the bundled model")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--places", type=int, default=20, help="where the rolled cache is compared")
    parser.add_argument("--undo_every", type=int, default=40, help="turns between two /undo")
    parser.add_argument("--question", type=int, default=3000, help="characters of text that a question quotes")
    parser.add_argument("--answer", type=int, default=50, help="the most tokens of an answer")
    parser.add_argument("--block", type=int, default=BLOCK, help="tokens between two measurements")
    parser.add_argument("--minutes", type=float, default=30.0, help="of CPU time, after which it ends")
    parser.add_argument("--state", help="a file that is kept at every measurement, from which the same command goes on")
    parser.add_argument("--out", help="a JSON file for every figure")
    parser.add_argument("--plot", help="a picture, .svg or .png")
    asked = parser.parse_args()
    from mistral.eval.bench import processor

    loaded = load(asked.folder, device="cpu", threads=1)

    wanted = {name: getattr(asked, name) for name in ("what", "tokens", *ASKED[asked.what])}
    state = State(asked.state, {"model": loaded.describe(), **wanted})
    if asked.what == "stream":
        exact = load(asked.folder, device="cpu", dtype="float64", execution="eager", threads=1).model
        found = stream(loaded, exact, asked.tokens, asked.places, asked.block, asked.minutes, state)
    elif asked.what == "chat":
        found = talk(
            loaded,
            asked.tokens,
            undo_every=asked.undo_every,
            answer=asked.answer,
            question=asked.question,
            block=asked.block,
            minutes=asked.minutes,
            state=state,
        )
    else:
        found = prompt(loaded.model, asked.tokens, asked.block, asked.minutes, state)
    found = {"model": loaded.describe(), "processor": processor(loaded.model.device), "command": sys.argv[1:], **found}
    print(*summary(asked.what, found), sep="\n")
    if asked.out:
        with write_atomic(asked.out) as beside:
            beside.write_text(json.dumps(found), encoding="utf-8")
    if asked.plot:
        plot(asked.what, found, asked.plot)


if __name__ == "__main__":
    main()
