"""How one prompt is continued: SamplingParams, checked on construction. Runs without torch."""

from __future__ import annotations


class SamplingError(ValueError):
    """A sampling parameter out of its range."""
