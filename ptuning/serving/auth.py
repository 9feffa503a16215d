"""Who may ask: keys, compared in constant time, before a body is read."""

import hmac

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ptuning.serving.faults import Fault

OPEN = ("/health",)  # for load balancers; it says nothing about anybody's requests
ADMIN = "/v1/prefixes"


class KeyCheck:
    """Lets through what carries the right key.

    Every route but /health needs `api_key` where there is one, /metrics too. Adding and removing prefixes needs `admin_key`,
    and isn't possible without one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, admin_key: str | None):
        self.app, self.api_key, self.admin_key = app, api_key, admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (fault := self._fault(Request(scope))) is not None:
            await fault.response(scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _fault(self, request: Request) -> Fault | None:
        path = request.scope["path"]
        if path in OPEN:
            return None
        needed = self.api_key
        if path == ADMIN or path.startswith(ADMIN + "/"):
            needed = self.admin_key
            if needed is None:
                return Fault(
                    403, "prefixes can't be changed: the server was started without --admin_key", "no_admin_key"
                )
        if needed is None or _same(_given(request), needed):
            return None
        return Fault(
            401,
            f"wrong or missing {'admin' if needed is self.admin_key else 'API'} key; send it as `Authorization: Bearer KEY`",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _given(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, needed: str) -> bool:
    return hmac.compare_digest(given.encode(), needed.encode())
