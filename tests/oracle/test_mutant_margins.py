"""No mutant is taken for rounding: on every pack that ships, each is far beyond the limit of `verify`."""

from __future__ import annotations

import pytest

from mistral.oracle import mutants, pack
from tools import mutant_margins

SHIPPED = sorted(pack.SHIPPED.glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_mutant_is_far_beyond_the_error_budget(path, tmp_path):
    found, prompts = pack.folder_of(path, tmp_path), pack.read(path).prompts
    verdicts = dict(mutant_margins.margins(found, prompts))
    assert set(verdicts) == {n for n in mutants.MUTANTS if mutants.applies(n, found.args, [len(p) for p in prompts])}
    assert min(verdict.ratio / verdict.limit for verdict in verdicts.values()) > 4


def test_the_tool_prints_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mutant_margins", str(pack.SHIPPED / "window.safetensors")])
    assert mutant_margins.main() == 0
    assert "window_one_more" in capsys.readouterr().out
    monkeypatch.setattr("mistral.oracle.mutants.applies", lambda name, *rest: name == "theta_1e4")  # its own theta
    assert mutant_margins.main() == 1
    assert "PASSES" in capsys.readouterr().out
