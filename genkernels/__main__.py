"""``python -m genkernels``: the command line."""

import sys

from genkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
