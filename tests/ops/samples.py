"""The sample call of each operator, which stands beside its tests, for the tests that every operator must pass.

A ``test_<op>.py`` has ``SAMPLES``: functions of a device and a dtype, by name, that return `(function of tensors,
tensors)`. One is named as the operator; others are further ones of its operators.
"""

import importlib

from genkernels import ops

_MODULES = {name: importlib.import_module(f"tests.ops.test_{name}") for name in sorted(ops.OPERATORS)}

SAMPLES = {name: sample for module in _MODULES.values() for name, sample in module.SAMPLES.items()}

#: Samples beside the one of the operator's own name, and the operator.
FURTHER = {name: operator for operator, module in _MODULES.items() for name in module.SAMPLES if name != operator}

#: Those that take autocast's lower dtype, as convolutions do; the others compute in fp32.
LOWER_UNDER_AUTOCAST = {name for module in _MODULES.values() for name in getattr(module, "LOWER_UNDER_AUTOCAST", ())}
