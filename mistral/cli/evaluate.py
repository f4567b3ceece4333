"""perplexity: how well a model predicts a text."""

from __future__ import annotations

import math

from mistral.cli import flags, terminal
from mistral.cli.prompts import one_line, open_model, read_text
from mistral.loader.options import LoadOptions
from mistral.util.errors import UsageError
from mistral.util.flat import flat


@flat(options=LoadOptions(max_batch_size=1), omit=("max_batch_size", "draft"))
def perplexity(
    folder: str | None = None,
    file: str | None = None,
    *,
    json: bool = False,
    chunk_size: int | None = None,
    options: LoadOptions,
) -> None:
    """Measure how well a model predicts a text, of any length.

    python -m main perplexity story.txt
    python -m main perplexity mistral-7B-v0.1 story.txt
    python -m main perplexity mistral-7B-v0.1 story.txt --quant int4 --json
    cat story.txt | python -m main perplexity mistral-7B-v0.1

    The text is one sequence with bos in front, each token predicted from all before it that the windows show;
    memory does not grow with it, except for layers without a window. Perplexity is exp of the mean nats a token. --json
    prints one object: tokens, nats (their sum), perplexity, characters.

    Args:
        json: print one JSON object instead of text
        chunk_size: tokens of a step; default: 2048; changes no number
    """
    flags.require_at_least(1, chunk_size=chunk_size)
    text = read_text(file)
    if not text:
        raise UsageError(f"no text: {'give a file, or text on stdin' if file is None else f'{file} is empty'}")
    loaded = open_model(folder, options)
    from mistral.engine import STEP_TOKENS
    from mistral.eval.perplexity import perplexity as score_text
    from mistral.tokenizer import encode

    ids, bar = encode(loaded.tokenizer, text), terminal.Bar("prompt", "token")
    score = score_text(loaded.model, ids, chunk_size=chunk_size or STEP_TOKENS, progress=bar)
    facts = {"tokens": score.tokens, "nats": score.nats, "perplexity": score.perplexity, "characters": len(text)}
    each = score.nats / score.tokens
    print(
        one_line(facts)
        if json
        else f"perplexity {score.perplexity:.4f}: {each:.4f} nats a token over {score.tokens} tokens, "
        f"{score.nats / math.log(2) / max(1, len(text)):.4f} bits a character"
    )
