"""A local inference server that speaks vLLM's and SGLang's routes, and misbehaves in every way a server can.

It is an implementation of its own: it expands pads, reads PNGs and loads PEFT folders itself. Behind it is a policy: a
model with this package's sampler, or a fake one that needs none.
"""

import base64
import contextlib
import dataclasses
import http.server
import io
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from vigos_jax.data.processor import EncodedImage, Processor, Turn
from vigos_jax.method.rows import Row
from vigos_jax.rollouts.engine import NativeEngine
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.session import Session, load
from vigos_jax.weights.adapters import adapter_spec, load_adapter


class FakePolicy:
    """A few tokens that depend on the seed alone, then the first end."""

    def __init__(self, processor: Processor, *, length: int = 3):
        self.processor, self._length = processor, length

    def answer(self, row: Row, adapter: pathlib.Path | None, sampling: Sampling, seed: int, ends: Sequence[int]):
        ids = [(seed + 7 * i) % 97 for i in range(min(self._length, sampling.max_tokens - 1))] + [ends[0]]
        return ids, [-0.5] * len(ids)


class ModelPolicy:
    """This package's sampler on a session's base, with adapters read from their folders."""

    def __init__(self, session: Session, *, batch: int):
        self.processor, self._session, self._batch = session.processor, session, batch
        self._engines: dict[Sampling, NativeEngine] = {}
        self._read: dict[pathlib.Path, Any] = {}

    @classmethod
    def of_config(cls, file: pathlib.Path, *, batch: int) -> "ModelPolicy":
        """The base of a config file's run without dropout, its programs compiled before a request waits for them."""
        names: dict = {}
        exec(compile(file.read_text(), "<config>", "exec"), names)
        config = names["get_config"]()
        config.lora.dropout = 0.0
        policy = cls(load(config, for_training=True), batch=batch)
        policy.answer(Row((), Turn((1, 2), ())), None, Sampling(**config.sampling), 0, policy.processor.eos_ids)
        return policy

    def answer(self, row: Row, adapter: pathlib.Path | None, sampling: Sampling, seed: int, ends: Sequence[int]):
        assert tuple(ends) == self._session.processor.eos_ids
        engine = self._engines.setdefault(sampling, NativeEngine(self._session, sampling))
        if adapter is not None and adapter not in self._read:
            self._read[adapter] = self._lora(adapter)
        engine.sync({} if adapter is None else {"lora": self._read[adapter]})
        keys = jnp.broadcast_to(jax.random.key(seed), (self._batch,))
        completions = engine.sample(engine.prepare([row, *[Row()] * (self._batch - 1)]), keys).completions
        return list(completions.ids[0]), list(completions.logps[0])

    def _lora(self, folder: pathlib.Path):
        spec = adapter_spec(folder, dropout=self._session.model.lora.dropout)
        assert spec == self._session.model.lora
        like = self._session.trained["lora"]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        shardings = jax.tree.map(lambda x: x.sharding, like)
        return load_adapter(folder, self._session.config, spec, abstract, shardings=shardings)


@dataclasses.dataclass
class Options:
    """How a server was started.

    Attributes:
      names: of the base; it answers under the first.
      is_stale: keeps answering with the first adapter that it ever loaded.
      drops_adapters: never applies one, without a word.
    """

    names: tuple[str, ...] = ("base",)
    key: str = ""
    context: int = 4096
    has_tokens: bool = True
    has_lora: bool = True
    most_rank: int = 64
    is_stale: bool = False
    drops_adapters: bool = False


