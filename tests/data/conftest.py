import re

import pytest

from genkernels.data import DataError, load


@pytest.fixture
def refusal():
    """Load what must be refused and hand back the sentence, having checked that it is one."""

    def refused(spec, pattern, **kwargs):
        with pytest.raises(DataError) as caught:
            load(spec, **kwargs)
        message = str(caught.value)
        assert message.startswith(f"{spec}: "), message
        assert "\n" not in message and not message.endswith("."), message
        assert re.search(pattern, message), message
        return message

    return refused
