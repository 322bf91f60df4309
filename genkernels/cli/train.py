"""``genkernels train``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from genkernels._config import TrainConfig
from genkernels._words import UsageError, notice

DEFAULT_STEPS = 2000


def run(arguments) -> int:
    from genkernels._machine import is_main_process
    from genkernels.backends import current_backend, use_backend
    from genkernels.training.checkpoint import list_checkpoints
    from genkernels.training.loop import fit

    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(arguments, f.name)}
    with use_backend(given.get("backend") or current_backend()):
        pass  # a name that is wrong is told before anything is loaded
    directory, config, data, bundle, model = (_continued if arguments.resume else _begun)(arguments, given)
    main = is_main_process()
    resume = f"genkernels train --out {shlex.quote(str(directory))} --resume"
    try:
        result = fit(
            model,
            bundle,
            config,
            out=directory.path,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            data=data,
            quiet=arguments.quiet,
        )
    except KeyboardInterrupt:
        kept = next(iter(list_checkpoints(directory.checkpoints)), None)
        saved = f"the newest checkpoint is {kept}; go on with: {resume}" if kept else "nothing was saved"
        notice(f"stopped at once, what came after the last checkpoint is lost: {saved}")
        return 130
    if not main:
        return 0
    if result.interrupted:
        notice(f"interrupted after step {result.steps}: saved {result.checkpoint}; go on with: {resume}")
        return 128 + result.signal
    print(result)
    return 0


def _begun(arguments, given: dict):
    """A new run's folder, settings, data and model."""
    from genkernels._machine import is_main_process
    from genkernels._seeds import derive_seed
    from genkernels.cli.build import fitted, model_class
    from genkernels.cli.forecast import forecast
    from genkernels.cli.load import load_data
    from genkernels.training.checks import check_model, resolved
    from genkernels.training.rundir import RunDirectory

    like = _like(arguments)
    name, spec = arguments.model or like["model"].get("name"), arguments.data or like["data"].get("spec")
    if name is None or spec is None:
        raise UsageError("train needs a model and data, e.g. genkernels train glow --data digits")
    kind = model_class(name)
    TrainConfig(**given)  # what is wrong is told before data are loaded
    arguments.model, arguments.data = name, spec
    directory = RunDirectory(_folder(arguments))
    if is_main_process():  # under DDP the other processes run this command too, after the first has made the folder
        directory.check(overwrite=arguments.overwrite)
    root = data_root(spec, arguments.data_root or like["data"].get("root"))
    bundle = load_data(spec, root, quiet=arguments.quiet)
    sizes = like["model"].get("hparams") if name == like["model"].get("name") and arguments.preset is None else None
    seed = TrainConfig(**given).seed if "seed" in given else like["train"].get("seed", 0)
    model, preset, words = fitted(
        kind,
        name,
        bundle,
        preset=arguments.preset,
        settings=arguments.settings,
        reversible=arguments.reversible,
        classes=arguments.classes or bool((sizes or {}).get("num_classes")),
        base=sizes,
        seed=derive_seed(seed, "weights"),
    )
    config = _merged(like["train"], given) if like["train"] else _with_preset(kind, preset, given)
    check_model(model)
    resolved(config, len(bundle.train), bundle.form.is_image)
    check_length(config, bundle)
    if is_main_process() and not arguments.quiet:
        notice(f"{kind.__name__}{words}: {forecast(model, bundle, config)}")
    return directory, config, {"spec": spec, "root": root}, bundle, model


def _like(arguments) -> dict:
    """What ``--like`` or ``--config`` says: the parts of a ``config.json``, empty where neither is given."""
    from genkernels.training.rundir import RunDirectory, read_config

    if arguments.like and arguments.config:
        raise UsageError("give --like or --config, not both")
    parts = {"model": {}, "data": {}, "train": {}}
    if arguments.like:
        return parts | RunDirectory(arguments.like).read_config()
    if arguments.config:
        parts |= read_config(Path(arguments.config).expanduser(), whole=False)
        TrainConfig.from_dict(parts["train"])  # written by hand: what is no setting is told
    return parts


