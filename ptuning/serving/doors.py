"""Who may knock: the names under which this server is asked for, and the web pages that may ask it.

A web page of anybody's can make the browser of somebody on this machine send requests to 127.0.0.1. Two checks, before
anything else looks at a request, keep it out (a program that isn't a browser is not meant, and sends neither header):

* `Host` must be a name of this server. Else a page of evil.example, whose name is made to point to 127.0.0.1 after it was
  loaded (DNS rebinding), is of the same origin as the API and reads the answers.
* `Origin`, or `Sec-Fetch-Site` where a browser sends only that, must be this server's own or allowed by --cors_origin. Else a form
  on any page occupies the model, although the page can't read the answer.
"""

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ptuning.serving.bodies import error_response
from ptuning.serving.errors import ApiError

ANY = "*"


class Door:
    """ASGI middleware that refuses foreign hosts and foreign web pages with a 403.

    Args:
        app: what lies behind.
        host: the address that is listened on.
        allowed_hosts: further names of this server; `*.example.com` allows all below, `*` any.
        origins: web origins whose pages may ask; `*` any.
        rest: routes of the REST contract, whose errors have its shape.
    """

    def __init__(
        self, app: ASGIApp, host: str, allowed_hosts: Sequence[str], origins: Sequence[str], rest: tuple[str, ...]
    ):
        self.rest = rest
        self.app, self.names, self.origins = app, HostNames(host, allowed_hosts), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope))) is not None:
            scope.setdefault("state", {})["error"] = error.code
            await error_response(error, scope["path"], self.rest)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            return ApiError(400, "the request has several Host headers; send one", "several_hosts")
        host = hosts[0] if hosts else ""
        if host and not self.names.include(host):  # a client of HTTP/1.0 sends none, and browsers always one
            name = _shown(host)
            return ApiError(
                403,
                f"this server isn't known as {name}; ask for it by its address, or start it with --allowed_host NAME if it "
                "has that name",
                "host_not_allowed",
                kind="permission_error",
            )
        origin = headers.get("origin")
        if ANY in self.origins or origin in self.origins:
            return None
        if origin is not None:
            foreign, shown = not host or _netloc(origin) != host.lower(), _shown(origin)
        else:
            foreign, shown = headers.get("sec-fetch-site", "") in ("cross-site", "same-site"), "another site"
        if not foreign:
            return None
        return ApiError(
            403,
            f"web pages of {shown} may not use this server; start it with --cors_origin ORIGIN to allow them",
            "origin_not_allowed",
            kind="permission_error",
        )


class HostNames:
    """The names by which a server may be asked for: those of loopback, the address it listens on, and what is allowed beside.

    A server that listens on all addresses of a machine is also known by any address and by the machine's name: an address
    can't be made to point elsewhere.
    """

    def __init__(self, host: str, allowed: Sequence[str]):
        everywhere = host in ("0.0.0.0", "::", "")
        self.addresses = everywhere
        self.names = {"localhost", *(name.lower().rstrip(".") for name in allowed)}
        self.names |= {socket.gethostname().lower()} if everywhere else {host.lower()}

    def include(self, host: str) -> bool:
        """Whether a Host header, with or without a port, names this server."""
        name = _name(host)
        if name is None:
            return False
        if ANY in self.names or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            parts = name.split(".")
            return any("*." + ".".join(parts[start:]) in self.names for start in range(1, len(parts)))
        return self.addresses or address.is_loopback

    def list(self) -> list[str]:
        """All that can be listed, for programs that have such a list themselves."""
        return sorted(self.names | {"127.0.0.1", "::1"})


def _name(host: str) -> str | None:
    """The name in a Host header, in small letters; None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    if parts.username is not None or parts.path or parts.query or parts.fragment or not parts.hostname:
        return None
    return parts.hostname.rstrip(".")


def _netloc(origin: str) -> str:
    """Host and port of an Origin header; empty for `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
