"""The judge against a real local HTTP server that misbehaves in every way a server can."""

import threading
import time

import pytest
from judge_server import (
    fenced,
    half_a_body,
    hang,
    no_temperature,
    refused,
    reset,
    right,
    server_error,
    serving,
    slow_down,
    text,
    too_many_requests,
    value,
    verdict_text,
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


@pytest.mark.parametrize(
    "trouble, reason",
    [
        (too_many_requests, "the server says 429: slow down"),
        (server_error, "the server says 500: oops"),
        (reset, "APIConnectionError: "),
        (hang, "APITimeoutError: timed out (config.eval.judge.timeout=0.7)"),
        (text("no json"), "no reply of 3 holds 3 verdicts: it ends 'no json'"),
        (text(""), "no reply of 3 holds 3 verdicts: it has no text"),
    ],
    ids=["429", "500", "reset", "hang", "prose", "empty"],
)
def test_a_call_that_fails_for_good_gives_no_verdict(trouble, reason, capsys):
    """The first call's items are missing; the others' are there, and the reason is said."""
    with serving(*[trouble] * 3) as server:
        j = judge(server, concurrency=1, retries=2)
        assert dict(j.verdicts(ITEMS)) == {i: v for i, v in ALL.items() if i >= 3}
    assert j.reason.startswith(reason) and "not asked any more" not in j.reason
    assert capsys.readouterr().err == f"warning: config.eval.judge.url={server.url!r}: {j.reason}\n"


@pytest.mark.parametrize("code, calls", [(401, 1), (403, 1), (404, 1), (400, 2), (422, 2)])
def test_what_every_call_would_meet_ends_the_asking(code, calls, capsys):
    """Those that a parameter may be to blame for are asked once more, without the one that can be left out."""
    message = f"Incorrect API key provided: {KEY}. <b>\nSee our pages" if code == 401 else "no such model"
    with serving(*[refused(code, message)] * 50) as server:
        j = judge(server, batch=1, concurrency=1)
        assert dict(j.verdicts(ITEMS)) == dict(j.verdicts(ITEMS)) == {}
        assert len(server.seen) == calls
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"the server says {code}: " in said and "it is not asked any more" in said
    assert message.replace(KEY, "***").replace("\n", " ") in said and KEY not in said + j.reason


def test_a_call_refused_after_others_were_answered_is_one_calls_matter():
    """A text that is too long for the judge, or that its filter refuses."""
    too_long = [refused(400, "maximum context length")] * 2
    with serving(right, *too_long) as server:
        j = judge(server, concurrency=1)
        assert dict(j.verdicts(ITEMS)) == {i: v for i, v in ALL.items() if i not in (3, 4, 5)}
    assert j.reason == "the server says 400: maximum context length"


def test_only_the_first_reason_is_said(capsys):
    with serving(*[server_error] * 3, *[too_many_requests] * 3) as server:
        dict(judge(server, concurrency=1).verdicts(ITEMS))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "oops" in said


def test_a_server_that_takes_no_temperature(capsys):
    with serving(*[no_temperature] * 20) as server:
        j = judge(server, concurrency=1)
        assert dict(j.verdicts(ITEMS)) == ALL
        assert len(server.seen) == 4  # it is left out from then on
    assert j.reason == capsys.readouterr().err == ""


def test_a_model_that_thinks_aloud():
    def thinks(handler, items):
        draft = '{"verdicts": [' + ", ".join(["true"] * len(items)) + "]}"
        handler.reply(f"<think>\nPerhaps {draft}?\n</think>\nHere you are:\n```json\n{verdict_text(items)}\n```\nBye.")

    with serving(*[thinks] * 3) as server:
        assert dict(judge(server, retries=0).verdicts(ITEMS)) == ALL


def test_proxies_of_the_environment(monkeypatch):
    """The client goes by way of them, and so does the check; the address itself is reachable from nowhere."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as proxy:
        address = proxy.url.removesuffix("/v1")
        there = "http://judge.invalid/v1"
        options = {"model": "m", "key_env": "JUDGE_KEY", "batch": 3, "concurrency": 2, "timeout": 5, "retries": 0}
        with pytest.raises(InputError, match="'http://judge.invalid/v1' cannot be reached, and must be: "):
            Judge(url=there, **options).check()
        for name, value_ in (("HTTP_PROXY", address), ("HTTP_PROXY", address.removeprefix("http://"))):
            monkeypatch.setenv(name, value_)
            j = Judge(url=there, **options)
            j.check()
        assert dict(j.verdicts(ITEMS)) == ALL
        monkeypatch.setenv("HTTP_PROXY", f"http://user:{KEY}@127.0.0.1:9")
        with pytest.raises(
            InputError, match="cannot be reached by way of the proxy 127.0.0.1:9, and must be: "
        ) as error:
            Judge(url=there, **options).check()
        assert KEY not in str(error.value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        Judge(url=proxy.url, **options).check()


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
        ('Sure! {"verdicts": [true]} I hope {that} helps.', 1, [True]),
        ('{"verdicts": [true]} No: {"verdicts": [false]}', 1, [False]),
        ('{"verdicts": [true]} No: {"verdicts": [false, true]}', 1, None),  # the last one counts, and is no use
        ('{"verdicts": [true]} {"note": 1}', 1, [True]),
        ('{"answer": {"verdicts": [true]}}', 1, [True]),
        ('<think>{"verdicts": [true]}</think>{"verdicts": [false]}', 1, [False]),
        ('so {"verdicts": [true]}</think>\n\n{"verdicts": [false]}', 1, [False]),  # opened by the template
        ('<think>so {"verdicts": [true]}', 1, None),  # cut off
        ('{"a": ' * 20_000, 1, None),
        ("{" * 100_000 + '"verdicts"', 1, None),
    ],
)
def test_parse_verdicts(reply, count, verdicts):
    assert parse_verdicts(reply, count=count) == verdicts
