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


def test_a_repeated_cause_is_logged_once_a_second_with_the_number_omitted(
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
    assert messages[1] == r"from 'a\nb' (999 more like this were suppressed)"
    assert messages[2:] == ["from '10.0.0.2'"] * 2


def test_many_causes_do_not_produce_many_log_lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("test"), clock)
    for number in range(10_000):
        clock.now += 0.0001
        log.warning("kind", f"10.0.0.{number}", "from %d", number)
    assert len(caplog.records) == 20
    assert len(log._causes) == log_limit.MAX_CAUSES
    clock.now += 1.0
    log.warning("kind", "10.0.0.1", "one more")
    assert caplog.records[-1].getMessage() == "one more (9,980 more like this were suppressed)"


def test_the_first_lines_of_several_causes_are_all_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("test"), clock)
    for number in range(5):
        log.warning("kind", f"entry {number}" * 1000, "ignoring %d", number)
        log.warning("other", "", "without a cause")
    assert [r.getMessage() for r in caplog.records] == [
        "ignoring 0", "without a cause", "ignoring 1", "ignoring 2", "ignoring 3", "ignoring 4",
    ]  # fmt: skip
    assert max(len(cause) for _, cause in log._causes) == log_limit.MAX_CAUSE
