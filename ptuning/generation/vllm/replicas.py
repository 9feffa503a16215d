"""The vLLM servers behind this one: which are up, how busy, and which gets a request."""

import hashlib
import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ptuning.errors import ConfigError

log = logging.getLogger("ptuning.serving.vllm")

POLL_SECONDS = 1.0
_PATIENCE = 5.0  # for /health and /v1/models
_EVEN = 1.25  # a prefix stays where it is cached until that replica has so many times the average to do
_FEW = 8  # answers that are no load


def headers(key: str | None) -> dict[str, str]:
    """Of every request to a vLLM with this --api-key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@dataclass(eq=False)
class Replica:
    """One vLLM server.

    Args:
        url: without a slash at the end.
        up: its /health said so when it was asked last, and no request has failed since.
        running: answers that this server waits for from it.
    """

    url: str
    up: bool = True
    running: int = 0
    changed: threading.Event = field(default_factory=threading.Event, repr=False)


class Replicas:
    """All of them. `start` begins to watch, `close` ends it.

    Args:
        urls: of the servers, which have the same model.
        headers: of every request, such as an API key.
    """

    def __init__(self, urls: Sequence[str], headers: dict[str, str]):
        self.all = [Replica(url.rstrip("/")) for url in urls]
        self.headers = headers
        self._closed = threading.Event()

    @property
    def alive(self) -> bool:
        return any(replica.up for replica in self.all)

    @property
    def urls(self) -> str:
        return ", ".join(replica.url for replica in self.all)

    def describe(self) -> dict[str, Any]:
        """The entry of the base in /v1/models: `max_model_len`, `root`.

        Raises:
            ConfigError: one doesn't answer, or they disagree.
        """
        found = []
        for replica in self.all:
            try:
                reply = httpx.get(f"{replica.url}/v1/models", headers=self.headers, timeout=_PATIENCE)
                reply.raise_for_status()
                entry = next(one for one in reply.json()["data"] if not one.get("parent"))
                found.append({"max_model_len": int(entry["max_model_len"]), "root": entry.get("root")})
            except httpx.TransportError as error:
                log.warning("vLLM doesn't answer", extra={"fields": {"url": replica.url, "reason": repr(error)}})
                replica.up = False
            except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, StopIteration) as error:
                raise ConfigError(
                    f"--vllm_url {replica.url}: answers, but not as vLLM does ({error!r}); give the address of vLLM's own server "
                    "(and its key: --vllm_key)"
                ) from error
        if not found:
            raise ConfigError(
                f"--vllm_url: nothing answers at {self.urls}; start vLLM first, which takes minutes with a large model (bash "
                "scripts/serve_vllm.sh starts both)"
            )
        lengths = {one["max_model_len"] for one in found}
        if len(lengths) > 1:
            raise ConfigError(
                f"--vllm_url: the replicas have different --max-model-len ({', '.join(map(str, sorted(lengths)))}); start all of "
                "them alike"
            )
        return found[0]

    def choose(self, key: str, without: Collection[Replica]) -> Replica | None:
        """Where to ask; None: nowhere.

        What has a key goes to the same replica as long as that isn't much busier than the others, because its blocks are
        cached there (rendezvous hashing with bounded loads); everything else to the least busy one.

        Args:
            key: digest of a prefix; empty: none.
            without: that have been tried.
        """
        ready = [replica for replica in self.all if replica.up and replica not in without]
        if not ready:
            return None
        if key:
            home = max(ready, key=lambda replica: hashlib.sha256(f"{key} {replica.url}".encode()).digest())
            average = sum(replica.running for replica in ready) / len(ready)
            if home.running <= max(_EVEN * average, _FEW):
                return home
        return min(ready, key=lambda replica: replica.running)

    def lost(self, replica: Replica) -> None:
        """A connection to it has failed; it is asked nothing until its /health answers."""
        if replica.up:
            log.warning("vLLM is down", extra={"fields": {"url": replica.url}})
        replica.up = False
        replica.changed.set()

    def start(self) -> None:
        for replica in self.all:
            threading.Thread(target=self._watch, args=(replica,), name="ptuning-vllm-health", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        for replica in self.all:
            replica.changed.set()

    def _watch(self, replica: Replica) -> None:
        with httpx.Client(headers=self.headers, timeout=_PATIENCE) as client:
            while not self._closed.is_set():
                replica.changed.clear()
                try:
                    up = client.get(f"{replica.url}/health").status_code == 200
                except httpx.HTTPError:
                    up = False
                if up != replica.up:
                    log.warning(f"vLLM is {'up' if up else 'down'}", extra={"fields": {"url": replica.url}})
                replica.up = up
                if replica.changed.wait(POLL_SECONDS) and not self._closed.is_set():
                    self._closed.wait(POLL_SECONDS / 10)  # just lost: it is asked soon, and not without end
