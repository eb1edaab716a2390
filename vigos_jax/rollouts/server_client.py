"""HTTP client for inference servers: concurrent calls, retries, failover and timeouts; independent of their protocol.

A call is a function of a `Server`. It can fail in three ways: `Unwell` (connection, timeout, 429, 5xx, incomplete
reply), which is retried, perhaps on another server; `Rejected` (other 4xx), where the request is at fault; or
EngineFailed, which ends everything.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from vigos_jax.errors import InputError, Stopped, one_line
from vigos_jax.rollouts.engine import EngineFailed
from vigos_jax.runtime import signals
from vigos_jax.runtime.progress import say

T = TypeVar("T")
_PASSES = (408, 409, 425, 429)  # client errors that a later attempt may not meet
_FIRST_WAIT = 1.0  # seconds before the second attempt; doubles
_LONGEST_WAIT = 30.0
_LONGEST_ASKED_WAIT = 120.0  # of a Retry-After
_HEALTH_SECONDS = 5.0  # for a server to say that it is well
_CONNECT_SECONDS = 10.0
_MAX_REPLY = 2**28  # bytes
_POLL_SECONDS = 0.2  # between looks at whether a signal came


class ServersLost(EngineFailed):
    """No server answers."""


class Unwell(Exception):
    """A server that did not answer as a server does.

    Attributes:
      wait: seconds that it asked for.
      status: of its reply; 0 where there was none.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, status: int = 0):
        super().__init__(reason)
        self.wait, self.status = wait, status


class Rejected(Exception):
    """A server's answer that it will not do this request."""

    def __init__(self, status: int, message: str):
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Failed:
    """In place of a call's result: why it has none."""

    reason: str


