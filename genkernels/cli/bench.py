"""``genkernels bench``."""

from __future__ import annotations

from genkernels._words import UsageError


def run(arguments) -> int:
    if arguments.cases[:1] == ["swap"]:
        return _swap(arguments)
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


def _swap(arguments) -> int:
    others = {"plot": [arguments.plot], "dtype": arguments.dtype, "provider": arguments.provider}
    for name, given in others.items():
        if given not in (None, [None]):
            raise UsageError(f"bench swap: --{name} is for operators and training_step, got {', '.join(given)}")
    if arguments.device not in (None, "cpu"):
        raise UsageError(f"bench swap: --device must be cpu, where swapped models are measured, got {arguments.device}")
    from genkernels.benchmarks import swap

    return swap.main(
        arguments.cases[1:],
        quick=arguments.quick,
        json=arguments.json,
        threads=arguments.threads,
        limit=arguments.limit,
    )
