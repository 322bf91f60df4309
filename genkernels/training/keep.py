"""The checkpoints of a run: what it needs to go on, and its best weights."""

from __future__ import annotations

import time
from pathlib import Path

from genkernels._words import UsageError
from genkernels.training import checkpoint as ckpt
from genkernels.training.checkpoint import CheckpointError, TrainingError

KEPT = 2


class Keeper:
    """Brings optimisers and averages back from a checkpoint, and writes new ones, in the first process alone.

    Attributes:
        saved: the newest checkpoint, or None. saved_at: when this call wrote one, by the monotonic clock.
    """

    def __init__(self, session, state: dict) -> None:
        self.session, self._saved_step, self.saved_at = session, -1, time.monotonic()
        found = ckpt.list_checkpoints(session.run.checkpoints) if session.run else []
        self.saved: Path | None = found[0] if found else None
        if "optimizers" in state:
            _check_trained(state, session.players)
        for name, player in session.players.items():
            if optimizer := state.get("optimizers", {}).get(name):
                player.optimizer.load_state_dict(optimizer)
            if player.average and (average := state.get("average", {}).get(name)):
                player.average.load(average)
        if state.get("precision"):
            session.fabric.strategy.precision.load_state_dict(state["precision"])
        if session.judge.best and session.run:
            self._check_best(*session.judge.best)

    def _check_best(self, step: int, value: float) -> None:
        """``best.ckpt`` must be what the checkpoint at hand says: it may be ahead of it, or lost."""
        s, path = self.session, self.session.run.best
        try:
            found = ckpt.read_checkpoint(path)["step"]
        except CheckpointError as error:
            if step == s.start:
                return self.save_best(step)
            s.judge.best = None
            return s.tell(f"{error}: the next evaluation counts as the best, not {value:.4f} at step {step}")
        if found != step:
            s.tell(f"{path} is of step {found}, from before the run went back: it stays until one beats step {step}")

    def _weights(self, step: int) -> dict:
        s = self.session
        averages = {name: player.average.to_dict() for name, player in s.players.items() if player.average}
        judged = {"evaluations": s.judge.evaluations, "best": s.judge.best, "stale": s.judge.stale}
        return {"step": step, "model": s.model.state_dict(), "average": averages, **judged}

    def save_best(self, step: int) -> None:
        """Writes ``best.ckpt``: weights alone."""
        s = self.session
        if s.run and s.fabric.is_global_zero:
            ckpt.write_checkpoint(s.run.best, self._weights(step))
        s.fabric.barrier()

    def save(self, due) -> None:
        """Writes a checkpoint where one is due; a TrainingError where the disk refuses."""
        s = self.session
        if not due.save:
            return
        if s.run and s.fabric.is_global_zero and self._saved_step != due.step:
            s.report.file.flush(to_disk=True)  # no checkpoint must be ahead of the losses
            path = ckpt.step_path(s.run.checkpoints, due.step)
            optimizers = {name: player.optimizer.state_dict() for name, player in s.players.items()}
            state = {"optimizers": optimizers, "precision": s.fabric.strategy.precision.state_dict()}
            try:
                ckpt.write_checkpoint(path, {**self._weights(due.step), **state})
            except OSError as error:
                kept = f"the last good checkpoint is {self.saved}" if self.saved else "none was written before it"
                reason = error.strerror or error
                raise TrainingError(f"checkpoint {path} cannot be written: {reason}; {kept}") from error
            ckpt.keep_newest(s.run.checkpoints, KEPT)
            self.saved = path
        self._saved_step, self.saved_at = due.step, time.monotonic()
        s.fabric.barrier()


def _check_trained(state: dict, players: dict) -> None:
    """That a checkpoint's optimisers and averages are of what is trained now. Names of parameters are not in those of
    earlier versions."""
    averaged = [name for name, player in players.items() if player.average]
    for what, found, now in (
        ("players", state["optimizers"], players),
        ("averages", state.get("average", {}), averaged),
    ):
        if sorted(found) != sorted(now):
            raise UsageError(
                f"the run has the {what} {', '.join(found)}, which a resume cannot change, got {', '.join(now)}"
            )
    for name, player in players.items():
        (then,), (now,) = state["optimizers"][name]["param_groups"], player.optimizer.param_groups
        odd = sorted(set(then.get("param_names", now["param_names"])) ^ set(now["param_names"]))
        if odd or len(then["params"]) != len(now["params"]):
            raise UsageError(
                f"a resume must train the {len(then['params'])} tensors of {name} that the run has trained, "
                f"got {len(now['params'])}{f' ({odd[0]})' if odd else ''}"
            )
