"""The HTTP API in values: the request of OpenAI's image generation, its answer, and errors in OpenAI's form.

It knows neither Ray nor a model: values that need the model are checked in `replica`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fora_trt.untrusted import one_line

LARGEST_SEED = 2**63 - 1
LARGEST_SCALE = 100.0
"""Largest guidance scale: latents overflow far beyond it."""

LONGEST_NAME, LONGEST_SCHEDULE = 256, 4096
"""Most characters of a name, and of a schedule, which may list steps."""

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

INTERNAL = "the server failed to answer this request; its operator finds the reason"
AWAY = "the server is not available at the moment; send the request again"

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""The `type` of an error in OpenAI's form, by status."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most; `queue` is the number of requests that wait for a model."""

    body_bytes: int = 256 * 1024
    body_seconds: float = 20.0
    prompt_characters: int = 4000
    images: int = 10
    steps: int = 250
    queue: int = 64


class ApiError(Exception):
    """An answer other than 200. The message goes to the client, so it names no path and quotes little."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after, allow)
        self.status, self.param, self.code, self.retry_after, self.allow = status, param, code, retry_after, allow
        self.message = one_line(message, 1000)

    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, TYPES[500])
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        retry = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        allow = {} if self.allow is None else {"allow": self.allow}
        return {**retry, **allow, **({"www-authenticate": "Bearer"} if self.status == 401 else {})}


def unprocessable(param: str, message: str) -> ApiError:
    """The answer to a value that cannot be used."""
    return ApiError(422, message, param, "invalid_value")


def away(message: str = AWAY, retry_after: int = 1) -> ApiError:
    """The answer while a replica is missing or the server ends."""
    return ApiError(503, message, None, "unavailable", retry_after)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair; send valid Unicode") from None
    if "\x00" in text:
        raise ValueError("the text holds a NUL character; leave it out")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_encodable)]
Rule = Annotated[str, Field(max_length=LONGEST_SCHEDULE), AfterValidator(_encodable)]


class Wanted(BaseModel):
    """The body of `POST /v1/images/generations`; None stands for a field that is missing or null."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: Name | None = None
    prompt: Text | None = None
    class_label: int | None = None
    negative_prompt: Text | None = None
    n: int | None = Field(None, ge=1)
    size: Name | None = None
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=LARGEST_SCALE, allow_inf_nan=False)
    schedule: Rule | None = None
    response_format: Name | None = None
    # fields of OpenAI's models; each is taken only with the value that this server has anyway
    background: Name | None = None
    moderation: Name | None = None
    output_compression: int | None = None
    output_format: Name | None = None
    partial_images: int | None = None
    quality: Name | None = None
    stream: bool | None = None
    style: Name | None = None
    user: Name | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return self.n or 1

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width, if a size is given."""
        match = None if self.size is None else SIZE.fullmatch(self.size)
        return None if match is None else (int(match[2]), int(match[1]))


ONLY: Mapping[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "output_compression": (100,),
    "output_format": ("png",),
    "partial_images": (0,),
    "quality": ("auto", "standard"),
    "stream": (False,),
}
"""Values that this server has anyway, of fields that it does not change; null too."""


def wanted_from(body: bytes, limits: Limits) -> Wanted:
    """The request in a body. Raises `ApiError`: 400 for what is no JSON object, 422 for a value."""
    try:
        values = json.loads(body.decode(), parse_constant=_refuse)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8 text; send JSON in UTF-8", None, "invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body nests too deeply; send one JSON object", None, "invalid_json") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not JSON: {error.msg} ({place})", None, "invalid_json") from None
    except ValueError:
        raise ApiError(
            400, "the body holds a number that JSON does not have or that is too long", None, "invalid_json"
        ) from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object; send fields and values in braces", None, "invalid_json")
    return wanted_of(values, limits)


def wanted_of(values: Mapping[str, Any], limits: Limits) -> Wanted:
    """The request of these fields. Raises `ApiError` 422 for a value that no model takes."""
    for name in values:
        if name not in Wanted.model_fields:  # pydantic could not quote half of a surrogate pair
            raise unprocessable(one_line(name, 64), f"{one_line(name, 64)}: there is no field of this name")
    try:
        wanted = Wanted.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        raise unprocessable(name, f"{name}: {first['msg'].removeprefix('Value error, ')}") from None
    _check(wanted, limits)
    return wanted


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _check(wanted: Wanted, limits: Limits) -> None:
    """Raise `ApiError` for values that no model of this server takes."""
    for name, values in ONLY.items():
        given = getattr(wanted, name)
        if given is not None and given not in values:
            known = " or ".join(json.dumps(one) for one in values)
            raise unprocessable(name, f"{name} cannot be {json.dumps(given)[:100]} here; give {known}, or leave it out")
    if wanted.style is not None:
        raise unprocessable("style", "style is not supported; describe the style in the prompt, and leave it out")
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(wanted, name) or "")
        if length > limits.prompt_characters:
            raise unprocessable(name, f"{name} has {length} characters; the limit is {limits.prompt_characters}")
    if wanted.images > limits.images:
        raise unprocessable("n", f"n is {wanted.images}; at most {limits.images} images are made per request")
    if (wanted.num_inference_steps or 1) > limits.steps:
        raise unprocessable(
            "num_inference_steps", f"num_inference_steps is {wanted.num_inference_steps}; the limit is {limits.steps}"
        )
    if (wanted.seed or 0) > LARGEST_SEED - wanted.images + 1:
        raise unprocessable("seed", f"seed is {wanted.seed}; with n the largest seed exceeds {LARGEST_SEED}")
    if wanted.prompt and wanted.class_label is not None:
        raise unprocessable("prompt", "prompt and class_label exclude each other; give one of them")
    if wanted.negative_prompt and not wanted.prompt:
        raise unprocessable("negative_prompt", "negative_prompt needs prompt; give both, or leave it out")
    if wanted.size not in (None, "auto") and wanted.sides is None:
        raise unprocessable("size", "size is not of the form WIDTHxHEIGHT such as 256x256; or give auto")
