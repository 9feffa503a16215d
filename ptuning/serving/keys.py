"""Who asks: keys with names, checked before a body is read, and how many answers each may have under way."""

import hmac
from collections import Counter
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ptuning.serving.backend import Busy
from ptuning.serving.bodies import error_response
from ptuning.serving.errors import ApiError
from ptuning.serving.key_file import Key

OPEN = ("/health",)  # for load balancers; it says nothing about requests
ADMIN = "/v1/prefixes"


class KeyCheck:
    """Lets through what carries a right key, compared in constant time.

    Every route but /health needs one where there are any, /metrics too. Adding and removing prefixes needs `admin_key`, and
    isn't possible without one. Whatever answers a request has `hold` are given back when it ends, however it ends.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key], admin_key: str | None, rest: tuple[str, ...]):
        self.app, self.keys, self.admin_key, self.rest = app, keys, admin_key, rest
        self.held: Counter[str] = Counter()  # answers under way, by the key's name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        if (error := self._refusal(request)) is not None:
            request.state.error = error.code
            await error_response(error, scope["path"], self.rest)(scope, receive, send)
            return
        place = request.state.place = _Place(self.held, getattr(request.state, "found_key", None))
        try:
            await self.app(scope, receive, send)
        finally:
            place.give_back()

    def _refusal(self, request: Request) -> ApiError | None:
        path = request.scope["path"]
        if path in OPEN:
            return None
        given = _given(request)
        if path == ADMIN or path.startswith(ADMIN + "/"):
            if self.admin_key is None:
                text = "prefixes can't be changed: the server was started without --admin_key"
                return ApiError(403, text, "no_admin_key")
            return None if _same(given, self.admin_key) else _wrong("admin")
        if not self.keys:
            return None
        right = [key for key in self.keys if _same(given, key.secret)]  # all of them, whichever it is
        if not right:
            return _wrong("API")
        request.state.found_key, request.state.key = right[0], right[0].name
        return None


class _Place:
    """The answers that one request has under way."""

    def __init__(self, held: Counter[str], key: Key | None):
        self.held, self.key, self.count = held, key, 0

    def hold(self, count: int) -> None:
        if self.key is None:
            return
        limit, there = self.key.answers, self.held[self.key.name]
        if limit is not None and there + count > limit:
            if count > limit:
                text = (
                    f"{count} answers are asked for at once and key {self.key.name!r} may have {limit}; ask for fewer"
                )
                raise ApiError(400, text, param="n")
            raise Busy(
                f"{there} answers of key {self.key.name!r} run or wait and {count} more are asked for, its limit is {limit}; "
                "ask again later",
                retry_after=1,
            )
        self.held[self.key.name] += count
        self.count += count

    def give_back(self) -> None:
        if self.key is not None:
            self.held[self.key.name] -= self.count
        self.count = 0


def hold(request: Request, count: int) -> None:
    """Takes places for answers from the share of the request's key, until the request ends.

    Raises:
        ApiError: the key has no more (429), or never has as many (400).
    """
    place = getattr(request.state, "place", None)
    if place is not None:
        place.hold(count)


def _wrong(kind: str) -> ApiError:
    return ApiError(
        401,
        f"wrong or missing {kind} key; send it as `Authorization: Bearer KEY`",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _given(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, needed: str) -> bool:
    return hmac.compare_digest(given.encode(), needed.encode())
