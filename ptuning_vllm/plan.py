"""What the scheduler does for a request with a prefix: it counts. It reads no file and never raises, because an exception there
ends vLLM for everybody; what is wrong with a request is found by the worker, and that request alone fails."""

from dataclasses import dataclass, field
from typing import Any

MALFORMED = ""  # in place of a digest


@dataclass
class Load:
    """One request's prefix, to be written into its blocks before the next step.

    Args:
        prefix: digest; MALFORMED: the request is to fail.
        length: T that the request says.
        first: position from which on; those before it are in vLLM's cache already.
        blocks: of the request.
    """

    prefix: str
    length: int
    first: int
    blocks: list[int] = field(default_factory=list)


def wanted(params: Any, salt: Any, prompt_tokens: int) -> tuple[str, int] | None:
    """Digest and length of the prefix that a request asks for; None: none.

    Args:
        params: its kv_transfer_params, whatever a client made of them.
        salt: its cache_salt. It must be the digest: else vLLM answers from the blocks of another prefix. With a point and
            more behind it, it shares no blocks with any other request.
        prompt_tokens: placeholders included.
    """
    if not isinstance(params, dict) or params.get("prefix") is None:
        return None
    prefix, length = params["prefix"], params.get("length")
    right = isinstance(prefix, str) and type(length) is int and 0 < length < prompt_tokens
    right = right and isinstance(salt, str) and salt.partition(".")[0] == prefix
    return (prefix, length) if right else (MALFORMED, 0)


class Plan:
    """The loads of the next step."""

    def __init__(self) -> None:
        self._loads: list[Load] = []

    def missing(self, asked: tuple[str, int] | None, computed: int, prompt_tokens: int) -> int:
        """Tokens that the worker will bring.

        Args:
            asked: of `wanted`.
            computed: that vLLM's cache has.
            prompt_tokens: of which vLLM must be left one to compute.
        """
        if asked is None:
            return 0
        prefix, length = asked
        if prefix == MALFORMED:
            return int(computed + 1 < prompt_tokens)  # one, which can't be brought: so the request fails
        return max(length - computed, 0)

    def add(self, asked: tuple[str, int] | None, brought: int, blocks: list[int]) -> None:
        """Takes down what was promised by `missing`, now that the request has its blocks."""
        if asked is not None and brought:
            prefix, length = asked
            self._loads.append(Load(prefix, length, max(length - brought, 0), blocks))

    def take(self) -> list[Load]:
        """The loads since the last call."""
        loads, self._loads = self._loads, []
        return loads
