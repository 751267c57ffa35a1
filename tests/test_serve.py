"""Serving over HTTP: requests, errors, limits, metrics; slow tests run Ray Serve, kill its processes and drain it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from fora_trt import Pipeline
from fora_trt.bundle import Bundle
from fora_trt.errors import BackendError, InputError, ScheduleError
from fora_trt.pipeline import PipelineConfig
from fora_trt.schedule import Schedule
from fora_trt.serve import application, server
from fora_trt.serve.api import ApiError, Limits, wanted_from
from fora_trt.serve.application import ServeConfig, digests_of, models_of
from fora_trt.serve.guard import Guard
from fora_trt.serve.replica import InBatches, Replica
from fora_trt.serve.requests import Served, checked_schedules
from tests.test_cli import fora

pytest.importorskip("prometheus_client")
pytest.importorskip("ray")
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from fora_trt.serve import front as front_module
from fora_trt.serve.batches import Counts
from fora_trt.serve.front import GENERATIONS, UNCOUNTED, Front, _check_content
from fora_trt.serve.metrics import Latest, Metrics

KEY = "a key of the tests"
STEPS = 4
GOOD = {"class_label": 3, "seed": 1, "num_inference_steps": STEPS}


# --- requests that are refused, by what is wrong with them


@dataclass(frozen=True)
class Bad:
    """A request that is refused: what is sent, the status, and the `param` of the error."""

    status: int
    param: str | None = None
    body: bytes | None = None
    path: str = GENERATIONS
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def bad_value(param: str, value: object, status: int = 422, **more: object) -> Bad:
    return Bad(status, param, json.dumps({**GOOD, param: value, **more}).encode())


WRONG_VALUES: dict[str, list[object]] = {
    "class_label": [10, -1, 2**70, 1.5, "3", True, [3], {}, "cat"],
    "n": [0, -1, 11, 1.5, "2", True, [1], {}, 10**30],
    "seed": [-1, 2**63, 1.5, "1", True, [1], {}],
    "num_inference_steps": [0, -5, 251, 10.5, "10", False, [10], {}],
    "guidance_scale": [-1, 100.5, 1e300, "2", True, [2.0], {}],
    "size": ["512x512", "8", "8x", "x8", "8x8x8", "0x0", "-8x8", "8 x 8", "9x8", 8, [8, 8], "8" * 300, ""],
    "schedule": [
        "fora", "fora:", "fora:x", "fora:0", "fora:-1", "fora:5", "fora:1,2", "even:0", "even:99", "dense:2,2",
        "dense:nan", "dense:2,inf", "full:1", "full:", "full:0,9", "none:1", "none,forecast=1", "fora:2,forecast=9",
        "fora:2,forecast=x",
        "fora:2,forecast=1,forecast=2", "", " ", "unknown", "unknown:3", "/etc/passwd", "/etc/passwd.json",
        "../../secret.json", "secret.json", "secret", "file:///etc/passwd", "fora:../../x.json",
        "~/.ssh/id", "\\\\host\\x.json",
        "C:\\x.json", "%2e%2e/secret.json", 3, ["fora:3"], {"fora": 3}, True, "x" * 257, "fora:" + "9" * 200,
        "full:" + ",".join(map(str, range(5000))),
    ],
    "prompt": ["a cat", 3, ["a"], {}, True, "x" * 4001, "\ud800", "a\x00b"],
    "negative_prompt": ["dogs", 3, ["a"], "x" * 4001],
    "response_format": ["url", "png", "", 3, ["b64_json"], "B64_JSON"],
    "output_format": ["jpeg", "webp", 3], "output_compression": [50, "100", 1.5], "background": ["transparent", 3],
    "moderation": ["low"], "quality": ["hd", "low", 1], "style": ["vivid", "natural", 1], "stream": [True, 1, "no"],
    "partial_images": [1, "0"], "user": [3, ["me"], "x" * 300],
    "model": [3, ["digits"], {}, True, "x" * 257, "\udfff"],
    "unknown": [1], "__class__": [{}], "steps": [4], "SEED": [1], "": [1],
}  # fmt: skip


def bad_requests() -> dict[str, Bad]:
    """Requests by what is wrong with them; those that need a socket of their own are elsewhere."""
    found = {
        f"{name} {k}": bad_value(name, one) for name, values in WRONG_VALUES.items() for k, one in enumerate(values)
    }
    good = json.dumps(GOOD).encode()
    found |= {f"not JSON {k}": Bad(400, None, body) for k, body in enumerate([
        b"", b"{", b"}", b"nonsense", b"{'seed': 1}", b'{"seed": }', b'{"seed": 1,}', good[:-1], good + b"x", good * 2,
        b"\xff\xfe", b'{"schedule": "\xff"}', good.decode().encode("utf-16"), good.decode().encode("utf-32"), b"\x00",
        b'{"guidance_scale": NaN}', b'{"guidance_scale": Infinity}', b'{"seed": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000, b'{"a":' * 50_000, b"null", b"3", b'"text"', b"[]", b"true", b"\xef\xbb\xbf" + good,
        b"\x1f\x8b\x08",
    ])}  # fmt: skip
    found |= {
        f"model {name}": bad_value("model", name, 404) for name in ("other", "DIGITS", "../digits", "/etc", "", "front")
    }
    found["half of a pair as a field"] = Bad(422, "\\ud800", b'{"\\ud800": 1, "class_label": 3}')
    found["infinite"] = Bad(422, "guidance_scale", b'{"class_label": 3, "guidance_scale": 1e999}')
    found["nothing given"] = Bad(422, "class_label", b"{}")
    found["prompt and label"] = bad_value("prompt", "a cat", seed=1)
    paths = ["/", "/v1", "/v1/", "/v1/images", "/v1/images/edits", "/v1/chat/completions", GENERATIONS + "/", "/docs",
             "/openapi.json", "/..%2f..%2fetc/passwd", "/%00", "/metrics/", "/V1/models", "//v1/models"]  # fmt: skip
    found |= {f"path {path}": Bad(404, None, good, path) for path in paths}
    found["no such model"] = Bad(404, "model", None, "/v1/models/other", "GET")
    found |= {
        f"{method} images": Bad(405, None, None, GENERATIONS, method)
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")
    }
    found |= {
        f"POST {path}": Bad(405, None, good, path)
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/pixels")
    }
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json",
             "application/jsonx", "application/json; charset=utf-16"]  # fmt: skip
    found |= {f"type {kind}": Bad(415, None, good, headers={"content-type": kind}) for kind in kinds}
    found |= {f"encoding {one}": Bad(415, None, good, headers={"content-encoding": one}) for one in ("gzip", "br", "x")}
    keys = [
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer x{KEY}",
        "Bearer " + "x" * 5000,
    ]
    found |= {f"key {key[:20]} {len(key)}": Bad(401, None, good, headers={"authorization": key}) for key in keys}
    found["large"] = Bad(413, None, b" " * (Limits().body_bytes + 1))
    found["just too large"] = Bad(413, None, good + b" " * Limits().body_bytes)
    return found


BAD = bad_requests()

SECRETS = ("Traceback", 'File "', "/tmp", "/root", "/home", "/etc/", ".py", "root:", KEY)  # noqa: S108 # only looked for
"""What no answer may hold."""


def check_refusal(bad: Bad, status: int, text: str, name: str) -> None:
    """The answer has the right status, OpenAI's form, and names nothing of the server."""
    assert status == bad.status, (name, status, text)
    error = json.loads(text)["error"]
    assert error.keys() == {"message", "type", "param", "code"}, name
    assert error["message"] and len(error["message"]) <= 1000, name
    assert error["param"] == bad.param, (name, error)
    for secret in SECRETS:
        assert secret not in text, (name, text)


