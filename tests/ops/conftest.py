"""Each test of ``test_<op>.py`` that takes `implementation` runs on every implementation of <op> that runs here.

``@pytest.mark.implementations`` narrows that: ``reference=False`` leaves the definition itself out, ``torch_op="…"``
asks for those that have a kernel of that name, ``slow=False`` leaves out those where a call takes a second, ``only``
names those that a claim is about, ``when`` is asked, with the implementation and the other parameters by name, whether
to take a case at all: of many cases of the same paths, where a call is slow.
"""

import pytest

from tests import implementations
from tests.conftest import leave_out


def pytest_generate_tests(metafunc):
    if "implementation" not in metafunc.fixturenames:
        return
    asked = {"reference": True, "torch_op": None, "slow": True, "only": None, "when": None}
    for marker in metafunc.definition.iter_markers("implementations"):
        asked |= marker.kwargs
    found = implementations.of(operator_of(metafunc.module), asked["torch_op"])
    found = [i for i in found if asked["reference"] or i.backend != "reference"]
    found = [i for i in found if asked["slow"] or not i.is_slow]
    found = [i for i in found if asked["only"] is None or i.name in asked["only"]]
    metafunc.parametrize("implementation", found or [None], ids=lambda i: i.name if i else "none here", indirect=True)


def pytest_collection_modifyitems(config, items):
    def runs_nowhere(item):
        return "implementation" in item.fixturenames and item.callspec.params["implementation"] is None

    def is_one_too_many(item):
        if "implementation" not in item.fixturenames:
            return False
        implementation, others = item.callspec.params["implementation"], item.callspec.params.items()
        given = {name: value for name, value in others if name != "implementation"}
        asked = [m.kwargs["when"] for m in item.iter_markers("implementations") if "when" in m.kwargs]
        builds = item.get_closest_marker("every_build")
        if implementations.OTHER_BUILD and builds and builds.args:
            return not implementations.few(builds.kwargs["rows"], *builds.args)(**given)
        return not all(when(implementation, **given) for when in asked)

    mine = [item for item in items if item.path.is_relative_to(config.rootpath / "tests" / "ops")]
    all_mine = set(mine)
    theirs = [item for item in items if item not in all_mine]
    leave_out(config, mine, runs_nowhere, "no implementation that they are for runs here")
    leave_out(config, mine, is_one_too_many, "further cases of paths that others meet, where a call is slow")
    if implementations.INTERPRETED:
        others = "they concern no implementation, and have run without TRITON_INTERPRET"
        leave_out(config, mine, lambda item: "implementation" not in item.fixturenames, others)
    items[:] = theirs + mine


def operator_of(module) -> str:
    """A second file of an operator names it."""
    return getattr(module, "OPERATOR", module.__name__.rsplit(".", 1)[-1].removeprefix("test_"))


@pytest.fixture
def implementation(request):
    """The one that the operator runs by, through its public functions too, while the test lasts."""
    with implementations.in_force(request.param):
        yield request.param


@pytest.fixture
def device(implementation):
    return implementation.device


@pytest.fixture
def functions(implementation):
    """The torch operators by name, as attributes."""
    return implementation.functions
