"""Speed, memory and share of the peak of every operator, against eager PyTorch, ``torch.compile`` and other libraries.

`main` runs it; ``genkernels bench`` is `main` on the command line. `cases` says how to add an operator, `measure` by
what rules values are compared and time is taken, `machine` what the shares are shares of, `training_step` how whole
models are measured.
"""

from __future__ import annotations

import os

# Before torch.compile and the profiler first start: compile workers of its own would run beside the clock, and the
# profiler greets on stderr.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from genkernels.benchmarks.runner import main

__all__ = ["main"]
