"""`fit`: trains a model on a data set. The whole of a training step is in `_steps`; Lightning Fabric gives precision,
processes and devices."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from genkernels._config import TrainConfig
from genkernels._files import write_json
from genkernels._interrupt import Interrupt
from genkernels._lightning import import_lightning, quiet_lightning
from genkernels._machine import cpu_threads, is_main_process
from genkernels._seeds import derive_seed, fixed_seed, seed_everything
from genkernels._words import UsageError, notice
from genkernels.backends import current_backend, use_backend
from genkernels.data.batches import check_data
from genkernels.data.provenance import data_facts
from genkernels.models._model import check_domains
from genkernels.nn._modes import in_mode
from genkernels.training import checkpoint as ckpt
from genkernels.training.checkpoint import TrainingError
from genkernels.training.checks import check_model, explained, resolved
from genkernels.training.order import make_loader
from genkernels.training.results import Result, metrics
from genkernels.training.resume import going_on, refuse_changes
from genkernels.training.rundir import RunDirectory, describe_model, load_weights
from genkernels.training.session import Session

if TYPE_CHECKING:
    from genkernels.data import DataBundle
    from genkernels.models import Model


def fit(
    model: Model,
    bundle: DataBundle,
    config: TrainConfig,
    *,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data: dict | None = None,
    quiet: bool = False,
) -> Result:
    """Trains `model` on ``bundle.train`` and evaluates it on ``bundle.test``.

    The run is a function of the model's initial weights and of `config`: data order and noise of each step follow from
    ``(seed, step)``. A run that was stopped, by Ctrl-C or by ``kill -9``, goes on from its newest sound checkpoint and
    reaches the losses that it would have reached unbroken.

    Equivalent to, without everything that makes it safe to stop::

        optimizers = {name: Adam(player.module.parameters()) for name, player in model.players().items()}
        for step, (x, y) in enumerate(batches):
            for name, optimizer in optimizers.items():
                optimizer.zero_grad()
                model.losses(name, x, y, step)["loss"].backward()
                optimizer.step()

    Args:
        model: a `genkernels.models.Model`, one of the package's or of one's own. It is trained in training mode; in one
            that is in training mode already, parts in evaluation mode are frozen and stay so. Afterwards each module
            has the mode that it had.
        bundle: the data, from `genkernels.data.load` or of one's own making.
        config: how to train.
        out: the run's folder; None writes nothing.
        resume: goes on with the run in `out`; `model` must be built as it was, its weights are replaced.
        overwrite: replaces the run in `out`.
        data: how to load `bundle` again (``{"spec": ..., "root": ...}``); goes into ``config.json``.
        quiet: shows no progress.

    Returns:
        A `Result`. An interrupted run returns too, with ``result.interrupted`` true and its state saved.

    Raises:
        UsageError: something that was asked for cannot be done; nothing was written.
        TrainingError: a loss, a gradient or a weight became NaN or infinite, or a checkpoint could not be written.
        genkernels.BackendUnavailable: the forced backend cannot run here.
    """
    began = time.monotonic()
    main = is_main_process()
    run = RunDirectory(out) if out is not None else None
    if resume and run is None:
        raise UsageError("resume needs the run's folder: give out")
    check_model(model)
    check_domains(type(model), bundle.form)
    check_data(bundle)
    facts = len(bundle.train), bundle.form.is_image
    resolved(config, *facts)  # what this machine cannot do is refused before anything is written
    description = describe_model(model)
    with use_backend(config.backend or current_backend()), cpu_threads(config.threads):
        import_lightning()
        if run and main:
            run.prepare(resume=resume, overwrite=overwrite)
        try:
            state, config, notes = _restore(run, model, description, bundle, config, data, resume, main)
            notes = [f"{bundle.name}: {note}" for note in bundle.notes if not resume] + notes
            for note in notes if main else ():  # also when quiet: what was lost is never kept from the user
                notice(note)
            config = resolved(config, *facts)
            with fixed_seed(config.seed), in_mode(model, training=True):
                result = _run(model, bundle, config, run, state, quiet)
            result.notes, result.seconds = notes + result.notes, time.monotonic() - began
            if run and main and not result.interrupted:
                write_json(run.metrics, metrics(result, description, bundle, config))
        finally:
            if run:
                run.release()
    return result


def _steps(s: Session) -> None:
    """All steps from the session's first to its last, and what is due after them."""
    c, fabric, watch = s.config, s.fabric, s.watch
    order, pin = s.order(fabric.global_rank), fabric.device.type == "cuda"
    loader = make_loader(s.bundle.train, order, workers=c.workers, pin_memory=pin)
    watch.clock.restart()
    for step, batch in enumerate(loader, s.start):
        x, y = fabric.to_device(batch)
        seed_everything(derive_seed(c.seed, "step", step, fabric.global_rank))
        for name, player in s.players.items():
            if step % player.every:
                continue
            terms = player.losses(x, y, step)
            player.optimizer.zero_grad()
            fabric.backward(terms["loss"])
            grad_norm = player.step(c.lr_at(step, s.total))  # clips, moves, averages
            watch.add(name, terms, grad_norm)
        watch.tick()
        s.step = step + 1
        if due := s.due(s.step):
            watch.look(due)
            s.hear(due)
            if due.evaluate or due.draw or due.save:
                watch.check_weights(due)
                s.pause("evaluate", s.judge.evaluate, due)
                s.hear(due)
                s.pause("draw", s.sheets.draw, due)
                s.pause("save", s.keeper.save, due)
                watch.clock.restart()
            if due.stop:
                s.interrupted = due.interrupted
                break


