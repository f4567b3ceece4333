"""LoadOptions: where and how a model runs, as asked for. Runs without torch."""

from __future__ import annotations


class OptionError(ValueError):
    """An option that does not exist, or that this machine cannot honour."""
