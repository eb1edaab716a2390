"""The judge against a real local HTTP server that misbehaves in every way a server can."""

import threading
import time

import pytest
from judge_server import (
    fenced,
    half_a_body,
    hang,
    reset,
    right,
    server_error,
    serving,
    slow_down,
    text,
    too_many_requests,
    unauthorised,
    value,
)

from vigos_jax.errors import InputError
from vigos_jax.grading.judge import Item, Judge, parse_verdicts

KEY = "sk-secret-123"
ITEMS = [Item(f"Q{i}?", str(i), str(i if i % 2 else -i - 1)) for i in range(7)]  # right where i is odd


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


def judge(server, **options) -> Judge:
    fixed = {"model": "m", "key_env": "JUDGE_KEY", "batch": 3, "concurrency": 2, "timeout": 0.7, "retries": 2}
    return Judge(url=server.url, **fixed | options)


ALL = {i: i % 2 == 1 for i in range(7)}


def test_verdicts_come_in_batches_with_the_key():
    with serving() as server:
        j = judge(server)
        j.check()
        assert dict(j.verdicts(ITEMS)) == ALL
        assert sorted(len(items) for items, _ in server.seen) == [1, 3, 3]
        assert {authorization for _, authorization in server.seen} == {f"Bearer {KEY}"}
        assert list(j.verdicts([])) == []


@pytest.mark.parametrize(
    "trouble",
    [
        too_many_requests,
        server_error,
        reset,
        hang,
        fenced,
        text("{"),
        text("yes"),
        text('{"verdicts": [true]}'),
        text(""),
        half_a_body,
        value({}),
        value([1]),
        value({"choices": [{}]}),
        value({"choices": "none"}),
        value({"choices": [{"message": {"content": [1]}}]}),
    ],
    ids=[
        *("429", "500", "reset", "hang", "fenced", "broken", "prose", "wrong count", "empty", "no JSON", "object"),
        *("list", "no message", "no list", "no text"),
    ],
)
def test_trouble_that_passes(trouble):
    with serving(trouble) as server:
        assert dict(judge(server, concurrency=1).verdicts(ITEMS)) == ALL


@pytest.mark.parametrize("trouble", [too_many_requests, reset, unauthorised, text("no json")])
def test_a_call_that_fails_for_good_gives_no_verdict(trouble):
    """The first call's items are missing; the others' are there."""
    with serving(*[trouble] * (1 if trouble is unauthorised else 3)) as server:
        verdicts = dict(judge(server, concurrency=1, retries=2).verdicts(ITEMS))
        assert verdicts == {i: v for i, v in ALL.items() if i >= 3}


def test_retry_after_is_waited_for():
    with serving(slow_down) as server:
        start = time.monotonic()
        assert dict(judge(server, batch=7).verdicts(ITEMS)) == ALL
        assert time.monotonic() - start >= 1.5 and len(server.seen) == 2


def test_a_listener_that_leaves_cancels_the_calls_to_come():
    with serving() as server:
        verdicts = judge(server, batch=1, concurrency=1).verdicts(ITEMS * 20)
        next(verdicts)
        verdicts.close()
        assert len(server.seen) < 20


def test_concurrency_is_bounded():
    def slow(handler, items):
        threading.Event().wait(0.1)
        right(handler, items)

    with serving(*[slow] * 7) as server:
        assert dict(judge(server, batch=1, concurrency=3, timeout=5).verdicts(ITEMS)) == ALL
        assert 2 <= server.most_busy <= 3


def test_only_the_end_of_a_long_answer_is_sent():
    with serving() as server:
        list(judge(server).verdicts([Item("Q?", "x", "a" * 5000 + "x")]))
        assert server.seen[0][0][0]["answer"] == "a" * 1999 + "x"


def test_bad_settings(monkeypatch):
    with serving() as server:
        with pytest.raises(InputError, match="'NO_KEY': this environment variable must hold the key"):
            judge(server, key_env="NO_KEY")
        with pytest.raises(InputError, match="must name a server and its model"):
            judge(server, model="")
        there = judge(server)
    with pytest.raises(InputError, match="cannot be reached"):
        there.check()
    with pytest.raises(InputError) as error:
        Judge(url="http://", model="m", key_env="JUDGE_KEY", batch=1, concurrency=1, timeout=1, retries=0).check()
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "reply, count, verdicts",
    [
        ('{"verdicts": [true, false]}', 2, [True, False]),
        ('```\n{"verdicts": [true]}\n```', 1, [True]),
        ('{"verdicts": [1, 0]}', 2, None),
        ('{"verdicts": ["true"]}', 1, None),
        ('{"verdicts": {"0": true}}', 1, None),
        ("[true]", 1, None),
        ("[" * 100_000, 1, None),
        ('{"verdicts": []}', 0, []),
    ],
)
def test_parse_verdicts(reply, count, verdicts):
    assert parse_verdicts(reply, count=count) == verdicts
