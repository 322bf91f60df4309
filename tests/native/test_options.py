"""csrc/common/options.h against genkernels/_options.py: Python, Triton and C++ mean the same by an option's number."""

from __future__ import annotations

import re

from genkernels import _options
from tests.native.native_build import ROOT, binding


def in_cpp(name: str) -> str:
    """``LOGISTIC_MIXTURE`` as C++ spells it: ``kLogisticMixture``."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def test_every_option_has_the_same_numbers_in_python_and_in_cpp():
    options = {
        kind.__name__: {in_cpp(member.name): member.value for member in kind}
        for kind in vars(_options).values()
        if isinstance(kind, type) and issubclass(kind, _options.Option) and kind is not _options.Option
    }
    assert binding("plain").options == options


def test_no_option_of_the_header_is_left_out_of_the_binding():
    header = (ROOT / "csrc" / "common" / "options.h").read_text()
    names = set(re.findall(r"enum class (\w+)", header))
    assert names == set(binding("plain").options)
    in_header = sum(len(re.findall(r"\bk[A-Z]\w* = \d", line)) for line in header.splitlines())
    assert in_header == sum(len(numbers) for numbers in binding("plain").options.values())


def test_words_are_the_names_of_users():
    assert _options.ScaleMap.words()[:4] == ("exp", "sigmoid", "tanh", "additive")
    assert _options.ScaleMap.words()[_options.ScaleMap.SOFT_CLIP] == "soft_clip"
    assert _options.MaskType.words() == ("A", "B")
    assert _options.Head.words()[_options.Head.LOGISTIC_MIXTURE] == "logistic_mixture"