class Server:
    """One server: its address and health.

    Attributes:
      url: base URL, without a trailing slash.
      busy: number of calls in flight.
      failures: consecutive failures.
      well_at: when it may be called again, by `time.monotonic`; in the past if it is healthy.
    """

    def __init__(self, url: str, *, timeout: float, key: str):
        parts = split_url(url)
        self.url, self._timeout, self._key = url.rstrip("/"), timeout, key
        self._host, self._is_tls = parts.netloc, parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._open: set[socket.socket] = set()
        self.busy, self.failures, self.well_at = 0, 0, 0.0

    def request(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> tuple[str, Any]:
        """(text of the reply, its JSON or None where it is none) of a request that was answered with 200.

        Raises:
          Unwell, Rejected: see the module.
        """
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            with self._connected(self._timeout if timeout is None else timeout) as connection:
                connection.request(method, self._path + path, body=data, headers=headers)
                reply = connection.getresponse()
                text = _read(reply, self._timeout if timeout is None else timeout).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException) as e:
            raise Unwell(f"{self.url}: {self._shown(one_line(e))}") from e
        if reply.status != 200:
            raise self._error(reply, text)
        try:
            return text, json.loads(text)
        except (ValueError, RecursionError):
            return text, None

    def ask(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> dict[str, Any]:
        """The JSON object that `request` is answered with; Unwell for anything else."""
        text, value = self.request(method, path, body, timeout=timeout)
        if not isinstance(value, dict):
            raise Unwell(f"{self.url}{path}: the reply is not a JSON object: {self._shown(text)[:80]!r}")
        return value

    def cut(self) -> None:
        """Ends the requests under way: nobody waits for them any more."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it; to close would not

    @contextlib.contextmanager
    def _connected(self, timeout: float) -> Iterator[http.client.HTTPConnection]:
        """A connection of its own for one request: a server may restart between two."""
        options: Any = {"timeout": min(timeout, _CONNECT_SECONDS)}
        if self._is_tls:
            connection = http.client.HTTPSConnection(self._host, context=ssl.create_default_context(), **options)
        else:
            connection = http.client.HTTPConnection(self._host, **options)
        try:
            connection.connect()
            opened: Any = connection.sock
            opened.settimeout(timeout)
            self._open.add(opened)
            try:
                yield connection
            finally:
                self._open.discard(opened)
        finally:
            connection.close()

    def _error(self, reply: http.client.HTTPResponse, text: str) -> Exception:
        message = self._shown(_message(text))
        if reply.status in (401, 403):
            return EngineFailed(
                f"{self.url} answers {reply.status}: {message}; config.rollout.key_env must name the environment "
                "variable that holds its key"
            )
        if reply.status in _PASSES or reply.status >= 500:
            wait = _seconds(reply.getheader("Retry-After"))
            return Unwell(f"{self.url} answers {reply.status}: {message}", wait=wait, status=reply.status)
        return Rejected(reply.status, message)

    def _shown(self, text: str) -> str:
        """One line without the key, which a server may quote."""
        text = " ".join(text.split())
        for key in {self._key, json.dumps(self._key)[1:-1]} - {""}:
            text = text.replace(key, "***")
        return text[:300]


class ServerPool:
    """The servers of this process, and calls to them, `concurrency` at a time to each.

    Args:
      retries: further attempts of a call.
      health: (server) -> None; raises Unwell where it is not well.
    """

    def __init__(self, servers: Sequence[Server], *, concurrency: int, retries: int, health: Callable[[Server], Any]):
        self.servers = tuple(servers)
        self._concurrency, self._retries, self._health = concurrency, retries, health
        self._guard = threading.Condition()
        self._is_cut = threading.Event()
        self._told: set[str] = set()
        self._threads = concurrent.futures.ThreadPoolExecutor(concurrency * len(self.servers), "rollout")

    def start(self, call: Callable[[Server, int], T], count: int) -> "list[concurrent.futures.Future[T | Failed]]":
        """Begins call(server, number) for each number below `count`, on whichever server is least busy."""
        self._is_cut.clear()
        return [self._threads.submit(self._attempts, call, i) for i in range(count)]

    def wait(self, calls: "Sequence[concurrent.futures.Future[T | Failed]]") -> list[T | Failed]:
        """Results of calls begun by `start`.

        Raises:
          ServersLost: no server is well; the calls under way are ended.
          Stopped: a signal came; likewise.
          EngineFailed: raised by a call; likewise.
        """
        try:
            pending = set(calls)
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, timeout=_POLL_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                for call in done:
                    call.result()  # raises what it raised
                if pending and (name := signals.asked()):
                    raise Stopped(f"{name}: stopped while servers were sampling")
            return [call.result() for call in calls]
        except BaseException:
            self.cut(calls)
            raise

    def cut(self, calls: "Sequence[concurrent.futures.Future[Any]]") -> None:
        """Ends calls that nobody waits for any more."""
        self._is_cut.set()
        for call in calls:
            call.cancel()
        for server in self.servers:
            server.cut()
        concurrent.futures.wait(calls, timeout=_HEALTH_SECONDS)

    def close(self) -> None:
        """Ends all calls and threads."""
        self._is_cut.set()
        for server in self.servers:
            server.cut()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def retried(self, call: Callable[[Server], T], server: Server) -> T:
        """The result of a call to this very server; ServersLost when all attempts met an `Unwell`."""
        reason = ""
        for attempt in range(self._retries + 1):
            try:
                return call(server)
            except Unwell as e:
                reason = str(e)
                if attempt < self._retries:
                    self._pause(max(e.wait, _backoff(attempt)))
        raise ServersLost(f"{reason}; it did not answer {self._retries + 1} times (config.rollout.retries)")

    def _attempts(self, call: Callable[[Server, int], T], number: int) -> T | Failed:
        reason, server = "", None
        for attempt in range(self._retries + 1):
            server = self._take(avoided=server)
            if server is None:
                break
            try:
                result = call(server, number)
                server.failures, server.well_at = 0, 0.0
                return result
            except Rejected as e:
                return Failed(f"{server.url} answers {e}")
            except Unwell as e:
                reason, asked = str(e), e.wait
            finally:
                with self._guard:
                    server.busy -= 1
                    self._guard.notify()
            wait = self._note(server, reason, asked)
            if attempt < self._retries and not any(s.well_at <= time.monotonic() for s in self.servers):
                self._pause(wait)
        if not self._is_cut.is_set() and not any(map(self._is_well, self.servers)):
            names = ", ".join(s.url for s in self.servers)
            raise ServersLost(f"no server of config.rollout.urls answers ({names}); the last said: {reason}")
        return Failed(reason or "it was ended")

    def _take(self, *, avoided: Server | None) -> Server | None:
        """Waits for a free slot on the least busy healthy server (on any if none is healthy); None after `cut`.

        Args:
          avoided: the server that has just failed the call; taken only if there is no other.
        """
        with self._guard:
            while not self._is_cut.is_set():
                now = time.monotonic()
                well = [s for s in self.servers if s.well_at <= now] or self.servers
                server = min([s for s in well if s is not avoided] or well, key=lambda s: s.busy)
                if server.busy < self._concurrency:
                    server.busy += 1
                    return server
                self._guard.wait(_POLL_SECONDS)
        return None

    def _note(self, server: Server, reason: str, asked: float) -> float:
        """Keeps a server that failed out of the way for a while; returns the seconds."""
        with self._guard:
            wait = max(asked, _backoff(server.failures))
            if server.well_at <= time.monotonic():  # calls that fail together are one failure
                server.failures += 1
                server.well_at = time.monotonic() + wait
            is_new = server.url not in self._told
            self._told.add(server.url)
        if is_new and not self._is_cut.is_set():
            say(f"warning: {reason}; asked again in {wait:.0f} s")
        return wait

    def _pause(self, seconds: float) -> None:
        self._is_cut.wait(seconds)

    def _is_well(self, server: Server) -> bool:
        try:
            self._health(server)
        except (Unwell, Rejected):
            return False
        return True


def _read(reply: http.client.HTTPResponse, timeout: float) -> bytes:
    """The body, within the time and the size that a reply may have."""
    deadline, parts, size = time.monotonic() + timeout, [], 0
    while chunk := reply.read1(2**16):
        parts.append(chunk)
        size += len(chunk)
        if time.monotonic() > deadline or size > _MAX_REPLY:
            raise TimeoutError(f"the reply did not end within {timeout:g} s and {_MAX_REPLY} bytes")
    return b"".join(parts)


def split_url(url: Any) -> urllib.parse.SplitResult:
    """The parts of a server's address; InputError unless it is one."""
    parts = urllib.parse.urlsplit("")
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if isinstance(url, str) and "@" in url:  # not shown: it may be a password
        raise InputError("config.rollout.urls must hold no user or password, as it is shown; the key is key_env's")
    if not is_good or parts.query or parts.fragment:
        raise InputError(f"config.rollout.urls has {url!r}; each must be a base address, like http://localhost:8000")
    return parts


def key_of(key_env: str) -> str:
    """The servers' key from the environment, "" for none; InputError where the variable holds none."""
    key = os.environ.get(key_env, "").strip() if key_env else ""
    if key_env and (not key or not key.isascii() or not key.isprintable()):
        raise InputError(f"config.rollout.key_env={key_env!r}: this variable must hold the key (printable ASCII)")
    return key


def open_servers(config) -> list[Server]:
    """All servers of `config.rollout`."""
    r = config.rollout
    key = key_of(r.key_env)
    return [Server(url, timeout=r.timeout, key=key) for url in dict.fromkeys(r.urls)]


def health_of(path: str) -> Callable[[Server], Any]:
    """Asks a server whether it is well."""
    return lambda server: server.request("GET", path, timeout=_HEALTH_SECONDS)


def _backoff(attempt: int) -> float:
    return min(_FIRST_WAIT * 2.0 ** min(attempt, 30), _LONGEST_WAIT)


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or 0), 0.0), _LONGEST_ASKED_WAIT)
    except ValueError:  # a date
        return 0.0


def _message(text: str) -> str:
    """What a reply that is an error says, whatever its form."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value)