def _run(
    model: Model, bundle: DataBundle, config: TrainConfig, run: RunDirectory | None, state: dict, quiet: bool
) -> Result:
    from lightning.fabric import Fabric

    machine = {key: getattr(config, key) for key in ("accelerator", "devices", "strategy", "precision")}
    with Interrupt(speak=not quiet and is_main_process()) as interrupt, quiet_lightning():
        fabric = Fabric(**machine)
        fabric.launch()
        s = Session(fabric, model, bundle, config, run, state, interrupt, quiet)
        try:
            s.judge.catch_up()
            _steps(s)
        except Exception as error:
            if sentence := explained(error, s.step, run):
                raise TrainingError(sentence) from error
            raise
        finally:
            s.report.close()
    for module, average in s.averages:
        if average and not s.interrupted:
            average.copy_to(module)
    return Result(
        steps=s.step,
        history=s.report.history,
        held_out={} if s.interrupted else s.judge.held_out,
        best=s.judge.best,
        evaluations=s.judge.evaluations,
        examples_per_second=s.watch.rate(),
        device=str(fabric.device),
        backend=current_backend(),
        precision=config.precision,
        out=run.path if run else None,
        model=model,
        checkpoint=s.keeper.saved,
        signal=interrupt.signal if s.interrupted else None,
        stopped_early=s.judge.stopped_early,
        notes=s.notes,
    )


def _restore(run, model, description, bundle, config, data, resume, main) -> tuple[dict, TrainConfig, list[str]]:
    """Writes ``config.json``, and loads the checkpoint of a run that goes on."""
    data = {"spec": bundle.name, **(data or {}), **data_facts(bundle)}
    state, notes = {}, []
    if resume:
        refuse_changes(run, model, description, bundle, data, config.to_dict())
    if resume and not ckpt.list_checkpoints(run.checkpoints):
        notes = [f"{run} was stopped before its first checkpoint: starting at step 0"]
    elif resume:
        path, state, notes = ckpt.read_newest(run.checkpoints)
        load_weights(model, state, path, averaged=False)
        if notes:
            notes = [f"{'; '.join(notes)}; going on from {path} instead"]
        config, more = going_on(run, state, config, len(bundle.train))
        notes += more
        found = ckpt.list_checkpoints(run.checkpoints)
        for damaged in found[: found.index(path)] if main else ():
            # kept for whoever wants to look, and out of the way of what this run will write
            damaged.rename(damaged.with_suffix(".ckpt.damaged"))
    if run and main:
        run.write_config(model=description, data=data, train=config.to_dict())
        if not state:  # killed before the next one, a run goes on from the weights that it began with
            ckpt.write_checkpoint(ckpt.step_path(run.checkpoints, 0), {"step": 0, "model": model.state_dict()})
    return state, config, notes
