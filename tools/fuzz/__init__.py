"""Broken files in large numbers: each must load, or be refused in one clear line. `python -m tools.fuzz --help`."""
