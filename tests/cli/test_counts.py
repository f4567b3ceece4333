"""Flags that count something: 0 and what is below it is refused by name before anything is read, or means something."""

from __future__ import annotations

import inspect

import pytest

from mistral.cli.commands import COMMANDS
from mistral.cli.conversation import Conversation
from mistral.cli.flags import kind_of
from mistral.cli.help import help_texts
from mistral.util.other_names import _THEIRS
from tests.support.commands import Command, in_process

# What else a command needs before it would look for a model. No such folder is there: whatever is checked comes first.
NEEDED: dict[str, tuple[str, ...]] = {
    "complete": ("/none", "Hi"),
    "convert": ("/none", "/none/b", "--to", "hf"),
    "finetune": ("/none", "--data", "/none/d", "--out", "/none/o"),
    "batch": ("/none/in", "/none/out", "--model", "/none"),
    "deploy": ("/none", "--target", "vllm"),
    "eval": ("/none", "--task", "passkey"),
    "pack": ("/none", "--output", "/none/p"),
    "compare": ("/none", "/none2"),
    "perplexity": ("/none", "/none/t"),
    "trace": ("/none", "Hi", "--output", "/none/t"),
    "mutants": ("/none", "--output", "/none/m"),
    "completion": ("bash",),
}
# Where 0 means something, and whether the help must say what: 0 tokens, 0 waiting and no log-probs need no words.
ZERO = {"max_tokens": False, "top_logprobs": False, "max_queue": False, "top_k": True, "max_batch_size": True}
SEEDS = ("seed",)  # no count: any whole number, but where it is the beginning of several


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


FLAGS = [
    (command, parameter.name)
    for command, function in COMMANDS.items()
    for parameter in inspect.signature(function).parameters.values()
    if kind_of(parameter) is int and parameter.name not in SEEDS
]


def test_there_are_such_flags() -> None:
    assert len(FLAGS) > 40
    assert {name for _, name in FLAGS} > set(ZERO)


@pytest.mark.parametrize(("command", "name"), FLAGS)
def test_no_count_is_zero_or_below_without_a_word(cli: Command, command: str, name: str) -> None:
    words = NEEDED.get(command, ("/none",))
    assert cli(command, *words, f"--{name}=-1").error.startswith(f"--{name} is -1; it must be ")
    error = cli(command, *words, f"--{name}=0").error
    if name not in ZERO:
        assert error.startswith(f"--{name} is 0; it must be ")
        return
    assert "/none" in error, "it is accepted"
    assert not ZERO[name] or "0" in help_texts(COMMANDS[command])[name]


# What users of other programs type, and what it is called here.
OTHERS = (
    ("finetune", "--learning_rate", "--lr"),
    ("finetune", "--output_dir", "--out"),
    ("finetune", "--num_train_epochs", "--epochs"),
    ("finetune", "--per-device-train-batch-size", "--batch_size"),
    ("finetune", "--gradient_accumulation_steps", "--accumulate"),
    ("finetune", "--max_seq_length", "--seq_len"),
    ("complete", "--max_new_tokens", "--max_tokens"),
    ("complete", "--n_predict", "--max_tokens"),
    ("complete", "--temp", "--temperature"),
    ("complete", "--model", "--folder"),
    ("complete", "-m", "--folder"),
    ("complete", "--lora", "--adapter"),
    ("convert", "--output_dir", "--dst"),
    ("serve", "--ctx-size", "--max_positions"),
    ("serve", "--tensor-parallel-size", "--parallel"),
    ("serve", "--model", "--folder"),
    ("deploy", "--tensor-parallel-size", "--gpus"),
)


@pytest.mark.parametrize(("command", "theirs", "ours"), OTHERS)
def test_a_flag_of_another_program_is_told_by_its_name_here(cli: Command, command: str, theirs: str, ours: str) -> None:
    error = cli(command, *NEEDED.get(command, ()), theirs, "1").error
    assert f"no flag {theirs}; did you mean {ours}?" in error


def test_other_names_are_told_where_the_name_is_known_alone(cli: Command) -> None:
    assert "did you mean" not in cli("inspect", "--learning_rate", "1").error
    assert cli("inspect", "--ctx-size", "1").error == "no flag --ctx-size; see --help"
    assert "did you mean" not in cli("interactive", "--ctx-size", "1").error, "which --chunk_size is like, and is not"
    assert cli("train", "x").error == "no command 'train'; did you mean finetune?"
    known = {p for function in COMMANDS.values() for p in inspect.signature(function).parameters} | set(COMMANDS)
    said = {name[1:] for name in Conversation(None, str)._commands}  # type: ignore[arg-type]
    assert set(_THEIRS) <= known | said, "each is a name of ours"


def test_the_dash_within_a_flag_is_as_good_as_an_underscore(cli: Command) -> None:
    assert "no such folder" in cli("complete", "/none", "Hi", "--top-k", "5", "--max-tokens", "3").error
