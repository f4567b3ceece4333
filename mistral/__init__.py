"""Mistral 7B to read, to run and to check. Start at mistral/model.py.

Importing this package imports nothing else; torch comes with the module that needs it.
"""

__version__ = "0.1.0"
