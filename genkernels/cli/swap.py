"""``genkernels swap``."""

from __future__ import annotations

import os
import sys


def run(arguments) -> int:
    from genkernels.benchmarks import swap

    sys.path.insert(0, os.getcwd())  # a user's own module, as with python -m
    return swap.show(arguments.factory, 0.2 if arguments.quick else 1.0)
