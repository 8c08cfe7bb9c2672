from __future__ import annotations

import logging

import pytest

from dynserve import log_limit
from dynserve.log_limit import LimitedLog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(log_limit, "EVERY", 1.0)
    return Clock()


def test_one_cause_is_named_once_a_second_with_the_number_of_the_others(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = LimitedLog(logging.getLogger("test"), clock)
    for _ in range(1000):
        log.warning("kind", "10.0.0.1", "from %r", "10.0.0.1")
    clock.now += 1.0
    log.warning("kind", "10.0.0.1", "from %r", "a\nb")
    log.warning("kind", "10.0.0.2", "from %r", "10.0.0.2")
    clock.now += 1.0
    log.warning("kind", "10.0.0.2", "from %r", "10.0.0.2")
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "from '10.0.0.1'"
    assert messages[1] == r"from 'a\nb' (999 more of this kind since the last line)"
    assert len(messages) <= 4 and messages[-1] == "from '10.0.0.2'"


def test_many_causes_do_not_make_many_lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("test"), clock)
    for number in range(10_000):
        clock.now += 0.0001
        log.warning("kind", f"10.0.0.{number}", "from %d", number)
    assert 10 <= len(caplog.records) <= 22
    assert len(log._said) <= log_limit.MAX_CAUSES + 1
