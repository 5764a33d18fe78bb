"""What every request passes: a limit on its body, a check of its host, an id, and a line in the log without people in it."""

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_body
from .keys import KeyFile
from .metrics import Metrics


logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ADMIN_ROUTES = "/v1/users/"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """
    What one server takes on.

    Args:
        max_body_bytes (`int`): Of a request; a larger one gets status 413.
        max_admin_body_bytes (`int`): Of a request that brings users' pairs.
        max_prompt_tokens (`int`): Of one prompt, where the model does not have fewer positions; status 400.
        max_tokens (`int`): Of one answer; status 400.
        default_tokens (`int`): Of one answer where the request does not say.
        max_answers (`int`): Answers in progress and waiting together; status 503.
        max_answers_per_key (`int`): The same for one API key; status 429.
        max_seconds (`float`): Of one request; status 504. A server that is told to stop waits as long.
        max_body_seconds (`float`): Until a body has come; status 408.
    """

    max_body_bytes: int = 1_000_000
    max_admin_body_bytes: int = 64_000_000
    max_prompt_tokens: int = 32_768
    max_tokens: int = 4096
    default_tokens: int = 256
    max_answers: int = 512
    max_answers_per_key: int = 256
    max_seconds: float = 300.0
    max_body_seconds: float = 30.0


class Gate:
    """
    The outermost part of the server.

    Args:
        app (`ASGIApp`): What is behind it.
        limits ([`Limits`]): Those of bodies hold here.
        metrics ([`Metrics`]): Counts requests.
        keys ([`KeyFile`], *optional*): Administrators may send larger bodies. Where there are no keys, the `Host` must be this
            machine: a page in a browser could reach the server under a name of its own otherwise.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, keys: KeyFile | None) -> None:
        self.app, self.limits, self.metrics, self.keys = app, limits, metrics, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499  # as it is known: the client has gone before there was a status

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            max_bytes = self._max_bytes(scope, headers)
            refusal = self._refusal(headers, max_bytes)
            if refusal is not None:
                await refusal(scope, receive, send_with_id)
            else:
                await self.app(scope, self._limited(receive, max_bytes), send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            logger.info("%s %s %s %d %.3f s", request_id, scope["method"][:10], route, status, seconds)

    def _max_bytes(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        if self.keys is not None and scope["path"].startswith(ADMIN_ROUTES):
            key = self.keys.find_in_header(headers.get(b"authorization", b"").decode("latin-1"))
            if key is not None and key.is_admin:
                return self.limits.max_admin_body_bytes
        return self.limits.max_body_bytes

    def _refusal(self, headers: dict[bytes, bytes], max_bytes: int) -> JSONResponse | None:
        if self.keys is None and _host_name(headers.get(b"host", b"")) not in LOOPBACK:
            message = "The server has no keys, so it answers this machine only. Ask it as localhost, or start it with --keys."
            return JSONResponse(error_body(403, message), 403)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:18]) > max_bytes:
            return JSONResponse(error_body(413, _too_large(max_bytes)), 413, {"Connection": "close"})
        return None

    def _limited(self, receive: Receive, max_bytes: int) -> Receive:
        """`receive` that lets no more than the body that is allowed through, and not too slowly."""
        num_bytes, is_whole = 0, False
        deadline = time.monotonic() + self.limits.max_body_seconds

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes now is that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - time.monotonic()))
            except TimeoutError as error:
                raise HTTPException(408, "The body of the request did not come in time.") from error
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > max_bytes:
                raise HTTPException(413, _too_large(max_bytes), {"Connection": "close"})
            return message

        return limited


def _too_large(max_bytes: int) -> str:
    return f"The body of the request is larger than {max_bytes} bytes, the most that this server takes."


def _host_name(host: bytes) -> Any:
    """
    The name in a `Host` header, without the port.

    ```python
    >>> _host_name(b"localhost:8000"), _host_name(b"[::1]:8000"), _host_name(b"evil.example")
    ('localhost', '::1', 'evil.example')
    ```
    """
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]
