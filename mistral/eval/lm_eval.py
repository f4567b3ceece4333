"""The library as a model of lm-evaluation-harness: `simple_evaluate(model=MistralLM(...))`, or by the command line
`python -m mistral.eval.lm_eval --model mistral-ref --model_args pretrained=FOLDER --tasks ..`.

Each text begins with one bos. Continuations of one context share its keys; see `scoring`.
"""

from __future__ import annotations

import logging
import sys
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from mistral.chat.messages import Message
from mistral.chat.templates import Template, assumed, ends_of, find_template
from mistral.eval.scoring import Continuation, Scored, Scorer
from mistral.generate import completions
from mistral.loader.load import Loaded, load
from mistral.loader.options import LoadOptions
from mistral.sampling_params import SamplingParams
from mistral.util.errors import MistralError, Unavailable, UsageError, short_repr

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise Unavailable(f"evaluation needs lm-evaluation-harness ({error}): pip install lm_eval") from None

log = logging.getLogger("mistral")
DEFAULT_LENGTH = 2048  # of a context where neither the caller nor the folder gives one, as lm-eval has it
GENERATED = 256  # tokens where a task does not say
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


@register_model("mistral-ref")
class MistralLM(TemplateLM):
    """A model of this library.

    Args:
        pretrained: a folder, a GGUF file or a hub id; default: the bundled model.
        loaded: one that is in memory already, instead of `pretrained` and `options`. Its `max_batch_size` limits how
            many texts are generated in one step.
        batch_size: the most sequences in a step.
        max_length: the most tokens of a context; default: what the model was trained on, by its files, or 2048.
        max_gen_toks: generated where a task does not say.
        template: of conversations, by name; default: the model's own.
        max_batch_size: not used; lm-eval gives it.
        device: as in LoadOptions; where there is no GPU, one that is asked for gives a warning.
        options: fields of LoadOptions, such as dtype and device.

    Raises:
        MistralError: what `load` raises; a folder without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        loaded: Loaded | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = GENERATED,
        template: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            log.warning(
                "there is no %s here: the best device there is is used", device
            )  # lm-eval's default asks for it
            device = None
        if batch_size != "auto" and int(batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        if options.get("prompt_dtype") is not None:
            raise UsageError("prompt_dtype is for generating, and evaluation reports numbers: omit it")
        if unknown := options.keys() - (LoadOptions.__dataclass_fields__.keys() - {"max_batch_size", "device"}):
            raise UsageError(f"no option is called {short_repr(min(unknown))}: see LoadOptions")
        self.loaded = (
            load(pretrained, device=device, max_batch_size=self.batch_size, **options) if loaded is None else loaded
        )
        for note in self.loaded.notes if loaded is None else ():
            log.warning("note: %s", note)
        if self.loaded.tokenizer is None:
            raise UsageError("evaluation needs a tokenizer, which this folder lacks")
        self._tokens = self.loaded.tokenizer
        self.max_length = max_length or self.loaded.trained_length or DEFAULT_LENGTH
        self.max_gen_toks = max_gen_toks
        self.scorer = Scorer(self.loaded.model, self.batch_size)
        self._template_name = template
        self._chats: dict[str, list[int]] = {}  # ids of conversations, by the texts that lm-eval knows them by

    # What lm-eval asks about the model.

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.loaded.model.device)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context is scored behind: bos, or eos where texts begin with none."""
        return self._tokens.bos_id if self._tokens.bos_id >= 0 else self._tokens.eos_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches of requests."""
        return f"{self.loaded.words.name}/{self._tokens.path.name}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the template of conversations; for lm-eval's caches."""
        return self._template.name if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results."""
        run = self.loaded.runtime.describe()
        return {"model_num_parameters": self.loaded.parameters, "model_dtype": str(self.loaded.model.dtype), "run": run}

    # Text and ids.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text with one bos in front; without, if add_special_tokens is false. A conversation that
        `apply_chat_template` gave, and what follows it, has the ids of its template."""
        known = max((chat for chat in self._chats if string.startswith(chat)), key=len, default=None)
        if known is not None:
            return self._behind(self._chats[known], string[len(known) :])
        bos = self._tokens.named.get("bos_token", "")
        if add_special_tokens is None and bos and string.startswith(bos):
            string = string[len(bos) :]
        return self._tokens.encode(string, bos=add_special_tokens is not False)

    def _behind(self, ids: list[int], text: str) -> list[int]:
        """Ids of a conversation and a text behind it; where that ends in text, the two become words together."""
        if not text:
            return ids
        control = set(self._tokens.control_tokens.values())
        begin = next((i for i in range(len(ids), 0, -1) if ids[i - 1] in control), 0)
        last = self._tokens.decode(ids[begin:])
        return ids[:begin] + self._tokens.encode_parts([last + text])

    @cached_property
    def _template(self) -> Template:
        release = None if self.loaded.release is None else self.loaded.release.template
        found = find_template(self._tokens, name=self._template_name, release=release, folder=self.loaded.templates)
        if note := assumed(found, self._tokens):
            log.warning("note: %s", note)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a text, control tokens by their names; `tok_encode` knows its ids. An answer that comes
        last without `add_generation_prompt` is gone on with."""
        template = self._template
        ids = template.encode_chat([Message(one["role"], one["content"]) for one in chat_history])
        if not add_generation_prompt:
            while ids and ids[-1] in ends_of(self._tokens, template):
                ids = ids[:-1]
        names = {i: text for text, i in self._tokens.control_tokens.items()}
        parts: list[str] = []
        for control, group in groupby(ids, key=lambda i: i in names):
            run = list(group)
            parts += [names[i] for i in run] if control else [self._tokens.decode(run)]
        text = "".join(parts)
        self._chats[text] = ids
        return text

    # What lm-eval asks the model.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation of its context, and whether it is the most likely one."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            if context:
                ids, scored = self._encode_pair(context, continuation)
            else:
                ids, scored = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            pairs.append(((context, continuation), ids, scored))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = sum(len(context) + len(scored) > self.max_length + 1 for _, context, scored in requests)
        if cut:
            log.warning(
                "%d of %d requests are longer than %d tokens: cut at the left", cut, len(requests), self.max_length
            )
        done = [self._cut(context, scored) for _, context, scored in requests]
        with tqdm(total=len(done), disable=disable_tqdm, desc="loglikelihood") as bar:
            found = self.scorer(done, lambda number: bar.update())
        return [self._told(request[0], score) for request, score in zip(requests, found, strict=True)]

    def _cut(self, context: list[int], scored: list[int]) -> Continuation:
        """The last tokens that fit: as many as max_length, and one that is only predicted."""
        if len(scored) > self.max_length:
            raise UsageError(f"a continuation has {len(scored)} tokens; max_length is {self.max_length}: raise it")
        ids = (context + scored)[-(self.max_length + 1) :]
        return Continuation(ids, len(ids) - len(scored))

    def _told(self, key: Any, score: Scored) -> tuple[float, bool]:
        if key is not None:
            self.cache_hook.add_partial("loglikelihood", key, (score.logprob, score.greedy))
        return score.logprob, score.greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text as a whole, in windows of max_length; each token is scored once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cuts = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, scored in map(utils.make_disjoint_window, cuts):
                windows.append((None, context, scored))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context continued, greedily unless the task says otherwise, up to one of its stop strings."""
        params = [self._params(request.args[1]) for request in requests]
        prompts = [self._prompt(request.args[0], one) for request, one in zip(requests, params, strict=True)]
        texts = [""] * len(requests)
        ends = ends_of(self._tokens, self._template if self._chats else None)
        ended = completions(prompts, self.loaded.model, self._tokens, params=params, eos_ids=ends)
        for i, result in tqdm(ended, total=len(prompts), disable=disable_tqdm, desc="generate_until"):
            texts[i] = result.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        wanted = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        wanted.pop("do_sample", None)
        stop, most = wanted.pop("until", None) or [], wanted.pop("max_gen_toks")
        if unknown := wanted.keys() - set(SAMPLING):
            raise UsageError(f"generation has {short_repr(min(unknown))}, which is not supported: leave it out")
        stops = tuple(dict.fromkeys(text for text in ([stop] if isinstance(stop, str) else stop) if text))
        return SamplingParams(**{"temperature": 0.0, "top_p": 1.0, **wanted}, max_tokens=most, stop=stops)

    def _prompt(self, context: str, params: SamplingParams) -> list[int]:
        room = self.max_length - params.max_tokens
        if room < 1:
            raise UsageError(f"{params.max_tokens} tokens to generate leave no room in {self.max_length}")
        ids = self.tok_encode(context)
        if len(ids) > room:
            log.warning("a context of %d tokens is longer than %d: cut at the left", len(ids), room)
        return ids[-room:]


def main() -> None:
    """lm-eval's own command line, which knows mistral-ref once this module is there."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MistralError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
