"""What tables that train models share: their options, and a run that is either whole or ends the command."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from genkernels._config import check_threads
from genkernels._words import UsageError

if TYPE_CHECKING:
    from genkernels._config import TrainConfig
    from genkernels.data import DataBundle
    from genkernels.models import Model
    from genkernels.training import Result


def training_arguments(parser, steps: int) -> None:
    """``--steps``, ``--seed``, ``--threads``; `steps`: the default of the first."""
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"of each run (default: {steps})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and noise (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def check_arguments(arguments) -> None:
    """A UsageError where one of them cannot be."""
    if arguments.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {arguments.steps}")
    if not -(2**63) <= arguments.seed < 2**63:
        raise UsageError(f"--seed must be an integer of 64 bits, got {arguments.seed}")
    check_threads(arguments.threads)


def train(build: Callable[[], Model], bundle: DataBundle, config: TrainConfig) -> Result:
    """Builds and trains a model, its weights those of ``genkernels train`` at this seed; writes nothing.

    Raises:
        KeyboardInterrupt: after Ctrl-C, for a part of a table is none. SystemExit: after SIGTERM.
    """
    from genkernels._seeds import derive_seed, fixed_seed
    from genkernels.training import fit

    with fixed_seed(derive_seed(config.seed, "weights")):
        model = build()
    result = fit(model, bundle, config, quiet=True)
    if result.interrupted:
        if result.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + result.signal)
    return result
