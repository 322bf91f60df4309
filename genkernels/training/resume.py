"""What a run that goes on must have as it was, what becomes of its settings, and what its user is told then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from genkernels._config import CHANGEABLE, TrainConfig
from genkernels._words import UsageError
from genkernels.data.provenance import check_same
from genkernels.training.rundir import RunDirectory

if TYPE_CHECKING:
    from genkernels.data import DataBundle
    from genkernels.models import Model


def going_on(run: RunDirectory, state: dict, config: TrainConfig, examples: int) -> tuple[TrainConfig, list[str]]:
    """The settings of a run that goes on from `state`, of no fewer steps than it has, and sentences on what is not as
    one may think."""
    step, total = state["step"], config.total_steps(examples, config.world_size)
    if step >= total:
        asked = f", {total:,} were asked for" if step > total else ""
        config = config.changed(max_steps=step, epochs=None) if step > total else config
        return config, [f"{run} has {step:,} steps{asked}: nothing was trained"]
    if stopped_early(config, state):
        reason = f"stopped early at step {step:,}, without a new best in {state['stale']} evaluations"
        return config, [f"{run} {reason}: nothing was trained; a larger --patience goes on"]
    notes = []
    if step and "optimizers" not in state:
        notes.append(f"the checkpoint of step {step:,} holds weights alone: the optimisers begin anew")
    old = run.read_config()["train"]
    judged = old.get("eval_examples", config.eval_examples), config.eval_examples
    if state.get("best") and judged[0] != judged[1]:
        which = " now ".join("the default" if n is None else f"{n:,}" if n else "all" for n in judged)
        notes.append(f"eval_examples was {which}: the best so far, {state['best'][1]:.4f}, does not quite compare")
    length = {key: old.get(key) for key in ("max_steps", "epochs")}
    if any(length.values()):
        before = config.changed(**length).total_steps(examples, config.world_size)
        for s in (step, 0):  # a warm-up that is a part of the length differs from the first step on
            now, then = config.lr_at(s, total), config.lr_at(s, before)
            if now != then:
                notes.append(
                    f"a run of {total:,} steps has step size {now:.3g} in step {s:,}, one of {before:,} {then:.3g}"
                )
                break
    return config, notes


def refuse_changes(
    run: RunDirectory, model: Model, description: dict, bundle: DataBundle, data: dict, settings: dict
) -> None:
    """A UsageError where the model, the data or a setting is not what the run was begun with and a resume cannot
    change it."""
    old = run.read_config()
    kind, size = ("name", "hparams") if description["name"] else ("class", "parameters")  # of one's own, all there is
    pairs = {"model": (old["model"].get(kind), description[kind])}
    pairs |= {size: (old["model"].get(size, description[size]), description[size])}
    pairs |= {f"data {key}": (old["data"].get(key), data[key]) for key in ("spec", "shape", "grey_levels")}
    fixed = sorted(set(settings) - CHANGEABLE)
    pairs |= {key: (old["train"].get(key, settings[key]), settings[key]) for key in fixed}
    for name, (before, now) in pairs.items():
        if json.loads(json.dumps(before)) != json.loads(json.dumps(now)):  # to JSON, tuples are lists
            raise UsageError(f"{run} was begun with {name} {before!r}, which a resume cannot change, got {now!r}")
    check_same(run, old["data"], bundle, conditional=bool(model.num_classes))


def stopped_early(config: TrainConfig, state: dict) -> bool:
    """Whether the run of a checkpoint ended there for want of a new best."""
    return 0 < config.patience <= state.get("stale", 0)
