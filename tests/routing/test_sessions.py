from __future__ import annotations

from dynserve.routing.sessions import Sessions


def test_each_phase_of_a_session_has_its_own_worker() -> None:
    sessions = Sessions(10.0)
    sessions.note("s", "prefill", "a", 0.0)
    sessions.note("s", "decode", "b", 0.0)
    assert (sessions.worker("s", "prefill", 1.0), sessions.worker("s", "decode", 1.0)) == ("a", "b")


def test_use_renews_a_session_and_disuse_ends_it() -> None:
    sessions = Sessions(10.0)
    sessions.note("s", "prefill", "a", 0.0)
    sessions.note("s", "prefill", "a", 9.0)
    assert sessions.worker("s", "prefill", 18.0) == "a"
    assert sessions.worker("s", "prefill", 20.0) is None


def test_the_table_of_sessions_is_bounded_and_drops_expired_ones() -> None:
    sessions = Sessions(10.0, max_sessions=3)
    for i in range(5):
        sessions.note(f"s{i}", "prefill", "a", 0.0)
    assert len(sessions) == 3 and sessions.worker("s0", "prefill", 0.0) is None
    sessions.note("late", "prefill", "a", 100.0)
    assert len(sessions) == 1
