"""The HTTP front: one deployment that answers every request, with authentication, errors, health and metrics.

It knows no model: it hands a request to the deployment of the model, through the queue of Ray Serve.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from email.message import Message
from typing import TYPE_CHECKING, Any

from fora_trt.serve.api import INTERNAL, LARGEST_SEED, ApiError, Limits, Wanted, away, unprocessable, wanted_from
from fora_trt.serve.deployments import deployments_of, running_replicas
from fora_trt.serve.guard import REFUSED, Guard, Receive, Send
from fora_trt.serve.metrics import Latest, Metrics
from fora_trt.serve.replica import Reply

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOG = logging.getLogger("ray.serve")

GENERATIONS = "/v1/images/generations"
MODELS = "/v1/models"
UNCOUNTED = ("/health", "/metrics")
"""Routes that are no requests of clients: supervisors call them."""

DRAINED = "the server is about to end and takes no new requests; send this one elsewhere or later"
LARGEST_DRAWN = 2**31
"""Seeds that the server draws are below: JavaScript reads them without loss."""

LONGEST_ABSENCE = 90.0
"""Seconds that a request waits while no replica of its model runs; a replica starts in less."""

ABSENCE_PERIOD = 10.0
"""Seconds between two looks whether one runs."""

HEALTH_LASTS = 1.0
"""Seconds in which the state of the deployments is not asked for again."""

Handler = Callable[["Request"], Awaitable["Response"]]


class Front:
    """The deployment; `handles` are those of the models by name."""

    def __init__(self, application: str, handles: dict[str, Any], limits: Limits, keys: tuple[str, ...]) -> None:
        self.application, self.handles, self.limits, self.keys = application, handles, limits, keys
        self.metrics = Metrics(handles)
        self.created = int(time.time())
        self.draining = False
        self.pending = 0
        self.lasted: dict[str, float] = {}
        self._state: tuple[float, dict[str, int]] = (float("-inf"), {})
        self._asking = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> Guard:  # Ray Serve's name
        return Guard(self.asgi, self.limits, outer=False)

    async def drain(self) -> int:
        """Take no more requests for images; return how many are not answered yet."""
        self.draining = True
        return self.pending

    async def asgi(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request, and count it."""
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        request, began = Request(scope, receive), time.monotonic()
        request.state.model, request.state.accepted = "", False
        status = 499
        try:
            try:
                response = await self._answer(request)
            except ApiError as error:
                response = JSONResponse(error.content(), error.status, error.headers())
            except Exception:
                LOG.exception("a request failed")
                response = JSONResponse(ApiError(500, INTERNAL).content(), 500)
            status = response.status_code
            self._count(request, status, time.monotonic() - began)
            await response(scope, receive, send)
        finally:
            self.pending -= request.state.accepted
            if status == 499:
                self._count(request, status, time.monotonic() - began)

    def _count(self, request: Request, status: int, seconds: float) -> None:
        path, model = request.url.path, request.state.model
        if path in UNCOUNTED:
            return
        route = path if path in (GENERATIONS, MODELS) else "other"
        self.metrics.requests.labels(route, model, str(status)).inc()
        if status == 200 and model:
            self.metrics.seconds.labels(model).observe(seconds)
            self.lasted[model] = seconds

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path, "GET" if request.method == "HEAD" else request.method
        if path.startswith("/v1/"):
            self._authenticate(request)
        routes = self._routes(path)
        if not routes:
            raise ApiError(404, "there is no such path; see the API of this server", None, "not_found")
        if method not in routes:
            allowed = ", ".join(routes)
            raise ApiError(405, f"this path takes {allowed}", None, "method_not_allowed", allow=allowed)
        if refused := request.headers.get(REFUSED.decode()):
            raise self._refusal(refused)
        return await routes[method](request)

    def _routes(self, path: str) -> dict[str, Handler]:
        """The handlers of a path by method."""
        if path.startswith(f"{MODELS}/"):
            return {"GET": self._model}
        table: dict[str, dict[str, Handler]] = {
            GENERATIONS: {"POST": self._generations},
            MODELS: {"GET": self._models},
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
        }
        return table.get(path, {})

    def _refusal(self, status: str) -> ApiError:
        """What the guard refused."""
        if status == "408":
            seconds = f"{self.limits.body_seconds:g}"
            return ApiError(408, f"the body did not arrive within {seconds} seconds", None, "timeout")
        return ApiError(413, f"the body has more than {self.limits.body_bytes} bytes", None, "too_large")

    def _authenticate(self, request: Request) -> None:
        if not self.keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).hexdigest()
        known = [hmac.compare_digest(digest, key) for key in self.keys]  # all of them, in equal time
        if kind.lower() != "bearer" or not any(known):
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", None, "invalid_api_key"
            )

    # --- images

    async def _generations(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        if self.draining:
            raise away(DRAINED, 5)
        _check_content(request.headers)
        wanted = wanted_from(await request.body(), self.limits)
        model = self._model_of(wanted)
        request.state.model = model
        seed = secrets.randbelow(LARGEST_DRAWN) if wanted.seed is None else wanted.seed
        assert seed + wanted.images - 1 <= LARGEST_SEED
        self.pending += 1
        request.state.accepted = True
        self.metrics.wait_for(model, wanted.images)
        try:
            reply = await self._replied(model, wanted, seed)
        finally:
            self.metrics.wait_for(model, -wanted.images, -1)
        self.metrics.replicas.keep(reply.replica, Latest(model, reply.number, reply.counts))
        if reply.error is not None:
            raise reply.error
        return JSONResponse({"created": int(time.time()), **(reply.answer or {})})

    def _model_of(self, wanted: Wanted) -> str:
        if wanted.model is None and len(self.handles) == 1:
            return next(iter(self.handles))
        if wanted.model is None:
            raise unprocessable("model", f"model is missing; give one of {', '.join(self.handles)}")
        if wanted.model not in self.handles:
            raise ApiError(404, "there is no model of this name; GET /v1/models lists them", "model", "model_not_found")
        return wanted.model

    async def _replied(self, model: str, wanted: Wanted, seed: int) -> Reply:
        """The reply of a replica. Raises `ApiError` if the queue is full or the replica died."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        try:
            fields = wanted.model_dump(exclude_none=True)
            asked = asyncio.ensure_future(_awaited(self.handles[model].generate.remote(fields, seed)))
            reply = await self._while_there(model, asked)
        except BackPressureError as error:
            after = max(1, min(60, math.ceil(self.lasted.get(model, 1.0))))
            many = f"the queue of {model} is full, with {self.limits.queue} requests; send this one later"
            raise ApiError(429, many, None, "queue_full", after) from error
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            LOG.warning("a replica of %s did not answer: %s", model, type(error).__name__)
            raise away(f"the replica of {model} that worked on this request ended; send it again") from error
        return reply

    async def _while_there(self, model: str, asked: asyncio.Future[Reply]) -> Reply:
        """The reply, unless no replica of the model runs for `LONGEST_ABSENCE`; then `ApiError` 503."""
        try:
            absent = 0.0
            while not (await asyncio.wait({asked}, timeout=ABSENCE_PERIOD))[0]:
                absent = 0.0 if (await self._running())[model] else absent + ABSENCE_PERIOD
                if absent >= LONGEST_ABSENCE:
                    raise away(f"no replica of {model} runs; send this request later", int(ABSENCE_PERIOD))
            return asked.result()
        finally:
            asked.cancel()

    # --- models, health and metrics

    async def _models(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self._about(name) for name in self.handles]})

    async def _model(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        name = request.url.path.removeprefix(f"{MODELS}/")
        if name not in self.handles:
            raise ApiError(404, "there is no model of this name; GET /v1/models lists them", "model", "model_not_found")
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "fora-trt"}

    async def _health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        running = await self._running()
        status = "draining" if self.draining else "ok" if all(running.values()) else "unavailable"
        return JSONResponse({"status": status, "replicas": running}, 200 if status == "ok" else 503)

    async def _running(self) -> dict[str, int]:
        """The number of running replicas of each model."""
        async with self._asking:
            if time.monotonic() - self._state[0] > HEALTH_LASTS:
                found = await asyncio.get_running_loop().run_in_executor(None, self._ask)
                self._state = time.monotonic(), found
        return self._state[1]

    def _ask(self) -> dict[str, int]:
        found = deployments_of(self.application, self.handles)
        return {name: running_replicas(one) for name, one in found.items()}

    async def _metrics(self, request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST
        from starlette.responses import Response

        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _awaited(response: Awaitable[Reply]) -> Reply:
    """What a deployment returns, as a coroutine: a response of Ray Serve is none."""
    return await response


def _check_content(headers: Mapping[str, str]) -> None:
    """Raise `ApiError` unless the body is said to be JSON in UTF-8; forms of foreign pages cannot say so."""
    given = Message()
    given["content-type"] = headers.get("content-type", "")
    if given.get_content_type() != "application/json" or given.get_content_charset("utf-8") not in ("utf-8", "utf8"):
        raise ApiError(415, "the body must be JSON in UTF-8: Content-Type: application/json", None, "unsupported_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body is compressed; send it as it is", None, "unsupported_encoding")


async def _lifespan(receive: Receive, send: Send) -> None:
    """Start and end, of which nothing depends."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