def check_length(config: TrainConfig, bundle) -> None:
    """Tells, once, what makes little sense beside the number of steps or of examples."""
    from genkernels._machine import is_main_process

    if not is_main_process():
        return
    steps = config.total_steps(len(bundle.train), config.world_size)
    if config.warmup is not None and config.warmup > steps:
        peak = config.lr_at(steps - 1, steps)
        notice(f"--warmup {config.warmup:,} does not end within {steps:,} steps: the largest step size is {peak:.3g}")
    if config.batch_size > len(bundle.train):
        times = config.batch_size / len(bundle.train)
        notice(f"a batch of {config.batch_size:,} holds each of the {len(bundle.train):,} examples {times:.3g} times")


def _with_preset(kind: type, preset: str | None, given: dict) -> TrainConfig:
    """The training settings of the model's preset, under what the user typed."""
    settings = dict(kind.presets[preset].training) if preset else {}
    length = {"max_steps", "epochs"}
    if length & set(given):
        settings = {key: value for key, value in settings.items() if key not in length}
    settings |= given
    return TrainConfig(**settings if length & set(settings) else {**settings, "max_steps": DEFAULT_STEPS})


def _continued(arguments, given: dict):
    """The same of a run that goes on: all that the command line leaves open is in its ``config.json``."""
    from genkernels._seeds import derive_seed, fixed_seed
    from genkernels.cli.load import load_data
    from genkernels.training.rundir import RunDirectory, build_model

    for value, flag in (
        (arguments.preset, "--preset"),
        (arguments.settings, "--set"),
        (arguments.reversible, "--reversible"),
        (arguments.classes, "--class-conditional"),
        (arguments.like, "--like"),
        (arguments.config, "--config"),
    ):
        if value:
            raise UsageError(f"{flag} cannot be given with --resume: the model stays as the run began it")
    if arguments.out is None and (arguments.model is None or arguments.data is None):
        raise UsageError("--resume needs the run's folder: give --out DIR")
    directory = RunDirectory(_folder(arguments))
    directory.check(resume=True, overwrite=arguments.overwrite)
    old = directory.read_config()
    for flag, part, key in (("model", "model", "name"), ("data", "data", "spec")):
        wish, begun = getattr(arguments, flag), old[part].get(key)
        if wish is not None and wish != begun:
            raise UsageError(f"{directory} was begun with {flag} {begun}, which a resume cannot change, got {wish}")
    config = _merged(old["train"], given)
    spec, root = old["data"].get("spec"), arguments.data_root or old["data"].get("root")
    bundle = load_data(spec, root, quiet=arguments.quiet)
    check_length(config, bundle)
    with fixed_seed(derive_seed(config.seed, "weights")):  # as begun: it may have been stopped before a checkpoint
        model = build_model(old["model"], directory.path)
    return directory, config, {"spec": spec, "root": root}, bundle, model


def _folder(arguments) -> str:
    return arguments.out or str(Path("runs") / f"{arguments.model}-{as_name(arguments.data)}")


def _merged(old: dict, given: dict) -> TrainConfig:
    """The run's settings, those of an earlier version that are none any more left out, with what the command line says
    in their place."""
    old = {field.name: old[field.name] for field in dataclasses.fields(TrainConfig) if field.name in old}
    if "max_steps" in given or "epochs" in given:
        old = {**old, "max_steps": None, "epochs": None}
    return TrainConfig.from_dict({**old, **given})


def data_root(spec: str, root: str | None) -> str | None:
    """Where relative paths of the spec start, made absolute so that a run can be evaluated from another folder."""
    if spec.startswith(("folder:", "npz:")):
        return str(Path(root or ".").expanduser().absolute())
    return root


def as_name(spec: str) -> str:
    """A spec as a folder's name: ``folder:~/pics?size=32`` becomes ``folder-pics-size-32``."""
    kept = "".join(c if c.isalnum() or c in "._" else "-" for c in spec)
    return "-".join(part for part in kept.split("-") if part.strip(".")) or "data"
