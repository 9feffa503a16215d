"""Why a request can't be answered, as clients see it. Nothing of HTTP's libraries: the terminal's chat has such errors too."""

from collections.abc import Mapping

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
}


class ApiError(Exception):
    """A request that can't be answered.

    Args:
        status: of HTTP.
        message: value, limit and fix.
        code: a word for programs.
        param: the field at fault.
        kind: OpenAI's `type`; default: the status's.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "invalid_value",
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.kind = kind or _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
