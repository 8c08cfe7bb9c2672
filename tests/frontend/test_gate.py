from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynserve.errors import ConfigError, Overloaded, RateLimited, Unauthorized
from dynserve.frontend.gate import Gate
from dynserve.frontend.keys import digest_of, parse_keys
from dynserve.frontend.rate_limits import Bucket

SECRET, OTHER = "sk-dyn-one", "sk-dyn-two"


def line(name: str, secret: str, limits: str = "") -> str:
    return f"{name} sha256:{digest_of(secret).hex()} {limits}\n"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who may\n" + line("ann", SECRET, "rpm=2 tpm=100 concurrency=2 priority=5") + line("bob", OTHER))
    return path


def test_without_a_keys_file_all_requests_and_priorities_are_accepted() -> None:
    gate = Gate(None, 10)
    call = gate.enter({})
    call.charge(10**9)
    assert call.priority(7) == 7 and call.priority(None) == 0 and call.headers() == []


@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), bearer(""), {"authorization": f"Basic {SECRET}"}, {"x-api-key": "no"}]
)
def test_an_invalid_key_is_refused(keys: Path, headers: dict[str, str]) -> None:
    gate = Gate(str(keys), 10)
    with pytest.raises(Unauthorized):
        gate.enter(headers)
    assert gate.open_requests.count == 0


def test_keys_are_accepted_in_the_headers_of_openai_and_anthropic_clients(keys: Path) -> None:
    gate = Gate(str(keys), 10)
    assert gate.enter(bearer(SECRET)).name == "ann"
    assert gate.enter({"x-api-key": OTHER}).name == "bob"
    assert gate.enter({"authorization": f"bearer {OTHER}"}).name == "bob"


def test_the_quota_of_requests_per_minute_refills_steadily(keys: Path) -> None:
    clock = Clock()
    gate = Gate(str(keys), 10, clock)
    for _ in range(2):
        gate.enter(bearer(SECRET)).close()
    with pytest.raises(RateLimited, match="2 requests a minute") as limited:
        gate.enter(bearer(SECRET))
    assert limited.value.retry_after == 30
    gate.enter(bearer(OTHER)).close()
    clock.now += 30
    gate.enter(bearer(SECRET)).close()


def test_tokens_are_charged_in_advance_and_unused_ones_are_refunded(keys: Path) -> None:
    clock = Clock()
    gate = Gate(str(keys), 10, clock)
    call = gate.enter(bearer(SECRET))
    call.charge(90)
    with pytest.raises(RateLimited, match="limit of 100 a minute") as limited:
        call.charge(47)
    assert limited.value.retry_after == 23
    call.settle(30)
    call.charge(70)
    with pytest.raises(RateLimited, match="limit of 100 a minute"):
        call.charge(1)
    clock.now += 300
    with pytest.raises(
        RateLimited, match="may use 101 tokens, and its limit is 100 a minute; request shorter"
    ) as never:
        call.charge(101)  # however long it waits
    assert ("x-should-retry", "false") in never.value.headers


def test_computed_tokens_are_not_refunded_when_the_request_fails(keys: Path) -> None:
    gate = Gate(str(keys), 10, Clock())
    with gate.enter(bearer(SECRET)) as call:
        call.charge(40)
        call.keep_charge()
    with gate.enter(bearer(SECRET)) as call:
        call.charge(50)
    call = gate.enter(bearer(OTHER))
    assert call.tokens_per_minute is None and call.headers() == []
    gate.clock.now += 60  # type: ignore[attr-defined]
    call = gate.enter(bearer(SECRET))
    assert call.tokens_per_minute == 100


def test_concurrency_counts_the_answers_of_a_request(keys: Path) -> None:
    gate = Gate(str(keys), 10, Clock())
    call = gate.enter(bearer(SECRET))
    assert call.acquire_slots(64) == 2
    with pytest.raises(RateLimited, match="2 answers in progress"):
        gate.enter(bearer(SECRET))
    call.close()
    assert gate.enter(bearer(SECRET)).acquire_slots(1) == 1
    assert gate.enter(bearer(OTHER)).acquire_slots(64) == 64


def test_keys_share_cached_prompts_only_within_a_group(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("ann", "1") + line("bob", "2", "group=ann") + line("cy", "3", "group=ann") + line("dan", "4"))
    gate = Gate(str(path), 10)
    owners = [gate.enter(bearer(secret)).cache_owner for secret in "1234"]
    assert owners == ["key:ann", "group:ann", "group:ann", "key:dan"]
    with pytest.raises(ConfigError, match="group='a b'|group=''"):
        parse_keys(line("eve", "5", "group="), "keys")


def test_open_requests_are_limited_per_key_and_in_total(keys: Path) -> None:
    clock = Clock()
    gate = Gate(str(keys), 3, clock)
    first, second = gate.enter(bearer(SECRET)), gate.enter(bearer(SECRET))
    clock.now += 600
    with pytest.raises(RateLimited, match="2 answers in progress"):
        gate.enter(bearer(SECRET))
    gate.enter(bearer(OTHER))
    with pytest.raises(Overloaded, match="3 requests are being answered"):
        gate.enter(bearer(OTHER))
    first.close()
    first.close()
    assert gate.open_requests.count == 2
    second.close()
    gate.enter(bearer(SECRET))


