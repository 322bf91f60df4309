"""The checkpoints of a run: what it needs to go on, and its best weights."""

from __future__ import annotations

import time
from pathlib import Path

from genkernels.training import checkpoint as ckpt
from genkernels.training.checkpoint import TrainingError

KEPT = 2


class Keeper:
    """Brings optimisers and averages back from a checkpoint, and writes new ones; in the first process alone.

    Args:
        session: the run.
        state: a checkpoint to go on from; empty at the beginning.

    Attributes:
        saved: the newest checkpoint of this call, or None. saved_at: when, by the monotonic clock.
    """

    def __init__(self, session, state: dict) -> None:
        self.session = session
        self.saved: Path | None = None
        self.saved_at, self._saved_step = time.monotonic(), -1
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
            ckpt.write_checkpoint(s.run.best, self._weights(step))
        s.barrier()

    def save(self, due) -> None:
        """Writes a checkpoint where one is due.

        Raises:
            TrainingError: the disk refused.
        """
        s = self.session
        if not due.save:
            return
        if s.run and s.fabric.is_global_zero and self._saved_step != due.step:
            s.report.to_disk()
            path = ckpt.step_path(s.run.checkpoints, due.step)
            optimizers = {name: player.optimizer.state_dict() for name, player in s.players.items()}
            state = {**self._weights(due.step), "optimizers": optimizers}
            try:
                ckpt.write_checkpoint(path, {**state, "precision": s.fabric.strategy.precision.state_dict()})
            except OSError as error:
                kept = f"the last good checkpoint is {self.saved}" if self.saved else "none was written before it"
                raise TrainingError(
                    f"checkpoint {path} cannot be written: {error.strerror or error}; {kept}"
                ) from error
            ckpt.keep_newest(s.run.checkpoints, KEPT)
            self.saved = path
        self._saved_step, self.saved_at = due.step, time.monotonic()
        s.barrier()
