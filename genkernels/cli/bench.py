"""``genkernels bench``."""

from __future__ import annotations


def run(arguments) -> int:
    if arguments.cases == ["swap"]:
        from genkernels.benchmarks import swap

        return swap.main(arguments.quick, arguments.json, arguments.threads)
    from genkernels.benchmarks import main

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
