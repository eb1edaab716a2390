"""`ServerEngine`: an `engine.Engine` that samples on inference servers (vLLM, SGLang); see docs/servers.md.

A request has token ids and images already resized for the model; a reply has token ids and log-probabilities. Each
process sends requests for its own rows, to its own share of the servers.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vigos_jax.method.rows import Row
from vigos_jax.models.positions import visual_token_count
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import EngineFailed, Sampled
from vigos_jax.rollouts.sampler import Completions
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.rollouts.server_adapters import Adapters, Student, together
from vigos_jax.rollouts.server_client import (
    Failed,
    Rejected,
    Server,
    ServerPool,
    ServersLost,
    Unwell,
    health_of,
    open_servers,
)
from vigos_jax.rollouts.server_images import png_uri
from vigos_jax.rollouts.server_protocol import DIALECTS, Answer, Prompt, Rules, check_answer
from vigos_jax.rollouts.server_start import base_name, served_by
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.distributed import exchange, process
from vigos_jax.runtime.sharding import path_string
from vigos_jax.session import Session

Array = jax.Array
_LEAST_MOVE = 0.05  # nats of log-probability, assumed to exceed bfloat16 noise between equal requests (not measured)


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """A batch that servers are sampling.

    Attributes:
      student: what answers; it is not unloaded before `finish`.
      rows: indices, into the prepared rows, of those that were sent: good rows only.
      calls: one future per entry of `rows`; a single one that raises if the batch was refused.
      count: the number of prepared rows, bad ones included.
    """

    student: Student
    rows: tuple[int, ...]
    calls: "list[Future[Answer | Failed]]"
    count: int


class ServerEngine:
    """An `Engine` whose completions come from the servers of `config.rollout`.

    Args:
      workdir: the run's folder, where adapters are written unless `config.rollout.adapter_dir` names another; None
        where there is none.

    Raises:
      EngineFailed: a server of this process is not well or does not serve the base model; raised in all processes.
    """

    def __init__(self, session: Session, sampling: Sampling, *, config: Any, workdir: pathlib.Path | None):
        r = config.rollout
        self._session, self._sampling, self._dialect = session, sampling, DIALECTS[r.engine]
        servers = share_of(open_servers(config), number=process(), count=jax.process_count())
        health = health_of(self._dialect.health)
        self._pool = ServerPool(servers, concurrency=r.concurrency, retries=r.retries, health=health)
        base = base_name(config)
        served = together(lambda: [served_by(server, self._dialect, base) for server in servers])
        self._base_names = frozenset(name for one in served for name in one.names)
        self._context = min(one.context for one in served)
        folder = r.adapter_dir or (workdir / files.ADAPTERS if workdir is not None else "")
        place = pathlib.Path(folder).expanduser().absolute() if folder else None
        self._adapters = Adapters(session, self._dialect, self._pool, folder=place, base=base)
        self._must_prove_vision = session.model.lora is not None and bool(session.model.lora.vision)
        self._unproved: Any = None  # the latest adapter, until servers are shown to apply its vision-tower part

    def prepare(self, rows: Sequence[Row]) -> list[Prompt | str | None]:
        """For each row: the `Prompt` to send, a text that says why it cannot be sent, or None if the row is bad."""
        return [None if row.student is None else self._prompt(row) for row in rows]

    def sync(self, trained: Variables, *, step: int = 0) -> None:
        """Makes this student the current one: its adapter is loaded on the servers under a new name; `{}` is the base.

        Raises:
          EngineFailed: all weights are trained, or the adapter cannot be written or loaded.
        """
        self._adapters.publish(trained, step=step)
        if self._must_prove_vision and "lora" in trained:
            self._unproved = trained["lora"]

    def start(self, prepared: list[Prompt | str | None], keys: Array) -> Ticket:
        """Sends a batch's requests, to be answered by the current student, without waiting for the replies.

        Args:
          prepared: from `prepare`, for this process's rows.
          keys: [B], one per row of the global batch.

        Returns:
          A ticket for `finish`. If a row cannot be sent, this process sends none of its rows, and `finish` raises the
          reason in all processes.

        Raises:
          EngineFailed: a server ignores adapters of the vision tower.
        """
        if refused := [p for p in prepared if isinstance(p, str)]:
            prepared = [None] * len(prepared)  # nothing is sampled; `finish` tells all processes
        if self._unproved is not None:
            self._prove_vision(prepared)
        seeds = row_seeds(keys)[self._session.own_rows(len(keys))]
        rows = tuple(i for i, prompt in enumerate(prepared) if prompt is not None)
        student = self._adapters.current
        student.users += 1

        def call(server: Server, number: int) -> Answer | Failed:
            i = rows[number]
            prompt: Any = prepared[i]
            return self._ask(server, prompt, int(seeds[i]), student, self._sampling)

        def refuse(server: Server, number: int) -> Answer | Failed:
            raise EngineFailed(refused[0])

        calls = self._pool.start(refuse, 1) if refused else self._pool.start(call, len(rows))
        return Ticket(student, rows, calls, len(prepared))

    def finish(self, ticket: Ticket) -> Sampled:
        """Waits for the completions of a batch begun by `start`, in the order of its rows.

        A row whose own request failed has an empty completion and its reason in `Completions.failed`.

        Raises:
          EngineFailed: in all processes: a row could not be sent, a reply breaks the rules of `check_answer`, or
            (`ServersLost`) all of a process's rows failed or no server answers.
          Stopped: a signal arrived.
        """
        try:
            answers = together(lambda: self._answers(ticket))
        finally:
            ticket.student.users -= 1
        ids: list[tuple[int, ...]] = [()] * ticket.count
        logps: list[tuple[float, ...]] = [()] * ticket.count
        failed: list[str | None] = [None] * ticket.count
        for i, answer in zip(ticket.rows, answers, strict=True):
            if isinstance(answer, Failed):
                failed[i] = answer.reason
            else:
                ids[i], logps[i] = answer.ids, answer.logps
        return Sampled(Completions(tuple(ids), tuple(logps), tuple(failed)), ticket.student.step)

    def sample(self, prepared: list[Prompt | str | None], keys: Array) -> Sampled:
        """The completions of this process's rows: `start`, then `finish`; arguments and errors are theirs."""
        return self.finish(self.start(prepared, keys))

    def stream(self, prepared: list[Prompt | str | None], keys: Array) -> Iterator[Completions]:
        """Yields the completions of `sample` once, complete: servers are not asked to stream."""
        yield self.sample(prepared, keys).completions

    def close(self) -> None:
        """Ends requests, unloads the adapters and deletes their folders."""
        self._pool.close()
        self._adapters.close()

    def _answers(self, ticket: Ticket) -> list[Answer | Failed]:
        """One per row that was sent; ServersLost if all of them failed."""
        answers = self._pool.wait(ticket.calls)
        reasons = [a.reason for a in answers if isinstance(a, Failed)]
        if reasons and len(reasons) == len(answers):
            raise ServersLost(f"config.rollout.urls: all {len(reasons)} rows of a batch failed; one said: {reasons[0]}")
        return answers

    def _ask(self, server: Server, prompt: Prompt, seed: int, student: Student, sampling: Sampling) -> Answer | Failed:
        """Sends one row's request. If the server lacks the adapter, loads it and sends the request once more."""
        d, ends = self._dialect, self._session.processor.eos_ids
        body = d.request(prompt, student.name, student.is_adapter, sampling, seed, ends)
        try:
            reply = server.ask("POST", d.generate, body)
        except Rejected as e:
            if not student.is_adapter or not d.is_unknown(e.status, e.message):
                raise
            self._adapters.ensure(server, student)  # a restarted server has lost its adapters
            reply = server.ask("POST", d.generate, body)
        try:
            answer = d.read(reply)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise Unwell(f"{server.url}: the reply has another shape: {e!r}") from e
        reason = check_answer(answer, prompt, self._rules(student, sampling), url=server.url)
        return answer if reason is None else Failed(reason)

    def _prove_vision(self, prepared: Sequence[Prompt | str | None]) -> None:
        """Checks once that every server applies adapters of the vision tower, as some drop them silently.

        With an adapter that makes the tower's output useless, the first greedy token of a row with an image must
        differ, or its log-probability must change by at least `_LEAST_MOVE`. The check waits for a batch in which
        every process has a row with an image.

        Raises:
          EngineFailed: a server ignores the adapter.
        """
        prompt = next((p for p in prepared if isinstance(p, Prompt) and p.images), None)
        if not all(exchange(prompt is not None)):
            return
        probe = self._adapters.add(vision_probe(self._unproved), step=0)

        def compare() -> None:
            for server in self._pool.servers:
                base, blind = (self._first_token(server, prompt, s) for s in (self._adapters.base(), probe))
                if base.ids == blind.ids and abs(base.logps[0] - blind.logps[0]) < _LEAST_MOVE:
                    raise EngineFailed(
                        f"{server.url} does not apply adapters of the vision tower (config.lora.scope=official): start "
                        "vLLM with --enable-tower-connector-lora; choices: config.lora.scope=language"
                    )

        try:
            together(compare)
        finally:
            self._adapters.remove(probe)
        self._unproved, self._must_prove_vision = None, False

    def _first_token(self, server: Server, prompt: Any, student: Student) -> Answer:
        greedy = Sampling(max_tokens=1, temperature=0.0)
        answer = self._pool.retried(lambda s: self._ask(s, prompt, 0, student, greedy), server)
        if isinstance(answer, Failed):
            raise EngineFailed(f"the check of the vision tower's adapters failed: {answer.reason}")
        return answer

    def _rules(self, student: Student, sampling: Sampling) -> Rules:
        p = self._session.processor
        return Rules(
            names=frozenset((student.name,)) if student.is_adapter else self._base_names,
            stop_ids=p.eos_ids,
            vocab_size=self._session.config.vocab_size,
            max_tokens=sampling.max_tokens,
            pads=frozenset() if self._dialect.keeps_pads else frozenset((p.image_token_id,)),
        )

    def _prompt(self, row: Row) -> Prompt | str:
        processor, expanded = self._session.processor, row.prompt.ids
        if any(image.label is not None for image in row.images):
            return "config.rollout.engine: servers are sent images only, and a row has a video; choices: native"
        if (n := len(expanded) + self._sampling.max_tokens) > self._context:
            return (
                f"a prompt of {len(expanded)} tokens and a completion of {self._sampling.max_tokens} (max_tokens) are "
                f"{n}, and the servers' context holds {self._context} (vLLM: --max-model-len)"
            )
        counts = [visual_token_count(image.grid, processor.merge_size) for image in row.images]
        ids = one_pad_each(expanded, counts, pad=processor.image_token_id)
        return Prompt(ids, expanded, tuple(png_uri(image, processor) for image in row.images))


