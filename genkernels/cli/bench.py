"""``genkernels bench``."""

from __future__ import annotations

from genkernels.training.errors import UsageError


def run(arguments) -> int:
    from genkernels.benchmarks import main

    try:
        return main(
            arguments.cases,
            json=arguments.json,
            plot=arguments.plot,
            quick=arguments.quick,
            device=arguments.device,
            dtypes=arguments.dtype,
            providers=arguments.provider,
            threads=arguments.threads,
            limit=arguments.limit,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
