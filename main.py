"""Run a Mistral model from the command line.

python -m main demo
python -m main interactive FOLDER --instruct
python -m main complete FOLDER "Once upon a time"
python -m main --help
"""

import sys

from mistral.cli import main
from mistral.generate import generate

__all__ = ["generate", "main"]

if __name__ == "__main__":
    sys.exit(main())