def one_pad_each(ids: Sequence[int], counts: Sequence[int], *, pad: int) -> tuple[int, ...]:
    """Replaces the pads of each image, one per visual token, by a single pad: servers expand it again.

    Args:
      counts: visual tokens of each image, in order; their sum must be the number of pads in `ids`.
      pad: the id of the image pad.
    """
    out: list[int] = []
    left, i = iter(counts), 0
    while i < len(ids):
        out.append(ids[i])
        i += next(left) if ids[i] == pad else 1
    return tuple(out)


def vision_probe(lora: Any) -> Any:
    """`lora` with a large random B in the vision tower and B = 0 elsewhere, so that only the tower is changed."""

    def draw(path: tuple[Any, ...], x: Array) -> Array:
        name = path_string(path)
        if not name.endswith("/b"):
            return x
        b = 0.5 * jax.random.normal(jax.random.key(0), x.shape) if "visual/" in name else jnp.zeros(x.shape)
        return jax.device_put(b, x.sharding)

    return jax.tree_util.tree_map_with_path(draw, lora)


def row_seeds(keys: Array) -> np.ndarray:
    """int32 [B] from random keys [B]: equal keys, equal seeds. Servers take whole numbers of at least 0."""
    bits = jax.vmap(jax.random.bits)(keys)  # uint32
    return np.asarray(jax.device_get(bits) >> 1, np.int32)


def share_of(servers: Sequence[Server], *, number: int, count: int) -> list[Server]:
    """The servers that process `number` uses: every `count`-th, or all if there are fewer servers than that."""
    return list(servers[number::count]) if len(servers) >= count else list(servers)
