"""An ASGI middleware around the HTTP proxy of Ray Serve: limits a body in bytes and time, and completes its errors.

It runs in the proxy, so that a body that is too large or too slow reaches no replica. What it refuses it passes on as
an empty request with a header, so that the front answers and counts it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from fora_trt.serve.api import AWAY, INTERNAL, ApiError, Limits, away

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

REFUSED = b"x-fora-refused"
"""Header in which the guard tells the front the status of a request that it refuses."""

DROPPED = frozenset(
    [
        REFUSED,
        b"x-request-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
    ]
)
"""Headers that direct Ray Serve; a client has no say in them. Names are compared with `-` for `_`."""

LIMITS = "FORA_TRT_SERVE_GUARD"
"""Variable of the environment with the limits of the guard, as JSON."""

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable of the environment that names the function whose middlewares Ray Serve puts around its proxy."""

LINGER = 10.0
"""Seconds in which the rest of a refused body is read and dropped, so that the client reads its answer."""


def environment_of(limits: Limits) -> dict[str, str]:
    """The variables that put the guard around the proxies of a cluster."""
    told = {"body_bytes": limits.body_bytes, "body_seconds": limits.body_seconds}
    return {CALLBACK: f"{__name__}:middlewares", LIMITS: json.dumps(told)}


def middlewares() -> list[Any]:
    """The guard, for Ray Serve."""
    from starlette.middleware import Middleware

    return [Middleware(Guard, limits=Limits(**json.loads(os.environ.get(LIMITS, "{}"))))]


class Guard:
    """Reads a body before the app sees it, and sees to it that every answer with an error is JSON in OpenAI's form.

    `outer` is the guard in the proxy; the guard in the front takes over what that one refused.
    """

    def __init__(self, app: App, limits: Limits, outer: bool = True) -> None:
        self.app, self.limits, self.outer = app, limits, outer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.outer:
            kept = [
                (name, value) for name, value in scope["headers"] if name.lower().replace(b"_", b"-") not in DROPPED
            ]
            scope = {**scope, "headers": kept}
        answer = Answer(send)
        try:
            body = await self._body(scope, receive)
        except Gone:
            return
        except ApiError as error:
            headers = [*scope["headers"], (REFUSED, str(error.status).encode())]
            scope = {**scope, "headers": headers}
            body = b""
            answer.rest = receive if error.status == 413 else None
            answer.closes = True
        await self._passed(scope, body, receive, answer)

    async def _passed(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, answer: Answer) -> None:
        """Call the app with a body that is complete."""
        sent = False

        async def given() -> Message:
            nonlocal sent
            if sent:
                return await (receive() if answer.rest is None else asyncio.Future())
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self.app(scope, given, answer)
        except asyncio.CancelledError:
            raise
        except Exception:
            if answer.started:
                raise
        if not answer.started:  # the front died: Ray Serve answers nothing
            await answer.error(away())

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """The whole body. Raises `ApiError` for one that is too large or too slow, `Gone` without its client."""
        most = self.limits.body_bytes
        headers = {name.lower(): value for name, value in scope["headers"]}
        if REFUSED in headers:
            return b""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > most:
            raise ApiError(413, "")
        try:
            return await asyncio.wait_for(_read(receive, most), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "") from None


async def _read(receive: Receive, most: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > most:
            raise ApiError(413, "")
        more = message.get("more_body", False)
    return bytes(body)


class Gone(Exception):  # noqa: N818 # no error: a client may leave
    """The client went away while it sent its request."""


class Answer:
    """Sends the answer of the app; texts of Ray Serve with an error are replaced by JSON.

    `rest` reads what a refused client still sends; with `closes` the connection ends after the answer.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self._replaced = self.closes = False
        self.rest: Receive | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            if message["status"] >= 400 and not headers.get(b"content-type", b"").startswith(b"application/json"):
                self._replaced = True
                retry = headers.get(b"retry-after", b"1")
                await self.error(error_of_ray(message["status"], int(retry) if retry.isdigit() else 1))
                return
            self.started = True
            closes = [(b"connection", b"close")] if self.closes else []
            await self._send({**message, "headers": [*message["headers"], *closes]})
        elif not self._replaced:
            ends = not message.get("more_body", False)
            if ends and self.rest is not None:
                await self._send({**message, "more_body": True})
                await dropped(self.rest)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await self._send(message)

    async def error(self, error: ApiError) -> None:
        """Send an error."""
        self.started = True
        body = json.dumps(error.content()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        if self.closes:
            headers["connection"] = "close"
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def error_of_ray(status: int, retry_after: int) -> ApiError:
    """The error in OpenAI's form for a text of Ray Serve, whose words are for its operator."""
    if status == 429:
        return ApiError(429, "too many requests at once; send this one later", None, "queue_full", retry_after)
    if status == 404:
        return away()  # the routes of the application are not known yet
    if status in (408, 503):
        return away(AWAY, retry_after)
    return ApiError(500, INTERNAL)


async def dropped(receive: Receive) -> None:
    """Read the rest of a body, for `LINGER` seconds at most, and drop it."""

    async def all_of_it() -> None:
        while (message := await receive())["type"] != "http.disconnect" and message.get("more_body", False):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(all_of_it(), LINGER)
