"""``genkernels eval``."""

from __future__ import annotations

from pathlib import Path

from genkernels._files import refuse_unwritable
from genkernels._words import UsageError


def run(arguments) -> int:
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    from genkernels import data
    from genkernels.cli.load import check_fits, classes_of, load
    from genkernels.cli.train import data_root
    from genkernels.training.evaluate import evaluate
    from genkernels.training.loop import forced_backend

    if arguments.json:
        refuse_unwritable(Path(arguments.json).expanduser())
    with forced_backend(arguments.backend):
        model, config, state = load(arguments)
        if arguments.data:
            bundle = data.load(arguments.data, root=data_root(arguments.data, arguments.data_root))
        else:
            bundle = data.load(config["data"]["spec"], root=arguments.data_root or config["data"].get("root"))
        check_fits(bundle, config)
        part = bundle.test if arguments.split == "test" else bundle.train
        conditional = classes_of(config) is not None
        # As in training, unless said otherwise: the noise, and so the result, is that of metrics.json to the last
        # digit.
        settings = config["train"]
        batch_size = arguments.batch_size or settings.get("eval_batch_size") or settings.get("batch_size", 64)
        seed = settings.get("seed", 0) if arguments.seed is None else arguments.seed
        result = evaluate(
            model, part, levels=bundle.levels, batch_size=batch_size, seed=seed, class_conditional=conditional
        )
    which = "held-out" if arguments.split == "test" else "training"
    print(
        f"{config['model']['name']} on {bundle.name}: {result.value:.4f} ± {result.standard_error:.4f} {result.unit}, "
        f"{result.examples:,} {which} examples, weights of step {state['step']}"
    )
    if arguments.json:
        from genkernels._files import write_json

        facts = {"run": str(arguments.run), "data": bundle.name, "split": arguments.split, "step": state["step"]}
        write_json(Path(arguments.json).expanduser(), {**facts, **result.to_dict()})
    return 0
