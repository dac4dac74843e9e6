"""When a server that breaks is started again."""

from __future__ import annotations

import pytest

from glm_image.errors import ConfigurationError
from glm_image.supervisor.restarts import RestartPolicy


def test_pauses_double_up_to_the_longest() -> None:
    policy = RestartPolicy()
    assert [policy.pause(restart) for restart in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert policy.pause(10**9) == policy.longest_seconds


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--max-restarts is -1; allowed: 0 or more"):
        RestartPolicy(-1)
