"""`fit`: trains a model on a data set with Lightning's Trainer."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from genkernels._files import write_json
from genkernels._seeds import fixed_seed
from genkernels._words import UsageError
from genkernels.training import checkpoint as ckpt
from genkernels.training.config import CHANGEABLE, TrainConfig
from genkernels.training.ema import EMA
from genkernels.training.errors import TrainingError
from genkernels.training.evaluate import evaluate
from genkernels.training.interrupt import Interrupt
from genkernels.training.lightning_guard import import_lightning, quiet_lightning
from genkernels.training.order import fetch
from genkernels.training.results import Result, metrics, recorded
from genkernels.training.rundir import RunDirectory, describe_model, load_weights

if TYPE_CHECKING:
    from genkernels.data import DataBundle


def fit(
    model: nn.Module,
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

        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        for x, y in batches:
            loss = model.loss(x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step(), optimizer.zero_grad()

    Args:
        model: has ``loss(x, y=None)``, ``bits_per_dim(x, y=None)`` or ``log_prob(x, y=None)``, and ``sample(...)``.
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
        TrainingError: the loss, a gradient or a weight became NaN or infinite, or a checkpoint could not be written.
        genkernels.BackendUnavailable: the forced backend cannot run here.
    """
    began = time.monotonic()
    main = is_main_process()
    run = RunDirectory(out) if out is not None else None
    if resume and run is None:
        raise UsageError("resume needs the run's folder: give out")
    _check_data(bundle)
    settings, config = config.to_dict(), _resolved(config, len(bundle.train), bundle.levels)
    description = describe_model(model)
    with forced_backend(config.backend):
        import_lightning()
        if run and main:
            run.prepare(resume=resume, overwrite=overwrite)
        try:
            state, notes = _restore(run, model, description, bundle, settings, data, resume, main)
            if main:  # also when quiet: what was lost is never kept from the user
                for note in notes:
                    print(f"genkernels: {note}", file=sys.stderr)
            with fixed_seed(config.seed):
                result = _run(model, bundle, config, run, state, quiet)
        finally:
            if run:
                run.release()
    result.notes, result.seconds = notes, time.monotonic() - began
    if run and main and not result.interrupted:
        write_json(run.metrics, metrics(result, description, bundle, config))
    return result


def _run(
    model: nn.Module, bundle: DataBundle, config: TrainConfig, run: RunDirectory | None, state: dict, quiet: bool
) -> Result:
    from genkernels.backends import current_backend

    start = state.get("step", 0)
    ema = EMA(model, config.ema) if config.ema else None
    if ema and state.get("ema"):
        ema.load_state_dict(state["ema"])
    with Interrupt(speak=not quiet and is_main_process()) as interrupt, quiet_lightning():
        trainer = _trainer(config, callbacks=[])
        total, device = config.total_steps(len(bundle.train), trainer.world_size), trainer.strategy.root_device
        from genkernels.training.conductor import Conductor
        from genkernels.training.module import TrainingModule

        heading = (
            f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, on {bundle.name}: "
            f"{bundle.description}; {device}, step {start:,} of {total:,}"
        )
        conductor = Conductor(bundle, config, ema, run, state, heading, interrupt, quiet)
        module = TrainingModule(model, bundle.train, config, start, total, state.get("optimizer"))
        trainer.callbacks.append(conductor)
        if state.get("precision"):
            trainer.precision_plugin.load_state_dict(state["precision"])
        if start < total:
            try:
                trainer.fit(module)
            except SystemExit:  # Lightning's answer to a KeyboardInterrupt
                if not interrupt.forced:
                    raise
                raise KeyboardInterrupt from None
            except Exception as error:
                if sentence := _explained(error, conductor.step, run):
                    raise TrainingError(sentence) from error
                raise
            finally:
                conductor.close()
    model.to(device)  # Lightning moves it to the CPU at the end
    result = Result(
        steps=conductor.step or start,
        metric=conductor.metric,
        losses=conductor.losses,
        held_out=conductor.held_out,
        best=conductor.best,
        evaluations=conductor.evaluations,
        examples_per_second=None,
        seconds=0.0,
        device=str(device),
        backend=current_backend(),
        precision=config.precision,
        out=run.path if run else None,
        checkpoint=conductor.saved,
        signal=interrupt.signal if conductor.interrupted else None,
        stopped_early=conductor.stopped_early,
        model=model,
    )
    if start < total:
        result.examples_per_second = conductor.clock.rate(config.batch_size * trainer.world_size)
    elif run:
        result.losses, result.examples_per_second = recorded(run, config.batch_size * trainer.world_size)
        result.checkpoint = next(iter(ckpt.list_checkpoints(run.checkpoints)), None)
    if ema and not result.interrupted:
        ema.copy_to(model)
    if start >= total:  # killed between the last checkpoint and the results
        result.held_out = evaluate(
            model,
            bundle.test,
            levels=bundle.levels,
            batch_size=config.eval_batch_size or config.batch_size,
            seed=config.seed,
            class_conditional=config.class_conditional,
        )
    model.eval()
    return result