def test_a_keys_priority_is_a_ceiling(keys: Path) -> None:
    gate = Gate(str(keys), 10)
    ann, bob = gate.enter(bearer(SECRET)), gate.enter(bearer(OTHER))
    assert [ann.priority(wish) for wish in (None, 9, 3, -4)] == [5, 5, 3, -4]
    assert [bob.priority(wish) for wish in (None, 9, -4)] == [0, 0, -4]


def test_remaining_quotas_are_in_openais_rate_limit_headers(keys: Path) -> None:
    call = Gate(str(keys), 10, Clock()).enter(bearer(SECRET))
    call.charge(40)
    assert dict(call.headers()) == {
        "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "30.000s",
        "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "60", "x-ratelimit-reset-tokens": "24.000s",
    }  # fmt: skip


def test_a_changed_keys_file_is_reloaded_and_an_invalid_one_is_ignored(keys: Path) -> None:
    gate = Gate(str(keys), 10)
    held = gate.enter(bearer(SECRET))
    keys.write_text(line("bob", OTHER) + line("cy", "sk-dyn-three"))
    os.utime(keys, ns=(1, 1))
    gate.refresh()
    assert gate.enter(bearer("sk-dyn-three")).name == "cy"
    with pytest.raises(Unauthorized):
        gate.enter(bearer(SECRET))
    keys.write_text("nonsense\n")
    gate.refresh()
    keys.unlink()
    gate.refresh()
    assert gate.enter(bearer("sk-dyn-three")).name == "cy"
    held.close()


@pytest.mark.parametrize("text", ["eve sha256:" + "0" * 64 + " rpm=" + "9" * 400, "\udcff", "nonsense"])
def test_invalid_text_in_the_keys_file_does_not_stop_a_running_server(
    keys: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(str(keys), 10)
    keys.write_bytes(text.encode("utf-8", "surrogateescape"))
    os.utime(keys, ns=(1, 1))
    for _ in range(3):
        gate.refresh()
    assert len(caplog.records) == 1
    assert gate.enter(bearer(SECRET)).name == "ann"


def test_a_charge_can_be_refunded_only_once(keys: Path) -> None:
    call = Gate(str(keys), 10, Clock()).enter(bearer(SECRET))
    call.charge(70)
    call.settle(0)
    call.settle(0)
    assert dict(call.headers())["x-ratelimit-remaining-tokens"] == "100"


def test_spent_quotas_survive_a_reload_that_does_not_change_the_limits(keys: Path) -> None:
    gate = Gate(str(keys), 10, Clock())
    for _ in range(2):
        gate.enter(bearer(SECRET)).close()
    keys.write_text(keys.read_text() + line("cy", "sk-dyn-three"))
    os.utime(keys, ns=(1, 1))
    gate.refresh()
    with pytest.raises(RateLimited):
        gate.enter(bearer(SECRET))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann", "line 1: expected `name sha256"),
        ("ann secret", "line 1: expected `name sha256"),
        (line("ann", SECRET, "rpn=5"), r"unknown limit 'rpn' \(did you mean rpm\?\)"),
        (line("ann", SECRET, "rpm=many"), "'rpm=many' is not a whole number"),
        (line("ann", SECRET, "rpm=0"), "rpm must be between 1 and"),
        (line("ann", SECRET, "rpm=" + "9" * 400), "rpm must be between 1 and|not a whole number"),
        (line("ann", SECRET) + line("bob", SECRET), "line 2: this key is listed twice"),
        (line("ann", SECRET) + line("ann", OTHER), "line 2: ann is listed twice"),
    ],
)
def test_an_invalid_line_of_the_keys_file_is_reported(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_keys(text, "keys")


def test_a_bucket_never_holds_more_than_one_minutes_quota() -> None:
    bucket = Bucket(60, 0.0)
    bucket.spend(30, 0.0)
    assert bucket.level(10.0) == 40 and bucket.wait(50, 10.0) == 10
    assert bucket.level(1000.0) == 60 and bucket.wait(600, 1000.0) == 0


def test_dynserve_key_creates_a_key_that_the_gate_accepts(tmp_path: Path) -> None:
    path = tmp_path / "keys"

    def key(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dynserve", "key", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    secret = key("--name", "ann", "--rpm", "5", "--file", str(path)).stdout.strip()
    assert path.stat().st_mode & 0o777 == 0o600 and secret not in path.read_text()
    assert Gate(str(path), 1).enter(bearer(secret)).name == "ann"
    again = key("--name", "ann", "--file", str(path))
    assert again.returncode == 2 and "ann is listed twice" in again.stderr
    shown = key("--name", "bob", "--priority", "3").stdout
    assert shown.startswith("sk-dyn-") and "bob sha256:" in shown and "priority=3" in shown
    for name in ("two words", "#x", ""):
        wrong = key("--name", name)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and not wrong.stdout
    path.write_bytes(b"\xff\xfe")
    broken = key("--name", "cy", "--file", str(path))
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
