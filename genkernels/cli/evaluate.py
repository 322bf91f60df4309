"""``genkernels eval``."""

from __future__ import annotations

import sys
from pathlib import Path

from genkernels._files import refuse_unwritable, write_json
from genkernels._words import UsageError


def run(arguments) -> int:
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    from genkernels.cli.load import check_fits, load, load_data, options, surroundings
    from genkernels.cli.train import data_root
    from genkernels.training.judge import evaluate, report

    if arguments.json:
        refuse_unwritable(Path(arguments.json).expanduser())
    with surroundings(arguments):
        model, config, state = load(arguments)
        name = config["model"]["name"]
        chosen = options(arguments.settings, model.evaluate, name, reserved=("batches",))
        if arguments.data:
            bundle = load_data(arguments.data, data_root(arguments.data, arguments.data_root))
        else:
            bundle = load_data(config["data"].get("spec"), arguments.data_root or config["data"].get("root"))
        bundle = check_fits(bundle, model, config, part=None if arguments.data else arguments.split)
        for note in _notes(bundle, config, arguments) if arguments.data else ():
            print(f"genkernels: {note}", file=sys.stderr)
        part = bundle.test if arguments.split == "test" else bundle.train
        # As in training, unless said otherwise: the noise, and so the result, is that of metrics.json to the last
        # digit.
        settings = config["train"]
        batch_size = arguments.batch_size or settings.get("eval_batch_size") or settings.get("batch_size", 64)
        seed = settings.get("seed", 0) if arguments.seed is None else arguments.seed
        estimates = evaluate(model, part, batch_size=batch_size, seed=seed, options=chosen)
        lines = report(model, part, batch_size=batch_size, seed=seed)
    which = "held-out" if arguments.split == "test" else "training"
    for estimate in estimates.values():
        called = f"{estimate.name} " if len(estimates) > 1 or not estimate.unit else ""
        print(
            f"{name} on {bundle.name}: {called}{estimate}, "
            f"{estimate.examples:,} {which} examples, weights of step {state['step']}"
        )
    for line in lines:
        print(f"  {line}")
    if arguments.json:
        facts = {"run": str(arguments.run), "data": bundle.name, "split": arguments.split, "step": state["step"]}
        facts |= {"options": chosen, "estimates": {key: e.to_dict() for key, e in estimates.items()}}
        facts |= {"report": lines} if lines else {}
        write_json(Path(arguments.json).expanduser(), facts)
    return 0


def _notes(bundle, config: dict, arguments) -> list[str]:
    """What is to be known of data that are not the run's own, or are no more."""
    from genkernels.data.provenance import change

    same = bundle.name == config["data"].get("spec")
    changed = change(config["data"], bundle, arguments.split) if same else None
    return [*([changed] if changed else []), *(f"{bundle.name}: {note}" for note in bundle.notes)]
