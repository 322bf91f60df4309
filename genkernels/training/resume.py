"""What becomes of the settings where a run goes on, and what its user is told then."""

from __future__ import annotations

from genkernels._config import TrainConfig
from genkernels.training.checks import world_size
from genkernels.training.rundir import RunDirectory


def going_on(run: RunDirectory, state: dict, config: TrainConfig, examples: int) -> tuple[TrainConfig, list[str]]:
    """The settings of a run that goes on from `state`, of no fewer steps than it has, and sentences on what is not as
    one may think."""
    step, total = state["step"], config.total_steps(examples, world_size(config))
    if step >= total:
        asked = f", {total:,} were asked for" if step > total else ""
        config = config.changed(max_steps=step, epochs=None) if step > total else config
        return config, [f"{run} has {step:,} steps{asked}: nothing was trained"]
    if stopped_early(config, state):
        reason = f"stopped early at step {step:,}, without a new best in {state['stale']} evaluations"
        return config, [f"{run} {reason}: nothing was trained; a larger --patience goes on"]
    notes = []
    if "optimizers" not in state:
        notes.append(f"the checkpoint of step {step:,} holds weights alone: the optimisers begin anew")
    old = run.read_config()["train"]
    judged = old.get("eval_examples", config.eval_examples), config.eval_examples
    if state.get("best") and judged[0] != judged[1]:
        which = " now ".join("the default" if n is None else f"{n:,}" if n else "all" for n in judged)
        notes.append(f"eval_examples was {which}: the best so far, {state['best'][1]:.4f}, does not quite compare")
    length = {key: old.get(key) for key in ("max_steps", "epochs")}
    if any(length.values()):
        before = config.changed(**length).total_steps(examples, world_size(config))
        for s in (step, 0):  # a warm-up that is a part of the length differs from the first step on
            now, then = config.lr_at(s, total), config.lr_at(s, before)
            if now != then:
                notes.append(
                    f"a run of {total:,} steps has step size {now:.3g} in step {s:,}, one of {before:,} {then:.3g}"
                )
                break
    return config, notes


def stopped_early(config: TrainConfig, state: dict) -> bool:
    """Whether the run of a checkpoint ended there for want of a new best."""
    return 0 < config.patience <= state.get("stale", 0)