class PolicyServer(http.server.ThreadingHTTPServer):
    """Answers `generate` as `script` says, request by request; then rightly.

    Attributes:
      seen: (path, body) of all POSTs.
      adapters: name -> folder of those that are loaded.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, policy: Any, script: Sequence[Callable] = (), *, port: int = 0, **options: Any):
        super().__init__(("127.0.0.1", port), Handler)
        self.policy, self.script, self.options = policy, list(script), Options(**options)
        self.seen: list[tuple[str, Any]] = []
        self.adapters: dict[str, pathlib.Path] = {}
        self.first: pathlib.Path | None = None
        self.lock, self.model_lock = threading.Lock(), threading.Lock()
        self.busy = self.most_busy = 0
        self.on_load: Callable[[pathlib.Path], None] = lambda folder: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[Any]:
        """Of the requests to a path, but for those that ask only whether it is there."""
        return [body for at, body in self.seen if at == path and body]

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""

    def start(self) -> "PolicyServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: PolicyServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        o = self.server.options
        if not self._may():
            return
        if self.path == "/health":
            self.text(200, "")
        elif self.path == "/v1/models":
            data = [{"id": n, "root": n, "parent": None, "max_model_len": o.context} for n in o.names]
            data += [{"id": n, "root": str(f), "parent": o.names[0]} for n, f in self.server.adapters.items()]
            self.send(200, {"object": "list", "data": data})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body))
        routes = {
            "/inference/v1/generate": (self.server.options.has_tokens, self._vllm),
            "/v1/load_lora_adapter": (self.server.options.has_lora, self._load),
            "/v1/unload_lora_adapter": (self.server.options.has_lora, self._unload),
            "/generate": (self.server.options.has_tokens, self._sglang),
            "/load_lora_adapter": (self.server.options.has_lora, self._load),
            "/unload_lora_adapter": (self.server.options.has_lora, self._unload),
        }
        is_there, route = routes.get(self.path, (False, None))
        if not self._may():
            return
        if not is_there:
            self.send(404, {"detail": "Not Found"})
        else:
            route(body)

    def _may(self) -> bool:
        key = self.server.options.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.send(401, {"error": {"message": f"Invalid key {self.headers['Authorization']}"}})
            return False
        return True

    # -- adapters ----------------------------------------------------------------------------------------------

    def _load(self, body):
        if "lora_name" not in body:
            self.error(400, "field required: lora_name")
            return
        name, folder = body["lora_name"], pathlib.Path(body["lora_path"])
        if name in self.server.adapters:
            self.error(400, f"The lora adapter '{name}' has already been loaded.")
        elif not (folder / "adapter_model.safetensors").is_file():
            self.error(404, f"No adapter found for '{folder}'")
        elif (rank := json.loads((folder / "adapter_config.json").read_text())["r"]) > self.server.options.most_rank:
            self.error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.server.options.most_rank}.")
        else:
            self.server.on_load(folder)
            self.server.first = self.server.first or folder
            self.server.adapters[name] = folder
            self.text(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body):
        if self.server.adapters.pop(body["lora_name"], None) is None:
            self.error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        else:
            self.text(200, "Success")

    def adapter(self, name: str | None) -> pathlib.Path | None:
        folder = self.server.adapters.get(name)
        if self.server.options.drops_adapters:
            return None
        return self.server.first if folder is not None and self.server.options.is_stale else folder

    # -- generate ----------------------------------------------------------------------------------------------

    def _vllm(self, body):
        if "token_ids" not in body:
            self.error(400, "field required: token_ids")
            return
        name = body["model"]
        if name not in (*self.server.options.names, *self.server.adapters):
            self.error(404, f"The model `{name}` does not exist.")
            return
        p = body["sampling_params"]
        assert p["ignore_eos"] and not p["min_tokens"] and not p["frequency_penalty"] and p["logprobs"] == 0
        sampling = sampling_of(p, max_tokens=p["max_tokens"])
        images = [part["url"] for part in body.get("content_parts", ())]
        self._answer(body["token_ids"], images, name, sampling, p["seed"], p["stop_token_ids"], self._as_vllm)

    def _sglang(self, body):
        name = body.get("lora_path")
        if name is not None and name not in self.server.adapters:
            self.error(400, f"The following requested LoRA adapters are not loaded: {name}")
            return
        p = body["sampling_params"]
        assert not p["ignore_eos"] and body["return_logprob"] and p["repetition_penalty"] == 1.0
        sampling = sampling_of(p, max_tokens=p["max_new_tokens"])
        images, ends = body.get("image_data", ()), p["stop_token_ids"]
        self._answer(body["input_ids"], images, name, sampling, p["sampling_seed"], ends, self._as_sglang)

    def _answer(self, ids, images, name, sampling, seed, ends, form):
        server = self.server
        with server.lock:
            step = server.script.pop(0) if server.script else None
            server.busy += 1
            server.most_busy = max(server.busy, server.most_busy)
        left: list[None] = []

        def leave() -> None:  # before the reply goes out: the client may ask for more as soon as it has it
            with server.lock:
                server.busy -= not left
                left.append(None)

        try:
            encoded = tuple(encode(uri, server.policy.processor) for uri in images)
            expanded = expand(ids, encoded, server.policy.processor)
            row = Row(encoded, Turn(expanded, ()))

            def right(self: "Handler" = self, **changes: Any) -> None:
                with server.model_lock:
                    out, logps = server.policy.answer(row, self.adapter(name), sampling, seed, ends)
                reason = "stop" if out[-1] in ends else "length"
                reply = {"ids": out, "logps": logps, "prompt": list(expanded), "reason": reason}
                reply |= {"model": name if name in server.adapters else server.options.names[0]}
                leave()
                self.send(200, form(reply | changes))

            (step or (lambda handler, right: right()))(self, right)
        finally:
            leave()

    @staticmethod
    def _as_vllm(a):
        content = [{"token_id": i, "logprob": p, "rank": 1} for i, p in zip(a["ids"], a["logps"], strict=False)]
        choice = {"index": 0, "finish_reason": a["reason"], "token_ids": a["ids"], "logprobs": {"content": content}}
        return {"request_id": "1", "model": a["model"], "prompt_token_ids": a["prompt"], "choices": [choice]}

    def _as_sglang(self, a):
        pad = self.server.policy.processor.image_token_id
        prompt = [10**6 + 1 if i == pad else i for i in a["prompt"]]  # a hash of the image
        pairs = [[p, i, None] for i, p in zip(a["ids"], a["logps"], strict=False)]
        meta = {"output_token_logprobs": pairs, "finish_reason": {"type": a["reason"]}}
        return {"text": "", "output_ids": a["ids"], "prompt_token_ids": prompt, "meta_info": meta}

    # -- replies -----------------------------------------------------------------------------------------------

    def error(self, code: int, message: str, **headers: str) -> None:
        self.send(code, {"error": {"message": message, "code": code}}, **headers)

    def send(self, code: int, value: Any, **headers: str) -> None:
        self.text(code, json.dumps(value), **headers)

    def text(self, code: int, text: str, **headers: str) -> None:
        data = text.encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


def sampling_of(p: Mapping[str, Any], *, max_tokens: int) -> Sampling:
    """The sampling of a request; a server's -1 for top_k is 0 here."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    return Sampling(max_tokens=max_tokens, top_k=max(p["top_k"], 0), **{name: p[name] for name in names})