def sent(client: Any, bad: Bad) -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}", **bad.headers}
    return client.request(bad.method, bad.path, content=bad.body, headers=headers)


# --- without Ray: the front and a replica in this process


class Handle:
    """Calls a replica as a handle of Ray Serve does."""

    def __init__(self, replica: Replica) -> None:
        self.generate = SimpleNamespace(remote=replica.generate)


@pytest.fixture(scope="module")
def replica(pixels: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    folder = tmp_path_factory.mktemp("schedules")
    Schedule.fora(STEPS, 2).to_file(folder / "named.json")
    config = PipelineConfig(pixels.folder, backend="onnxruntime", device="cpu", batch_size=4)
    return Replica(Served("pixels", config, checked_schedules((folder / "named.json",)), 4))


@pytest.fixture
def front(replica: Replica) -> Front:
    return Front("tests", {"pixels": Handle(replica)}, Limits(body_seconds=0.5), ())


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(Guard(front.asgi, front.limits), raise_server_exceptions=False) as client:
        yield client


def pictures_of(answer: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in answer["data"]]


def test_pictures_are_those_of_the_pipeline(client: TestClient, pixels: Bundle) -> None:
    asked = {
        **GOOD,
        "n": 2,
        "schedule": "fora:2",
        "guidance_scale": 2,
        "size": "8x8",
        "user": "me",
        "response_format": "b64_json",
    }
    answer = client.post(GENERATIONS, json=asked)
    assert answer.status_code == 200, answer.text
    pipeline = Pipeline(pixels, schedule="fora:2", guidance_scale=2.0, backend="onnxruntime", device="cpu")
    wanted = pipeline(class_labels=[3, 3], steps=STEPS, seed=1).images
    content = answer.json()
    assert [(one["seed"], one["full_steps"]) for one in content["data"]] == [(1, 3), (2, 3)]
    assert {**content, "created": 0, "data": 0} == {
        "created": 0, "data": 0, "output_format": "png", "size": "8x8", "model": "pixels", "scheduler": "DDIMScheduler",
        "steps": STEPS, "schedule": "fora:2", "guidance_scale": 2.0,
    }  # fmt: skip
    for one, other in zip(pictures_of(content), wanted, strict=True):
        assert np.array_equal(one, np.asarray(other))
    about = json.loads(Image.open(io.BytesIO(base64.b64decode(content["data"][1]["b64_json"]))).text["fora-trt"])  # type: ignore[attr-defined]
    assert (about["image_seed"], about["class_label"], about["schedule"], about["model"]) == (2, 3, "fora:2", "pixels")
    assert str(pixels.folder) not in json.dumps(about)


def test_defaults_are_those_of_run(client: TestClient, replica: Replica) -> None:
    content = client.post(GENERATIONS, json={"model": "pixels", "prompt": "", "class_label": 1}).json()
    assert isinstance(replica.maker, InBatches)
    made = replica.maker.pipeline(class_labels=[1])
    assert (content["steps"], content["schedule"]) == (made.sampling.steps, made.sampling.schedule.text)
    assert content["guidance_scale"] == made.guidance.scale
    assert 0 <= content["data"][0]["seed"] < 2**31


def test_a_seed_that_is_drawn_is_returned_and_gives_the_same_picture(client: TestClient) -> None:
    first = client.post(GENERATIONS, json={**GOOD, "seed": None}).json()
    again = client.post(GENERATIONS, json={**GOOD, "seed": first["data"][0]["seed"]}).json()
    assert first["data"] == again["data"]


def test_a_schedule_file_is_known_by_its_name_alone(client: TestClient) -> None:
    assert client.post(GENERATIONS, json={**GOOD, "schedule": "named"}).json()["schedule"] == "named"
    other = client.post(GENERATIONS, json={**GOOD, "schedule": "named", "num_inference_steps": 5})
    assert (other.status_code, other.json()["error"]["param"]) == (422, "schedule")
    assert "for 4 model evaluations" in other.json()["error"]["message"]


def test_more_than_two_hundred_requests_are_refused(front: Front, client: TestClient) -> None:
    front.keys = digest_of(KEY)
    assert len(BAD) > 200
    answered: Counter[str] = Counter()
    for name, bad in BAD.items():
        answer = sent(client, bad)
        check_refusal(bad, answer.status_code, answer.text, name)
        answered[str(answer.status_code)] += bad.path not in UNCOUNTED
    assert sent(client, Bad(200, None, json.dumps(GOOD).encode())).status_code == 200
    assert status_counts(front.metrics.text().decode()) == answered + Counter({"200": 1})
    assert "root:" not in front.metrics.text().decode()


def digest_of(*keys: str) -> tuple[str, ...]:
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def samples_of(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Samples by name and values of labels."""
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


def status_counts(text: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == "fora_requests_total":
                found[one.labels["status"]] += int(one.value)
    return found


def test_keys_open_the_api_and_nothing_else_needs_one(front: Front, client: TestClient) -> None:
    front.keys = digest_of("other", KEY)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).json()["data"][0]["id"] == "pixels"
    assert client.get("/v1/models/pixels", headers={"authorization": f"Bearer {KEY}"}).json()["id"] == "pixels"
    assert client.get("/metrics").status_code == 200


def test_the_default_model_is_the_only_one(front: Front, client: TestClient) -> None:
    front.handles["second"] = front.handles["pixels"]
    try:
        answer = client.post(GENERATIONS, json=GOOD)
    finally:
        del front.handles["second"]
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "model")


def test_draining_refuses_new_requests(front: Front, client: TestClient) -> None:
    assert asyncio.run(front.drain()) == 0
    answer = client.post(GENERATIONS, json=GOOD)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert client.get("/v1/models").status_code == 200


def test_a_full_queue_and_a_dead_replica(front: Front, client: TestClient) -> None:
    pytest.importorskip("ray.serve")
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    raised: list[Exception] = [BackPressureError(64, 64), RayActorError(), RuntimeError("/srv/secret")]

    async def fails(*_: object) -> None:
        raise raised.pop(0)

    front.handles["pixels"] = SimpleNamespace(generate=SimpleNamespace(remote=fails))
    answers = [client.post(GENERATIONS, json=GOOD) for _ in range(3)]
    assert [one.status_code for one in answers] == [429, 503, 500]
    assert [one.json()["error"]["type"] for one in answers] == ["rate_limit_error", "server_error", "server_error"]
    assert [int(one.headers.get("retry-after", 0)) for one in answers] == [1, 1, 0]
    assert "secret" not in answers[2].text
    assert front.pending == 0
    assert samples_of(front.metrics.text().decode())["fora_requests_in_progress", ("pixels",)] == 0


# --- the guard


def guarded(
    app: Callable[..., Any], messages: list[dict[str, Any]], limits: Limits, headers: object = ()
) -> list[dict[str, Any]]:
    """What the guard around `app` sends when a client sends these messages and then nothing more."""
    out: list[dict[str, Any]] = []
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": list(headers), "query_string": b""}  # type: ignore[call-overload]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        out.append(message)

    asyncio.run(Guard(app, limits)(scope, receive, send))
    return out


def part(size: int, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_the_guard_ends_slow_and_large_bodies(front: Front) -> None:
    limits = Limits(body_bytes=100, body_seconds=0.1)
    slow = guarded(front.asgi, [part(10)], limits)
    assert slow[0]["status"] == 408
    parts = [part(60), part(60), *[part(10)] * 5, part(1, more=False)]
    large = guarded(front.asgi, parts, limits)
    assert large[0]["status"] == 413
    assert not parts, "the rest was read, so that the client reads its answer"
    assert (b"connection", b"close") in large[0]["headers"]
    announced = guarded(front.asgi, [part(0, more=False)], limits, [(b"content-length", b"9" * 30)])
    assert announced[0]["status"] == 413
    assert guarded(front.asgi, [part(10), {"type": "http.disconnect"}], limits) == []


def test_the_guard_turns_texts_of_ray_into_errors_of_the_api() -> None:
    def app(status: int) -> Any:
        async def answers(scope: object, receive: object, send: Any) -> None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Traceback in /srv/x.py"})

        return answers

    for status, answered in {429: 429, 503: 503, 408: 503, 404: 503, 500: 500}.items():
        start, body = guarded(app(status), [part(0, more=False)], Limits())
        assert start["status"] == answered
        assert json.loads(body["body"])["error"]["type"]
        assert b"root" not in body["body"]


def test_a_front_that_died_is_answered_for() -> None:
    async def dies(*_: object) -> None:
        pass

    async def raises(*_: object) -> None:
        raise RuntimeError("/srv/secret")

    for app in (dies, raises):
        start, body = guarded(app, [part(0, more=False)], Limits())
        assert start["status"] == 503
        assert (b"retry-after", b"1") in start["headers"]
        assert json.loads(body["body"])["error"]["code"] == "unavailable"


def test_headers_that_direct_ray_are_dropped() -> None:
    seen = {}

    async def app(scope: Any, receive: object, send: object) -> None:
        seen.update(scope["headers"])

    names = [b"x-fora-refused", b"X-Request-Disconnect-Disabled", b"serve_multiplexed_model_id", b"accept"]
    guarded(app, [part(0, more=False)], Limits(), [(name, b"\xff") for name in names])
    assert [*seen] == [b"accept"]


# --- metrics and settings


def test_counters_do_not_fall_when_a_replica_dies() -> None:
    metrics = Metrics(["a", "b"])
    keep = metrics.replicas.keep
    keep("1", Latest("a", 2, Counts({1: 4, 8: 2}, 1.5, 0.5, 5, 0, 0)))
    keep("1", Latest("a", 1, Counts({1: 3}, 1.0, 0.5, 4, 0, 0)))  # arrives late
    keep("2", Latest("a", 1, Counts({8: 1, 200: 1}, 0.5, 0.25, 2, 0, 0)))
    found = samples_of(metrics.text().decode())
    assert found["fora_pictures_total", ("a",)] == 7
    assert found["fora_pictures_total", ("b",)] == 0
    assert found["fora_step_seconds_total", ("full", "a")] == 2.0
    assert found["fora_batch_size_count", ("a",)] == 8
    assert found["fora_batch_size_sum", ("a",)] == 4 + 24 + 200
    metrics.wait_for("a", 3)
    assert samples_of(metrics.text().decode())["fora_images_in_progress", ("a", "waiting")] == 3
    metrics.wait_for("a", -3, -1)
    assert samples_of(metrics.text().decode())["fora_images_in_progress", ("a", "waiting")] == 0
    assert found["fora_batch_size_bucket", ("1.0", "a")] == 4
    assert found["fora_batch_size_bucket", ("128.0", "a")] == 7


def test_bundles_are_served_under_their_names(pixels: Bundle, tmp_path: Path) -> None:
    assert models_of(ServeConfig(bundles=(pixels.folder,))) == {"pixels": pixels.folder}
    with pytest.raises(InputError, match="two bundles are named pixels"):
        models_of(ServeConfig(bundles=(pixels.folder, pixels.folder)))
    assert models_of(ServeConfig.model_validate({"bundles": str(pixels.folder)})) == {"pixels": pixels.folder}
    shutil.copytree(pixels.folder, tmp_path / "front")
    with pytest.raises(InputError, match="a bundle cannot be served under the name front"):
        models_of(ServeConfig(bundles=(tmp_path / "front",)))


def test_keys_are_read_as_digests(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the shop\n\n one \n{KEY}\n")
    assert digests_of(file) == digest_of("one", KEY)
    file.write_text("\n# none\n")
    with pytest.raises(InputError, match="contains no API key"):
        digests_of(file)
    with pytest.raises(InputError, match="cannot be read"):
        digests_of(tmp_path / "none")


def test_schedules_are_files_of_different_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    paths = (tmp_path / "a.json", tmp_path / "sub" / "a.json")
    for path in paths:
        Schedule.fora(4, 2).to_file(path)
    with pytest.raises(InputError, match="two schedule files are named a"):
        checked_schedules(paths)
    with pytest.raises(InputError, match=r"fora:3 is not a \.json file"):
        checked_schedules((Path("fora:3"),))
    with pytest.raises(ScheduleError, match="cannot be read"):
        checked_schedules((tmp_path / "none.json",))


def test_a_port_that_is_taken_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError, match=f"port {port} cannot be bound: Address already in use; give another --port"
        ):
            server.free_port("127.0.0.1", port)
    assert server.free_port("127.0.0.1", 0) > 0


def test_a_missing_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch, pixels: Bundle) -> None:
    monkeypatch.setattr(application, "installed_version", lambda name: None)
    with pytest.raises(BackendError, match=r"fora-trt serve needs Ray Serve; pip install 'fora-trt\[serve\]'"):
        application.check_installed()
    result = fora("serve", pixels.folder)
    assert (result.exit_code, "pip install 'fora-trt[serve]'" in result.output) == (1, True)


def test_too_many_replicas_for_the_machine_are_a_sentence(pixels: Bundle) -> None:
    config = ServeConfig(bundles=(pixels.folder,), replicas=4, num_gpus=0)
    server.check_room(config, {"CPU": 4.0})
    with pytest.raises(
        InputError, match="4 replicas with 1 CPUs each need 4; this machine has 2; give fewer --replicas"
    ):
        server.check_room(config, {"CPU": 2.0})


def test_ray_is_imported_by_serve_alone() -> None:
    code = (
        "import sys, fora_trt.cli, fora_trt.pipeline; print({'ray', 'starlette', 'prometheus_client'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_body_of_a_million_pieces_takes_little_time() -> None:
    limits = Limits(body_bytes=10**6)

    async def app(*_: object) -> None:
        pass

    began = time.monotonic()
    guarded(app, [part(1) for _ in range(200_000)] + [part(1, more=False)], limits)
    assert time.monotonic() - began < 20


def test_a_schedule_may_list_all_steps() -> None:
    schedule = "full:" + ",".join(map(str, range(250)))
    assert wanted_from(json.dumps({"schedule": schedule}).encode(), Limits()).schedule == schedule
    with pytest.raises(ApiError, match="schedule: String should have at most 4096 characters"):
        wanted_from(json.dumps({"schedule": "x" * 4097}).encode(), Limits())


@pytest.mark.parametrize(
    "kind", ["application/json", 'Application/JSON; charset="UTF-8"; x=y', "application/json;charset=utf8"]
)
def test_json_in_utf_8_is_taken_however_it_is_said(kind: str) -> None:
    _check_content({"content-type": kind})
    with pytest.raises(ApiError, match="the body must be JSON in UTF-8"):
        _check_content({"content-type": kind.lower().replace("json", "xml")})


def test_a_request_does_not_wait_for_ever_for_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "ABSENCE_PERIOD", 0.01)
    monkeypatch.setattr(front_module, "LONGEST_ABSENCE", 0.1)
    running = {"pixels": 1}

    async def waits(seconds: float) -> str:
        made = Front("app", {}, Limits(), ())
        made._state = float("inf"), running  # known for ever
        asked: asyncio.Future[Any] = asyncio.ensure_future(asyncio.sleep(seconds, "made"))
        try:
            return str(await made._while_there("pixels", asked))
        finally:
            await asyncio.sleep(0)
            assert asked.done()

    assert asyncio.run(waits(0.5)) == "made", "it may take long"
    running["pixels"] = 0
    assert asyncio.run(waits(0.02)) == "made"
    with pytest.raises(ApiError, match="no replica of pixels runs") as raised:
        asyncio.run(waits(5))
    assert raised.value.status == 503 and raised.value.retry_after is not None


@pytest.mark.parametrize("body", [b"{}", b'{"model": null, "n": null}'])
def test_null_is_what_a_missing_field_is(body: bytes) -> None:
    assert wanted_from(body, Limits()).model_dump(exclude_none=True) == {}


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ApiError(429, "full", "n", "code", 3)))  # made here
    assert (error.status, error.message, error.param, error.code, error.retry_after) == (429, "full", "n", "code", 3)


# --- with Ray


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    output: Path

    def replicas(self, name: str) -> list[psutil.Process]:
        """The processes of a deployment."""
        title = f"ray::ServeReplica:fora-trt:{name}"
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if " ".join(one.cmdline()).startswith(title)]


@contextlib.contextmanager
def serving(bundle: Path, folder: Path, *options: object) -> Iterator[Running]:
    """`fora-trt serve` until the block ends."""
    output = folder / "output"
    command = [sys.executable, "-m", "fora_trt", "serve", bundle, "--port", "0", "--json", *options]
    with output.open("w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, text=True, cwd=folder)
    try:
        wait_for(process, output, '"url"', 180)
        text = output.read_text()
        about = json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
        yield Running(process, about["url"], output)
    finally:
        process.terminate()
        assert process.wait(90) == 0, output.read_text()
        assert "***" not in output.read_text(), "Ray's libraries print a stack at SIGTERM"
        assert not [one for one in psutil.process_iter(["environ"]) if is_of(one, process.pid)]


def wait_for(process: subprocess.Popen[str], output: Path, pattern: str, seconds: float) -> None:
    """Wait until a process that goes on has printed this."""
    until = time.monotonic() + seconds
    while not re.search(pattern, output.read_text(), re.MULTILINE):
        assert process.poll() is None and time.monotonic() < until, output.read_text()
        time.sleep(0.5)


def is_of(process: psutil.Process, parent: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return parent in [one.pid for one in process.parents()]
    return False


@pytest.fixture(scope="module")
def running(digits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pytest.importorskip("ray.serve")
    folder = tmp_path_factory.mktemp("serve")
    Schedule.fora(STEPS, 2).to_file(folder / "named.json")
    (folder / "keys").write_text(f"{KEY}\nother\n")
    options = ("--api-key-file", "keys", "--schedule", "named.json", "--body-seconds", 3, "--queue", 200)
    with serving(digits.folder, folder, *options) as running:
        yield running


@pytest.fixture
def http(running: Running) -> Iterator[Any]:
    httpx = pytest.importorskip("httpx2")
    with httpx.Client(base_url=running.url, timeout=120, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def mixed(count: int) -> list[dict[str, Any]]:
    """Requests with different labels, steps and schedules."""
    chosen = random.Random(0)
    return [
        {
            "class_label": chosen.randrange(10),
            "seed": k,
            "num_inference_steps": chosen.choice([4, 8, 12]),
            "schedule": chosen.choice(["fora:2", "fora:4", "none", "dense:3", "fora:2,forecast=1"]),
            "n": chosen.choice([1, 1, 2]),
        }
        for k in range(count)
    ]


@pytest.mark.slow
def test_openais_client_gets_pictures_equal_to_those_of_the_pipeline(running: Running, digits: Bundle) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    assert [one.id for one in client.models.list()] == [digits.folder.name]
    requests = mixed(60)

    def made(request: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        own = {name: request[name] for name in ("class_label", "seed", "num_inference_steps", "schedule")}
        answer = client.images.generate(
            model=digits.folder.name, prompt="", n=request["n"], size="8x8", response_format="b64_json", extra_body=own
        )
        return pictures_of(answer.model_dump())

    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(made, requests)]
    for request, pictures in zip(requests, answers, strict=True):
        pipeline = Pipeline(digits, schedule=request["schedule"])
        labels = [request["class_label"]] * request["n"]
        wanted = pipeline(class_labels=labels, steps=request["num_inference_steps"], seed=request["seed"]).images
        assert all(map(np.array_equal, pictures, map(np.asarray, wanted))), request
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="other", prompt="")
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(prompt="", size="512x512", extra_body={"class_label": 1})
    assert caught.value.param == "size"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.slow
def test_metrics_are_what_the_client_saw(running: Running, http: Any) -> None:
    before = samples_of(http.get("/metrics").text)
    statuses, images, full = Counter[str](), 0, 0
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(
            lambda one: http.post(GENERATIONS, json=one), [*mixed(30), {"n": 0}, {"class_label": 99}]
        ):
            statuses[str(answer.status_code)] += 1
            if answer.status_code == 200:
                images += len(answer.json()["data"])
                full += sum(one["full_steps"] for one in answer.json()["data"])
    assert http.get("/health").json() == {"status": "ok", "replicas": {"digits": 1}}
    after = samples_of(http.get("/metrics").text)
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert statuses == {"200": 30, "422": 2}
    assert grown["fora_pictures_total", ("digits",)] == images
    assert grown["fora_batch_size_sum", ("digits",)] == full
    assert grown["fora_request_seconds_count", ("digits",)] == 30
    counted = Counter(
        {
            key[1][-1]: int(value)
            for key, value in grown.items()
            if key[0] == "fora_requests_total" and value and "digits" in key[1]
        }
    )
    assert counted["200"] == 30
    assert after["fora_requests_in_progress", ("digits",)] == 0


@pytest.mark.slow
def test_bad_requests_leave_nothing_behind(running: Running, http: Any) -> None:
    http.post(GENERATIONS, json=GOOD)
    before = memory_of(running)
    for name, bad in BAD.items():
        answer = sent(http, bad)
        check_refusal(bad, answer.status_code, answer.text, name)
    for _ in range(3):
        answer = http.post(GENERATIONS, content=b"x" * 100 * 2**20, headers={"content-type": "application/json"})
        assert answer.status_code == 413
    assert http.post(GENERATIONS, json=GOOD).status_code == 200
    assert memory_of(running) - before < 60 * 2**20


def memory_of(running: Running) -> int:
    """Bytes in use by the processes of Ray Serve that a request passes."""
    children = psutil.Process(running.process.pid).children(recursive=True)
    return sum(one.memory_info().rss for one in children if " ".join(one.cmdline()).startswith("ray::"))


def raw(running: Running, data: bytes, half: bool = False, wait: float = 10.0) -> bytes:
    """What the server answers to these bytes, until it closes the connection or `wait` seconds are over."""
    host, port = running.url.removeprefix("http://").split(":")
    out = b""
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        if half:
            return b""
        until = time.monotonic() + wait
        with contextlib.suppress(TimeoutError, ConnectionError):
            while time.monotonic() < until and (received := connection.recv(65536)):
                out += received
                if b"}}" in out:
                    break
    return out


@pytest.mark.slow
def test_slow_and_broken_connections_do_not_disturb_others(running: Running, http: Any) -> None:
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
    )
    slow: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: slow.append(raw(running, f'{head}Content-Length: 100\r\n\r\n{{"n"'.encode())))
        for _ in range(20)
    ]
    for one in threads:
        one.start()
    began = time.monotonic()
    assert http.post(GENERATIONS, json=GOOD).status_code == 200
    assert time.monotonic() - began < 3, "not held up by 20 slow clients"
    for one in threads:
        one.join()
    assert all(one.startswith(b"HTTP/1.1 408") for one in slow)
    for data in (
        b"\x00\x01\x02",
        b"GET / HTTP/9.9\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ):
        assert raw(running, data).startswith(b"HTTP/1.1 400"), data
    for _ in range(20):
        raw(running, f'{head}Content-Length: 100\r\n\r\n{{"n"'.encode(), half=True)
    twice = raw(running, f"{head}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode())
    assert twice.startswith(b"HTTP/1.1 4")
    upgrade = raw(running, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                  b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")  # fmt: skip
    assert upgrade.startswith(b"HTTP/1.1 403")
    assert http.post(GENERATIONS, json=GOOD).status_code == 200


@pytest.mark.slow
def test_a_client_that_goes_away_frees_its_place(running: Running, http: Any) -> None:
    body = json.dumps({"class_label": 1, "num_inference_steps": 250, "schedule": "none", "n": 10}).encode()
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
    )
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    for _ in range(10):
        host, port = running.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(whole)
        time.sleep(0.3)
        connection.close()
    began = time.monotonic()
    while samples_of(http.get("/metrics").text)["fora_requests_in_progress", ("digits",)]:
        time.sleep(0.2)
        assert time.monotonic() - began < 20
    assert http.post(GENERATIONS, json=GOOD).status_code == 200
    assert time.monotonic() - began < 20, "100 images of 250 steps take longer"


@pytest.mark.slow
@pytest.mark.parametrize("deployment", ["digits", "front"])
def test_a_process_that_is_killed_is_replaced(deployment: str, running: Running, http: Any) -> None:
    (victim,) = running.replicas(deployment)
    requests = mixed(90)
    answers: list[tuple[float, int]] = []

    def ask(request: dict[str, Any]) -> None:
        answer = http.post(GENERATIONS, json=request)
        answers.append((time.monotonic(), answer.status_code))
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] == "unavailable"
            assert int(answer.headers["retry-after"]) >= 1
        if len(answers) == 30:
            victim.send_signal(signal.SIGKILL)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, requests))
    statuses = Counter(status for _, status in answers)
    assert {*statuses} <= {200, 503}
    assert statuses[503] <= 16, "those that it worked on"
    good = sorted(when for when, status in answers if status == 200)
    assert max(later - earlier for earlier, later in pairwise(good)) < 30
    assert http.get("/health").status_code == 200
    (other,) = running.replicas(deployment)
    assert other.pid != victim.pid


@pytest.mark.slow
def test_the_operator_is_told_when_no_replica_runs(digits: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    folder, away = tmp_path / "digits", tmp_path / "away"
    shutil.copytree(digits.folder, folder)
    with serving(folder, tmp_path) as running:
        (victim,) = running.replicas("digits")
        folder.rename(away)
        victim.kill()
        wait_for(running.process, running.output, r"^no replica of digits runs, and its requests wait: \S+", 90)
        away.rename(folder)
        wait_for(running.process, running.output, "^a replica of digits runs again", 90)


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted(digits: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    httpx = pytest.importorskip("httpx2")
    with serving(digits.folder, tmp_path, "--queue", 5, "--max-batch-size", 2) as running:
        statuses: Counter[object] = Counter()
        told: list[float] = []

        def ask(request: dict[str, Any]) -> None:
            began = 0.0
            try:
                while True:
                    began = time.monotonic()
                    answer = httpx.post(f"{running.url}{GENERATIONS}", json=request, timeout=120)
                    assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
                    statuses[answer.status_code] += 1
                    if answer.status_code != 429:
                        break
                    time.sleep(0.2)
            except (httpx.ConnectError, httpx.RemoteProtocolError):
                assert told and began > told[0], "it was sent before the signal"
                statuses["refused"] += 1  # at the end

        with ThreadPoolExecutor(24) as pool:
            work = [pool.submit(ask, one) for one in mixed(150)]
            until = time.monotonic() + 120
            while statuses[200] < 30 and time.monotonic() < until:
                time.sleep(0.05)
            told.append(time.monotonic())
            os.kill(running.process.pid, signal.SIGTERM)
            for one in work:
                one.result()
        assert running.process.wait(60) == 0, running.output.read_text()
    assert {*statuses} <= {200, 429, 503, "refused"}, statuses
    assert statuses[429] and statuses[503]
    assert statuses.total() - statuses[429] == 150
    assert statuses[200] >= 30
