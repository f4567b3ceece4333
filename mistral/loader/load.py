"""A folder into memory: find, check everything, see that it fits, then load."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mistral.args import ModelArgs
from mistral.formats.folder import BUNDLED, Folder, read_folder, short, with_window
from mistral.formats.hub import is_hub_id, locate
from mistral.formats.layout import beyond_training, trained_length
from mistral.formats.releases import Release, identify
from mistral.formats.tokenizers import USUAL_NAME, suggested_sampling
from mistral.formats.weights import file_names
from mistral.formats.words import unused_ids, words_of
from mistral.loader.adapted import with_adapters
from mistral.loader.assemble import assemble_adapted
from mistral.loader.options import LoadOptions, OptionError
from mistral.loader.sizes import narrowed
from mistral.tokenizer import Tokenizer, TokenizerLike, require_tokenizer
from mistral.util.arguments import require_kind
from mistral.util.english import did_you_mean
from mistral.util.errors import printable
from mistral.util.flat import flat

if TYPE_CHECKING:
    from mistral.formats.convert import Converted
    from mistral.loader.division import Division
    from mistral.loader.runtime import Runtime
    from mistral.model import Transformer


@dataclass(frozen=True, repr=False)
class Loaded:
    """A model in memory, and what is known about it.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the folder's (None if it has none), or the one given to `load`, which may have fewer methods.
        args, runtime: its shape, and how it runs.
        folder, files: where it came from.
        parameters: how many weights there are.
        release: the release that it is, as far as its shape tells; None if it is none that is known.
        notes: what was assumed or left aside and what is odd, a sentence each.
        draft: what guesses its tokens, for people; "" for nothing.
        trained_length: tokens of the longest sequences that it was trained on, by its files; None: they do not say.
        own_words: the folder of an adapter whose tokenizer and templates stand in the place of the model's; None: none.
        own_template: that of an adapter whose chat template alone does; None: none.
    """

    model: Transformer
    tokenizer: Tokenizer
    args: ModelArgs
    runtime: Runtime
    folder: Path
    files: tuple[Path, ...]
    parameters: int
    release: Release | None = None
    notes: tuple[str, ...] = ()
    draft: str = ""
    trained_length: int | None = None
    own_words: Path | None = None
    own_template: Path | None = None

    @property
    def words(self) -> Path:
        """Where its tokenizer is."""
        return self.folder if self.own_words is None else self.own_words

    @property
    def templates(self) -> Path:
        """Where its chat templates are, as `find_template` takes it."""
        return self.words if self.own_template is None else self.own_template

    def describe(self) -> str:
        """One line: what was loaded, from where, and every choice that was made."""
        args = self.args
        return (
            f"{short(self.folder)}: {self.parameters / 1e6:.1f} M parameters from {file_names(self.files)}; "
            f"{self.runtime.describe()}; "
            f"window {args.window_text}; rope_theta {args.rope_theta:g} ({args.theta_rule}){_positions(args)}; "
            f"tokenizer {self._tokenizer_text()}{f'; drafts by {self.draft}' if self.draft else ''}"
        )

    def _tokenizer_text(self) -> str:
        found: object = self.tokenizer
        if found is None:
            return "none"
        if not hasattr(found, "path"):
            return "your own"
        ends, name = sorted(self.tokenizer.eos_ids), self.tokenizer.path.name
        if ends != [self.tokenizer.eos_id]:
            return f"{name}, ends at ids {', '.join(map(str, ends)) or 'none'}"
        if getattr(self.tokenizer, "guesses_eos", False):  # no file names it
            return f"{name}, ends at id {ends[0]}, {printable(self.tokenizer.named['eos_token'])}, by {USUAL_NAME}"
        return name

    def beyond_training(self, longest: int) -> str | None:
        """A note where sequences of that many tokens are longer than those that the model was trained on."""
        return beyond_training(self.trained_length, longest)

    def save(self, folder: str | PathLike[str]) -> Converted:
        """Write model and tokenizer into a folder that loads with the same bits; see `loader.save`.

        Raises:
            MistralError: quantized weights, or a folder that cannot be written.
        """
        from mistral.loader.save import save

        return save(self.model, folder, self.folder, self.own_words, self.own_template)

    def __repr__(self) -> str:
        return f"<Loaded {short(self.folder)}: {self.parameters / 1e6:.1f} M parameters; {self.runtime.describe()}>"


def _positions(args: ModelArgs) -> str:
    """What is done to positions or queries besides, human-readable."""
    yarn, grows = args.yarn, args.llama_4_scaling
    found = [] if yarn is None else [f"stretched {yarn.factor:g} times from {yarn.original_length:,} (YaRN)"]
    found += [] if grows is None else [f"queries grow beyond {grows.original_length:,}"]
    return "".join(f", {what}" for what in found)


@flat(options=LoadOptions())
def load(
    folder: str | PathLike[str] | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    kernels: bool | None = None,
    deterministic: bool = False,
    division: Division | None = None,
    options: LoadOptions,
) -> Loaded:
    """Load a model: a folder in Mistral's layout or Hugging Face's, or a GGUF file: shape, weights, tokenizer.

    Everything is checked against headers before a tensor is read, and memory before it is taken. The fields of
    LoadOptions may be given as keywords: `load(folder, device="cpu", quant="int8")`.

    Args:
        folder: a path, or a hub id (see `hub.locate`); default: the bundled model
        tokenizer: one of your own (encode, decode, bos_id, eos_id); default: the folder's
        kernels: the old spelling of execution, for one release: False is "eager", True is "kernels"
        deterministic: short for execution="bitwise"
        division: where several processes divide the model, this one's part; see `parallel.launch`
        options: see LoadOptions

    Raises:
        MistralError: a subclass that names what is wrong with the folder, the options or the memory.
    """
    options = _spelled_out(options, kernels, deterministic)
    _check_draft(options.draft)
    base = read_folder(BUNDLED if folder is None else locate(folder), options.max_batch_size)
    asked = windowed(base, options)
    adapted = with_adapters(asked, options)
    found = adapted.folder
    own, about = None if tokenizer is None else require_tokenizer(tokenizer), list[str]()
    if own is None:
        own, about = words_of(found.words, found.args, found.path)
        about += suggested_sampling(found.path) if own is not None else ()
    elif isinstance(own, Tokenizer):
        about = unused_ids(found.args, own)
    known = (own.kind, own.version) if isinstance(own, Tokenizer) else (None, None)
    release, odd = identify(base.args, *known)
    model, run = assemble_adapted(adapted, division, options)
    draft, of_draft = _put_draft(model, own, options)
    notes = (*asked.notes, *odd, *about, *narrowed(found, run), *run.notes, *of_draft)
    return Loaded(
        model=model,
        tokenizer=cast("Tokenizer", own),
        args=found.args,
        runtime=run,
        folder=found.path,
        files=found.weights.files,
        parameters=found.parameters,
        release=release,
        notes=notes,
        draft=draft,
        trained_length=trained_length(found.raw),
        own_words=found.own_words,
        own_template=found.own_template,
    )


def _check_draft(draft: str | None) -> None:
    """Refuse what can be no draft before the model is read, which may take minutes."""
    if draft is not None and draft != "ngram" and not is_hub_id(str(draft)) and not os.path.lexists(draft):
        raise OptionError(f"draft {draft} is neither ngram nor a folder that is here{did_you_mean(draft, ['ngram'])}")


def _put_draft(model: Transformer, tokenizer: TokenizerLike | None, options: LoadOptions) -> tuple[str, list[str]]:
    """Give a model what guesses its tokens, and say what that is, "" for nothing; and notes on it.

    Raises:
        OptionError: the smaller model has another vocabulary.
    """
    if options.draft is None:
        return "", []
    from mistral.fast.draft import Costs, NgramDraft

    costs = Costs()
    if options.draft == "ngram":
        model.draft = lambda: NgramDraft(costs)
        return "n-grams", []
    from mistral.fast.draft_model import ModelDraft

    execution = "auto" if options.execution == "bitwise" else options.execution
    same = ("device", "dtype", "cache_dtype", "threads")
    its = LoadOptions(execution=execution, **{name: getattr(options, name) for name in same})
    small = load(options.draft, options=its)
    if small.args.vocab_size != model.args.vocab_size or not _same_words(small.tokenizer, tokenizer):
        raise OptionError(
            f"{options.draft} cannot guess for this model: its vocabulary is another one "
            f"({small.args.vocab_size:,} ids against {model.args.vocab_size:,}, or other words)"
        )
    model.draft = lambda: ModelDraft(small.model, costs)
    notes = [f"{short(small.folder)}, which guesses: {note}" for note in small.notes]
    return f"{short(small.folder)}, {small.parameters / 1e6:.1f} M parameters", notes


def _same_words(one: TokenizerLike | None, other: TokenizerLike | None) -> bool:
    """Whether two tokenizers mean the same by each id; where one is missing, nothing says that they do not."""
    if not isinstance(one, Tokenizer) or not isinstance(other, Tokenizer):
        return True
    words = one.n_words
    return words == other.n_words and one.token_bytes()[:words] == other.token_bytes()[:words]


def windowed(found: Folder, options: LoadOptions) -> Folder:
    """A folder with the window that the options ask for, if they do."""
    window = options.sliding_window
    return found if isinstance(window, str) else with_window(found, window)


def as_read(found: Folder, options: LoadOptions) -> Folder:
    """A folder with the window that the options ask for, and their adapter merged into what is read of it.

    Raises:
        OptionError: several adapters.
        AdapterError: an adapter that is broken, or belongs to another model.
    """
    merged = replace(options, adapter_mode="merge") if options.adapter else options
    return with_adapters(windowed(found, options), merged).folder


def _spelled_out(options: LoadOptions, kernels: bool | None, deterministic: bool) -> LoadOptions:
    """Options with what the two short spellings of an execution mean."""
    require_kind("kernels", kernels, bool | None, "True, False or None", OptionError)
    require_kind("deterministic", deterministic, bool, "True or False", OptionError)
    means = {"bitwise"} if deterministic else set()
    means |= set() if kernels is None else {"kernels" if kernels else "eager"}
    means |= set() if options.execution == "auto" else {options.execution}
    if len(means) > 1:
        raise OptionError(f"execution is given as {' and as '.join(sorted(means))}: give one of them")
    return replace(options, execution=means.pop()) if means else options
