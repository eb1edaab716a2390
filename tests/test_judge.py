"""The judge against a real local HTTP server that misbehaves in every way a server can."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from vigos_jax.errors import InputError
from vigos_jax.judge import Item, Judge, parse_verdicts

KEY = "sk-secret-123"
ITEMS = [Item(f"Q{i}?", str(i), str(i if i % 2 else -i - 1)) for i in range(7)]  # right where i is odd


class Server(http.server.ThreadingHTTPServer):
    """Answers as `script` says, call by call; then rightly. A script entry: a function of the handler and the items."""

    daemon_threads = True

    def __init__(self, script=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = list(script), [], threading.Lock()
        self.busy = self.most_busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        items = json.loads(body["messages"][1]["content"])
        with self.server.lock:
            self.server.seen.append((items, self.headers["Authorization"]))
            step = self.server.script.pop(0) if self.server.script else None
            self.server.busy += 1
            self.server.most_busy = max(self.server.busy, self.server.most_busy)
        try:
            (step or right)(self, items)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def reply(self, text: str) -> None:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def send(self, code: int, value, **headers) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)


def verdict_text(items) -> str:
    return json.dumps({"verdicts": [x["answer"] == x["reference"] for x in items]})


def right(handler, items):
    handler.reply(verdict_text(items))


def fenced(handler, items):
    handler.reply(f"```json\n{verdict_text(items)}\n```")


def too_many_requests(handler, items):
    handler.send(429, {"error": {"message": "slow down"}}, Retry_After="0.05")


def server_error(handler, items):
    handler.send(500, {"error": {"message": "oops"}})


def unauthorised(handler, items):
    handler.send(401, {"error": {"message": "no"}})


def slow_down(handler, items):
    handler.send(429, {"error": {"message": "slow down"}}, Retry_After="1.5")


def half_a_body(handler, items):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "9")
    handler.end_headers()
    handler.wfile.write(b'{"choices')


def value(reply):
    return lambda handler, items: handler.send(200, reply)


def reset(handler, items):
    handler.connection.close()


def hang(handler, items):
    threading.Event().wait(1.5)


def text(reply):
    return lambda handler, items: handler.reply(reply)


@contextlib.contextmanager
def serving(*script):
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


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
