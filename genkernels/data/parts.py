"""Folders and classes whose names say that they are a part: ``train`` and ``test``, in whatever spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable

from genkernels.data.spec import DataError

TRAIN = ("train", "training")
TEST = (  # what is held out, the first that is there
    ("test", "testing"),
    ("val", "valid", "validate", "validation"),
    ("eval", "evaluate", "evaluation"),
    ("dev", "development"),
    ("holdout", "heldout"),
)
_BESIDE = {"image", "images", "img", "imgs", "pic", "pics", "picture", "pictures", "photo", "photos", "data", "set"}
_LIKE_TRAIN = re.compile(r"train")
_LIKE_TEST = re.compile(r"test|val$|valid|eval|dev$|hold|held")


def find_parts(names: Iterable[str]) -> tuple[str, str] | None:
    """The two names that mean the training and the held-out part: upper and lower case, numbers, and words such as
    *images* beside count for nothing. None where there are none, or where one part has two names."""
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(_meaning(name), []).append(name)
    train, test = groups.get(TRAIN, []), next((groups[group] for group in TEST if group in groups), [])
    return (train[0], test[0]) if len(train) == len(test) == 1 else None


def refuse_parts(spec: str, names: Iterable[str], where: str) -> None:
    """A DataError where two names or more look like parts, and half of all do: taken for classes, the pictures to test
    on would be trained on."""
    names = list(names)
    train, test = ([n for n in names if any(map(like.match, _words(n)))] for like in (_LIKE_TRAIN, _LIKE_TEST))
    like = list(dict.fromkeys([*train[:1], *test, *train]))
    if len(like) > 1 and 2 * len(like) >= len(names):
        raise DataError(
            f"{spec}: {like[0]!r} and {like[1]!r}, {where}, look like parts to train and to test on and not like "
            "classes: the folder that is given must hold one folder called train and one called test"
        )


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def _meaning(name: str) -> tuple[str, ...] | None:
    """The group of names that a name belongs to."""
    word = "".join(word for word in _words(name) if word not in _BESIDE)
    return next((group for group in (TRAIN, *TEST) if word in group), None)