def _explained(error: Exception, step: int, run: RunDirectory | None) -> str | None:
    """A sentence for what can go wrong through no fault of the program; None for everything else."""
    from genkernels.data import DataError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"memory ran out in step {step}: choose a smaller --batch-size, or --reversible where the model has it"
    if isinstance(error, DataError):  # from a loader process it comes with that process's traceback in front
        return f"the data could not be read in step {step}: {lines[-1].split('DataError: ')[-1]}"
    if isinstance(error, OSError) and run:
        return f"the run folder {run} could not be written in step {step}: {error.strerror or lines[0]}"
    return None


def _trainer(config: TrainConfig, callbacks: list):
    import lightning.pytorch as pl

    strategy = "ddp" if config.devices > 1 and config.strategy == "auto" else config.strategy
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=strategy,
        precision=config.precision,
        callbacks=callbacks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def _resolved(config: TrainConfig, examples: int, levels: int | None) -> TrainConfig:
    """Fills in what was left open and checks it against this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu" and not gpus:
        raise UsageError("accelerator gpu needs an NVIDIA GPU and a CUDA build of torch: this torch sees no GPU")
    if accelerator == "gpu" and config.devices > gpus:
        raise UsageError(f"devices must be at most the {gpus} GPU(s) of this machine, got {config.devices}")
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise UsageError("precision 16-mixed needs a GPU: on the CPU choose 32 or bf16-mixed")
    world_size = config.devices * int(os.environ.get("NNODES", "1") or 1)
    total = config.total_steps(examples, world_size)
    tenth = max(1, total // 10)
    evaluate_every = tenth if config.eval_every is None else config.eval_every
    look = 1 if accelerator == "cpu" and config.devices == 1 else 20
    return config.changed(
        accelerator=accelerator,
        eval_every=evaluate_every,
        sample_every=evaluate_every if config.sample_every is None else config.sample_every,
        log_every=config.log_every or look,
        eval_examples=(0 if levels is None else 512) if config.eval_examples is None else config.eval_examples,
        samples=config.samples or (2000 if levels is None else 64),
    )


def _check_data(bundle: DataBundle) -> None:
    for part, dataset in (("train", bundle.train), ("test", bundle.test)):
        if not len(dataset):
            raise UsageError(f"data {bundle.name}: the {part} part must hold at least 1 example, got 0")
        if not fetch(dataset, [0])[0].is_floating_point():
            continue
        # A second or two for 100,000 points; what lies beyond is left to the guard that watches the losses.
        for first in range(0, min(len(dataset), 100_000), 1024):
            x = fetch(dataset, list(range(first, min(first + 1024, len(dataset)))))[0]
            fine = x.isfinite().flatten(1).all(1)
            if not fine.all():
                example = first + int((~fine).nonzero()[0])
                raise UsageError(
                    f"data {bundle.name}: every value must be finite, {part} example {example} holds NaN or infinity"
                )


def _restore(run, model, description, bundle, settings, data, resume, main) -> tuple[dict, list[str]]:
    """Writes ``config.json`` of a new run, or loads the checkpoint of one that goes on."""
    facts = {"shape": list(bundle.shape), "levels": bundle.levels, "num_classes": bundle.num_classes}
    data = {"spec": bundle.name, **(data or {}), **facts}
    if not resume:
        if run and main:
            run.write_config(model=description, data=data, train=settings)
        return {}, []
    old = run.read_config()
    _same(run, "model", old["model"].get("name"), description["name"])
    _same(run, "hparams", _listed(old["model"].get("hparams")), _listed(description["hparams"]))
    for key in ("spec", *facts):
        _same(run, f"data {key}", old["data"].get(key), data[key])
    for key in sorted(set(settings) - CHANGEABLE):
        _same(run, key, old["train"].get(key, settings[key]), settings[key])
    if not ckpt.list_checkpoints(run.checkpoints):
        if main:
            run.write_config(model=description, data=data, train=settings)
        return {}, [f"{run} was stopped before its first checkpoint: starting at step 0"]
    path, state, notes = ckpt.read_newest(run.checkpoints)
    load_weights(model, state, averaged=False)
    if notes:
        notes = [f"{'; '.join(notes)}; going on from {path} instead"]
        for newer in ckpt.list_checkpoints(run.checkpoints):
            if newer == path:
                break
            if main:  # kept for whoever wants to look, and out of the way of what this run will write
                newer.rename(newer.with_suffix(".ckpt.damaged"))
    if main:
        run.write_config(model=description, data=data, train=settings)
    return state, notes


def _same(run: RunDirectory, name: str, old, new) -> None:
    if old != new:
        raise UsageError(f"{run} was begun with {name} {old!r}, which a resume cannot change, got {new!r}")


def _listed(value):
    """JSON's view of a value: tuples are lists."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def forced_backend(name: str | None):
    """Forces a backend for a block; None leaves the choice in force alone.

    Raises:
        UsageError: the name, or that in ``GENKERNELS_BACKEND``, is unknown.
        genkernels.BackendUnavailable: it cannot run here.
    """
    from genkernels.backends import current_backend, use_backend

    try:
        block = use_backend(name or current_backend())
        block.__enter__()  # raises here, where an unknown name can still be told from a fault in the block
    except ValueError as error:
        raise UsageError(str(error)) from None
    stack = contextlib.ExitStack()
    stack.push(block)
    return stack


def is_main_process() -> bool:
    """Whether this is process 0: under DDP Lightning starts the others by running the same command again."""
    ranks = ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0") or 0) == 0 for name in ranks)
