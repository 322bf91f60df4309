"""What a run knows of its data, and whether other data are the same: renamed, added, removed or changed examples would
swap labels, be trained on and then held out, or end the promise that a resumed run reaches the losses of an unbroken
one."""

from __future__ import annotations

from genkernels._words import UsageError
from genkernels.data.bundle import DataBundle, listed

PARTS = {"train": "part to train on", "test": "held-out part"}


def data_facts(bundle: DataBundle) -> dict:
    """What ``config.json`` says of the data beside how to load them."""
    form = bundle.form
    return {
        "shape": list(form.shape),
        "grey_levels": form.grey_levels,
        "num_classes": form.num_classes,
        "classes": None if bundle.classes is None else list(bundle.classes),
        "examples": {part: len(getattr(bundle, part)) for part in PARTS},
        "digest": bundle.digest,
    }


def change(facts: dict, bundle: DataBundle, part: str) -> str | None:
    """A clause where a part of the data is not what it was when the run began; None also where the run does not say,
    because an earlier version began it or because the data are a user's own bundle."""
    now, name = data_facts(bundle), f"the {PARTS[part]} of {bundle.name}"
    before, after = ((each.get("examples") or {}).get(part) for each in (facts, now))
    if before not in (None, after):
        return f"{name} had {before:,} examples when the run began, and has {after:,}"
    before, after = ((each.get("digest") or {}).get(part) for each in (facts, now))
    if None not in (before, after) and before != after:
        return f"{name} has other examples or labels, or another order of them, than when the run began"
    before, after = (each.get("num_classes", 0) for each in (facts, now))
    if bundle.name.startswith("folder:") and "examples" not in facts and before not in (0, after):
        # begun by a version that took folders such as Train and Test for classes
        return f"{bundle.name} had {before or 'no'} classes when the run began, and has {after or 'none'}"
    return None


def check_part(facts: dict, bundle: DataBundle, part: str) -> None:
    """A UsageError where a part of the run's own data has changed: what was trained on may now be held out."""
    if changed := change(facts, bundle, part):
        raise UsageError(
            f"{changed}, so that what the run was trained on may be among them: bring them back (genkernels eval "
            "--data takes them as any other data)"
        )


def check_same(run: object, facts: dict, bundle: DataBundle, *, conditional: bool) -> None:
    """A UsageError where a run cannot go on with these data; `conditional`: its model has classes."""
    before, after = facts.get("classes") or [], list(bundle.classes or [])
    if "classes" in facts and before != after:
        new, gone = [n for n in after if n not in before], [n for n in before if n not in after]
        words = [f"{listed(names)} {word}" for names, word in ((new, "new"), (gone, "gone")) if names]
        raise UsageError(
            f"the classes of {bundle.name} are not those that {run} was begun with, which a resume cannot change: "
            f"{' and '.join(words) or 'they stand in another order'}"
        )
    before, after = facts.get("num_classes"), bundle.form.num_classes
    if conditional and before != after:
        raise UsageError(f"{run} was begun with {before} classes, which a resume cannot change, got {after}")
    for part in PARTS:
        if changed := change(facts, bundle, part):
            raise UsageError(f"{changed}: a resume could not reach the losses of an unbroken run (bring them back)")


def classes_of(facts: dict, bundle: DataBundle, num_classes: int) -> list[str]:
    """The names by which a run with `num_classes` counts the labels of these data. Runs of earlier versions do not say:
    their labels were numbers, or, where classes have names, counted in the order of these."""
    if facts.get("classes"):
        return list(facts["classes"])
    own = list(bundle.classes or [])
    named = bundle.name.startswith("folder:") or not all(name.isdigit() for name in own)
    return own if named and len(own) == num_classes else [str(i) for i in range(num_classes)]