def encode(uri: str, processor: Processor) -> EncodedImage:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.mode == "RGB"
    return processor.encode_image(image)


def expand(ids: Sequence[int], images: Sequence[EncodedImage], processor: Processor) -> tuple[int, ...]:
    """Every pad becomes as many as its image has visual tokens: all of them, as a server's own code does."""
    sizes = iter([image.grid[1] * image.grid[2] // processor.merge_size**2 for image in images])
    return tuple(i for one in ids for i in ([one] * next(sizes, 1) if one == processor.image_token_id else [one]))


# What a script is made of: functions of the handler and of what answers rightly, with changes.


def too_many_requests(handler, right):
    handler.error(429, "slow down", Retry_After="0.05")


def server_error(handler, right):
    handler.error(503, "oops")


def half_a_body(handler, right):
    handler.send_response(200)
    handler.send_header("Content-Length", "900")
    handler.end_headers()
    handler.wfile.write(b'{"choices')


def reset(handler, right):
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(handler, right):
    time.sleep(1.0)


def value(reply):
    return lambda handler, right: handler.send(200, reply)


def refused(code, message):
    return lambda handler, right: handler.error(code, message)


def changed(**fields):
    return lambda handler, right: right(**fields)


@contextlib.contextmanager
def serving(policy, *script, **options):
    server = PolicyServer(policy, script, **options).start()
    yield server
    server.stop()
