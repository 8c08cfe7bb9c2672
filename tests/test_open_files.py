from __future__ import annotations

import resource

import pytest

from dynserve.open_files import file_limit, raise_file_limit
from dynserve.server.serving import allowed_connections


def test_the_soft_limit_is_raised_to_the_hard_one_and_connections_follow() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
        assert file_limit() == 1000 and allowed_connections(False) == 750
        assert raise_file_limit() == file_limit() > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise OSError

    monkeypatch.setattr(resource, "setrlimit", refused)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, 200))
    assert raise_file_limit() == 100
