"""Whether the servers of a config are there and can do what a run needs: found out before anything is loaded."""

import dataclasses

from vigos_jax.errors import InputError
from vigos_jax.rollouts.engine import EngineFailed
from vigos_jax.rollouts.server_client import Rejected, Server, Unwell, health_of, open_servers
from vigos_jax.rollouts.server_protocol import DIALECTS, Dialect
from vigos_jax.runtime.progress import say

_SECONDS = 30.0  # of a question about what is served


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
      names: of the base.
      context: tokens of prompt and completion.
    """

    names: tuple[str, ...]
    context: float


def base_name(config) -> str:
    """What the servers must call the base model."""
    return config.rollout.model or config.model.path


def served_by(server: Server, dialect: Dialect, name: str) -> Served:
    """What a server says of itself; EngineFailed unless it is well and serves `name`."""
    try:
        health_of(dialect.health)(server)
        listed = server.ask("GET", dialect.models, timeout=_SECONDS)["data"]
        bases = {entry["id"]: entry for entry in listed if entry.get("parent") is None}
    except (Unwell, Rejected) as e:
        raise EngineFailed(f"config.rollout.urls must be servers that are well: {e}") from e
    except (KeyError, TypeError, AttributeError) as e:
        raise EngineFailed(f"config.rollout.urls: {server.url}{dialect.models} lists no models: {e!r}") from e
    if name not in bases:
        choices = ", ".join(map(repr, bases)) or "none"
        raise EngineFailed(f"{server.url} does not serve config.rollout.model={name!r}; choices: {choices}")
    lengths = [entry.get("max_model_len") for entry in bases.values()]
    return Served(tuple(bases), min((n for n in lengths if isinstance(n, int)), default=float("inf")))


def check_servers(config, *, trains: bool) -> None:
    """Raises InputError unless the servers of `config.rollout` are there and can do what is asked of them.

    Args:
      trains: whether a run's adapter will be loaded on them.
    """
    r, kind = config.rollout, config.model.quantization
    dialect = DIALECTS[r.engine]
    if not r.urls:
        raise InputError(f"config.rollout.engine={r.engine} needs config.rollout.urls, like ('http://localhost:8000',)")
    if trains and not (config.lora.rank or config.model.adapter):
        raise InputError(
            f"config.rollout.engine={r.engine} takes adapters, and config.lora.rank=0 trains all weights; choices: "
            "config.lora.rank above 0, config.rollout.engine=native"
        )
    if kind != "none":
        raise InputError(
            f"config.rollout.engine={r.engine}: servers hold the base as it is, and config.model.quantization={kind} "
            "another one; choices: config.model.quantization=none, config.rollout.engine=native"
        )
    for field, why in dialect.refuses.items():
        neutral = 1.0 if field == "repetition_penalty" else 0.0
        if config.sampling[field] != neutral:
            raise InputError(f"config.sampling.{field}={config.sampling[field]!r} must be {neutral:g}: {why}")
    servers = open_servers(config)
    for server in servers:
        served_by(server, dialect, base_name(config))
        for path, needed in dialect.probes if trains else dialect.probes[:1]:
            _probe(server, path, needed)
    say(f"rollouts by {len(servers)} {r.engine} server(s), the base called {base_name(config)!r}")


def _probe(server: Server, path: str, needed: str) -> None:
    """EngineFailed where a route is missing; what it says to an empty request does not matter."""
    try:
        server.request("POST", path, {}, timeout=_SECONDS)
    except Rejected as e:
        if e.status in (404, 405):
            raise EngineFailed(f"{server.url} has no {path}: start it with {needed}") from e
    except Unwell as e:
        if not e.status:
            raise EngineFailed(f"config.rollout.urls must be servers that are well: {e}") from e
