"""The checkpoints of a run: what it needs to go on, and its best weights."""

from __future__ import annotations

import time
from pathlib import Path

from genkernels.training.checkpoint import TrainingError, keep_newest, list_checkpoints, step_path, write_checkpoint

KEPT = 2


class Keeper:
    """Brings optimisers and averages back from a checkpoint, and writes new ones, in the first process alone.

    Attributes:
        saved: the newest checkpoint, or None. saved_at: when this call wrote one, by the monotonic clock.
    """

    def __init__(self, session, state: dict) -> None:
        self.session, self._saved_step, self.saved_at = session, -1, time.monotonic()
        found = list_checkpoints(session.run.checkpoints) if session.run else []
        self.saved: Path | None = found[0] if found else None
        for name, player in session.players.items():
            if optimizer := state.get("optimizers", {}).get(name):
                player.optimizer.load_state_dict(optimizer)
            if player.average and (average := state.get("average", {}).get(name)):
                player.average.load(average)
        if state.get("precision"):
            session.fabric.strategy.precision.load_state_dict(state["precision"])

    def _weights(self, step: int) -> dict:
        s = self.session
        averages = {name: player.average.to_dict() for name, player in s.players.items() if player.average}
        judged = {"evaluations": s.judge.evaluations, "best": s.judge.best, "stale": s.judge.stale}
        return {"step": step, "model": s.model.state_dict(), "average": averages, **judged}

    def save_best(self, step: int) -> None:
        """Writes ``best.ckpt``: weights alone."""
        s = self.session
        if s.run and s.fabric.is_global_zero:
            write_checkpoint(s.run.best, self._weights(step))
        s.fabric.barrier()

    def save(self, due) -> None:
        """Writes a checkpoint where one is due; a TrainingError where the disk refuses."""
        s = self.session
        if not due.save:
            return
        if s.run and s.fabric.is_global_zero and self._saved_step != due.step:
            s.report.file.flush(to_disk=True)  # no checkpoint must be ahead of the losses
            path = step_path(s.run.checkpoints, due.step)
            optimizers = {name: player.optimizer.state_dict() for name, player in s.players.items()}
            state = {"optimizers": optimizers, "precision": s.fabric.strategy.precision.state_dict()}
            try:
                write_checkpoint(path, {**self._weights(due.step), **state})
            except OSError as error:
                kept = f"the last good checkpoint is {self.saved}" if self.saved else "none was written before it"
                reason = error.strerror or error
                raise TrainingError(f"checkpoint {path} cannot be written: {reason}; {kept}") from error
            keep_newest(s.run.checkpoints, KEPT)
            self.saved = path
        self._saved_step, self.saved_at = due.step, time.monotonic()
        s.fabric.barrier()
