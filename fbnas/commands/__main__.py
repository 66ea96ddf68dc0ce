"""`python -m fbnas.commands COMMAND ...`: how a multirun starts its jobs, whatever is on PATH."""

import sys

from fbnas.commands import main

if __name__ == "__main__":
    sys.exit(main())
