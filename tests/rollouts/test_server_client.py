"""Calls to servers: retries, failover, bounds, and what a server that misbehaves in every way does to them."""

import socket
import time
import types

import policy_server
import pytest
from policy_server import FakePolicy, PolicyServer, serving

from vigos_jax.errors import InputError, Stopped
from vigos_jax.rollouts import server_client
from vigos_jax.rollouts.engine import EngineFailed
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.rollouts.server_client import Failed, Server, ServerPool, ServersLost, health_of, key_of, split_url
from vigos_jax.rollouts.server_protocol import DIALECTS, Prompt

VLLM = DIALECTS["vllm"]
KEY = 'a-"secret"-key'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_client, "_FIRST_WAIT", 0.01)


@pytest.fixture
def policy():
    return FakePolicy(types.SimpleNamespace(image_token_id=-1, merge_size=2))


def body(seed):
    prompt = Prompt((1, 2), (1, 2), ())
    return VLLM.request(prompt, "base", False, Sampling(max_tokens=8), seed, (3,))


def call(server, number):
    return VLLM.read(server.ask("POST", VLLM.generate, body(number)))


def pool_of(*servers, concurrency=2, retries=3, timeout=5.0, key=""):
    own = [Server(getattr(s, "url", s), timeout=timeout, key=key) for s in servers]
    return ServerPool(own, concurrency=concurrency, retries=retries, health=health_of("/health"))


def run(pool, count=4):
    try:
        return pool.wait(pool.start(call, count))
    finally:
        pool.close()


def first_ids(answers):
    return [answer.ids[0] for answer in answers]


def nowhere():
    """An address that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


FAULTS = ("too_many_requests", "server_error", "half_a_body", "reset")


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_asked_again(policy, name, capsys):
    with serving(policy, *[getattr(policy_server, name)] * 2) as server:
        assert first_ids(run(pool_of(server))) == [0, 1, 2, 3]
        assert len(server.seen) == 6
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and server.url in warnings[0]  # said once


@pytest.mark.parametrize("reply", [[], {}, {"choices": []}, {"choices": [{"token_ids": "ab"}]}, "x"])
def test_a_reply_of_another_shape_is_none(policy, reply):
    with serving(policy, *[policy_server.value(reply)] * 99) as server:
        wanted = server_client.Unwell if not isinstance(reply, dict) else (KeyError, ValueError, TypeError)
        with pytest.raises(wanted):
            call(Server(server.url, timeout=5.0, key=""), 0)


def test_what_does_not_pass_fails_its_row_alone(policy):
    with serving(policy, *[policy_server.server_error] * 4, policy_server.refused(400, "too long")) as server:
        answers = run(pool_of(server, concurrency=1))
        assert len(server.seen) == 4 + 1 + 2
    assert isinstance(answers[0], Failed) and "503: oops" in answers[0].reason
    assert isinstance(answers[1], Failed) and "400: too long" in answers[1].reason
    assert first_ids(answers[2:]) == [2, 3]


def test_a_slow_server_is_left_after_the_timeout(policy):
    with serving(policy, policy_server.hang) as server:
        start = time.monotonic()
        assert first_ids(run(pool_of(server, timeout=0.2), 1)) == [0]
    assert time.monotonic() - start < 0.9


def test_calls_go_to_a_server_that_is_well(policy):
    with serving(policy) as server:
        assert first_ids(run(pool_of(nowhere(), server, retries=1), 20)) == [k % 97 for k in range(20)]
        assert len(server.seen) == 20


def test_no_server_gets_more_at_a_time_than_it_may(policy):
    def slow(handler, right):
        time.sleep(0.02)
        right()

    with serving(policy, *[slow] * 99) as a, serving(policy, *[slow] * 99) as b:
        run(pool_of(a, b, nowhere(), concurrency=3), 24)
        assert a.most_busy == b.most_busy == 3
        assert len(a.seen) > 6 and len(b.seen) > 6


def test_servers_that_are_lost_end_the_batch():
    a, b = nowhere(), nowhere()
    start = time.monotonic()
    with pytest.raises(ServersLost, match="no server of config.rollout.urls answers") as e:
        run(pool_of(a, b), 50)
    assert a in str(e.value) and b in str(e.value) and time.monotonic() - start < 3


def test_a_server_that_comes_back_goes_on(policy):
    server = PolicyServer(policy).start()
    pool, port = pool_of(server, retries=8), server.server_address[1]
    assert first_ids(pool.wait(pool.start(call, 2))) == [0, 1]
    server.stop()
    calls = pool.start(call, 2)
    time.sleep(0.05)
    again = PolicyServer(policy, port=port).start()
    assert first_ids(pool.wait(calls)) == [0, 1]
    pool.close()
    again.stop()


def test_a_signal_ends_the_wait(policy, monkeypatch):
    def hang(handler, right):
        time.sleep(8)

    with serving(policy, *[hang] * 9) as server:
        pool = pool_of(server, timeout=60.0)
        calls = pool.start(call, 4)
        monkeypatch.setattr(server_client.signals, "asked", lambda: "SIGINT")
        start = time.monotonic()
        with pytest.raises(Stopped, match="SIGINT"):
            pool.wait(calls)
        assert all(c.done() for c in calls) and time.monotonic() - start < 2
        pool.close()


def test_a_key_is_sent_and_never_shown(policy, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    assert key_of("MY_KEY") == KEY and key_of("") == ""
    with serving(policy, key=KEY) as server:
        assert first_ids(run(pool_of(server, key=KEY), 2)) == [0, 1]
        with pytest.raises(EngineFailed, match="401.*key_env") as e:
            run(pool_of(server, key="wrong-key"))
        assert "wrong-key" not in str(e.value) + capsys.readouterr().err
    for value in ("", "two\nlines", "\u00e9"):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(InputError, match="MY_KEY"):
            key_of("MY_KEY")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:99999", "http://a?b=c", "file:///x", 7]
)
def test_an_address_must_be_one(url):
    with pytest.raises(InputError, match=r"config\.rollout\.urls"):
        split_url(url)


def test_a_password_is_not_shown():
    with pytest.raises(InputError, match="key_env") as e:
        split_url("http://user:hunter2@host")
    assert "hunter2" not in str(e.value)
    assert split_url("https://host:8443/prefix/").path == "/prefix/"


def test_waits():
    assert [server_client._seconds(x) for x in (None, "2", "-1", "Wed, 21 Oct", "1e9")] == [0, 2, 0, 0, 120]
    assert server_client._backoff(30) == 30.0
