"""A local HTTP server that judges, and misbehaves in every way a server can."""

import contextlib
import http.server
import json
import threading


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
        self.body = body
        with self.server.lock:
            self.server.seen.append((items, self.headers["Authorization"]))
            step = self.server.script.pop(0) if self.server.script else None
            self.is_busy, self.server.busy = True, self.server.busy + 1
            self.server.most_busy = max(self.server.busy, self.server.most_busy)
        try:
            (step or right)(self, items)
        finally:
            self.end_request()

    def end_request(self) -> None:
        with self.server.lock:
            self.server.busy -= self.is_busy
            self.is_busy = False

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
        self.end_request()  # before the client has the whole reply and can send its next request
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


def refused(code, message):
    return lambda handler, items: handler.send(code, {"error": {"message": message}})


def no_temperature(handler, items):
    """As reasoning models' servers do."""
    if "temperature" in handler.body:
        handler.send(400, {"error": {"message": "Unsupported parameter: 'temperature'"}})
    else:
        right(handler, items)


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
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
