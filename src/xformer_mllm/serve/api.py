"""The OpenAI-compatible API: `/v1/models`, `/v1/chat/completions`, `/v1/embeddings`; `/health` and `/metrics`.

A conversation's answer is that to its last message, about its last image: X-Former was trained on single questions, so
system messages and earlier turns are not read.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any

import anyio
import numpy as np
import torch
from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from torch.nn.functional import normalize

from xformer_mllm.inference import bf16_autocast
from xformer_mllm.serve.engine import Answer, Engine, FullError, Question, Sampling
from xformer_mllm.serve.images import ImageLimits, image_from
from xformer_mllm.serve.limits import LimitedBody, Measured, error_body
from xformer_mllm.serve.protocol import ChatRequest, EmbeddingPart, EmbeddingRequest, chunk

DECODERS = 4
"""Images decoded at the same time: one may take hundreds of megabytes."""
RETRY_SECONDS = 1


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What the API serves and accepts.

    answering: names of the models that answer questions, the default first.
    embedding: name of the model with ITC's projections, or None.
    max_tokens: largest number of tokens of an answer, and default_tokens if a request names none.
    """

    answering: tuple[str, ...]
    embedding: str | None
    images: ImageLimits
    max_tokens: int
    default_tokens: int
    max_body: int
    seconds: float
    api_key: str | None = None

    @property
    def names(self) -> list[str]:
        """All models that a request may name."""
        return [*self.answering, *([self.embedding] if self.embedding else [])]


class ApiError(Exception):
    """An error for the client, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def response(self) -> JSONResponse:
        """The HTTP response."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_body(str(self), kind, self.code, self.param), self.status, headers)


TOO_LATE = ApiError(503, "the request took too long", "timeout")


def create_app(engine: Engine, settings: ApiSettings) -> FastAPI:
    """The application without the page."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)

    app = FastAPI(title="X-Former", version=version("xformer-mllm"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings = engine, settings
    app.state.decoders = anyio.Semaphore(DECODERS)
    app.add_middleware(LimitedBody, max_bytes=settings.max_body, seconds=settings.seconds)
    app.add_middleware(Measured, metrics=engine.metrics)
    app.add_exception_handler(ApiError, _own)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    app.get("/health")(health)
    app.include_router(router)
    return app


async def _own(request: Request, error: Any) -> Response:
    return error.response()


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, param=place or None).response()


async def _http(request: Request, error: Any) -> Response:
    return ApiError(error.status_code, str(error.detail or HTTPStatus(error.status_code).phrase)).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed to answer; its log has the reason").response()


async def _authorised(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    key = request.app.state.settings.api_key
    if key is not None and not hmac.compare_digest(
        authorization.encode("latin-1"),  # the bytes that came
        f"Bearer {key}".encode(),
    ):
        raise ApiError(401, "wrong or missing API key; send Authorization: Bearer KEY", "invalid_api_key")


router = APIRouter(dependencies=[Depends(_authorised)])


async def health(request: Request) -> JSONResponse:
    """Whether questions are answered."""
    alive = request.app.state.engine.alive
    return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters in Prometheus' format."""
    return Response(request.app.state.engine.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that a request may name."""
    return {"object": "list", "data": [_model(name) for name in request.app.state.settings.names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    _check_model(name, request.app.state.settings.names)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "xformer-mllm"}


def _check_model(name: str, served: Any) -> None:
    if name not in served:
        known = ", ".join(served) or "none"
        raise ApiError(404, f"the model {name!r} is not served here; models: {known}", "model_not_found", "model")


# ---------------------------------------------------------------------------------------------------------------- chat


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a question about an image; without a text, describe it."""
    engine, settings = request.app.state.engine, request.app.state.settings
    _check_model(body.model, settings.answering)
    deadline = time.monotonic() + settings.seconds
    question = await _question(request, body, deadline)
    request_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    if body.stream:
        events = _events(engine, question)
        first = await _or_left(request, question, anext(events))  # an error is a status, as long as nothing was sent
        stream = _stream(body, events, first, request_id, created)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second for nginx
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    answer = await _or_left(request, question, _answer(engine, question))
    choices = [
        {
            "index": place,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "finish_reason": choice.reason,
            "logprobs": None,
        }
        for place, choice in enumerate(answer.choices)
    ]
    return JSONResponse(
        {
            "id": request_id,
            "object": "chat.completion",
            "created": created,
            "model": body.model,
            "choices": choices,
            "usage": _usage(answer),
        }
    )


async def _question(request: Request, body: ChatRequest, deadline: float) -> Question:
    engine, settings = request.app.state.engine, request.app.state.settings
    loaded = engine.models[body.model]
    asked = body.max_completion_tokens or body.max_tokens or settings.default_tokens
    if asked > settings.max_tokens:
        raise ApiError(400, f"at most {settings.max_tokens} tokens are generated, not {asked}", param="max_tokens")
    with _as_bad_request("messages"):
        async with request.app.state.decoders:
            image = await image_from(body.image(), settings.images)
            pixels = await anyio.to_thread.run_sync(loaded.pixels, image)
    return Question(
        model=body.model,
        prompt=loaded.prompt(body.messages[-1].text),
        pixels=pixels,
        max_tokens=asked,
        sampling=Sampling(body.temperature, body.top_p or 1.0, body.seed) if body.temperature else Sampling(),
        stop=body.stops,
        count=body.n or 1,
        deadline=deadline,
    )


@contextlib.contextmanager
def _as_bad_request(param: str):
    """What the client can correct, as status 400."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ApiError(400, str(error), param=param) from error


async def _answer(engine: Engine, question: Question) -> Answer:
    try:
        return await asyncio.wrap_future(engine.ask(question))
    except Exception as error:
        raise _for_client(error) from error


def _for_client(error: Exception) -> Exception:
    """An error of the engine, as the client sees it."""
    if isinstance(error, FullError):
        return ApiError(429, str(error), "queue_full")
    if isinstance(error, TimeoutError):
        return TOO_LATE
    if isinstance(error, ValueError):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    return ApiError(500, "the server failed to answer; its log has the reason")


async def _or_left(request: Request, question: Question, awaited: Awaitable[Any]) -> Any:
    """Wait for a result; if the client leaves before, or the time is over, abandon its question."""
    result, left = asyncio.ensure_future(awaited), asyncio.ensure_future(_until_left(request))
    try:
        seconds = max(0.0, question.deadline - time.monotonic())
        await asyncio.wait({result, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return await result
        raise ApiError(499, "the client has left") if left.done() else TOO_LATE
    finally:
        left.cancel()
        if not result.done():
            question.abandoned = True
            result.cancel()


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Event = tuple[int, str] | Answer
"""A piece of text of the answer with a number, or, at the end, the whole."""


async def _events(engine: Engine, question: Question) -> AsyncIterator[Event]:
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()

    def put(event: Event | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(events.put_nowait, event)

    def finished(result: Any) -> None:
        if not result.cancelled():
            put(result.exception() or result.result())

    question.on_text = lambda number, text: put((number, text))
    try:
        try:
            engine.ask(question).add_done_callback(finished)
        except FullError as error:
            raise _for_client(error) from error
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise _for_client(event) from event
            yield event
            if isinstance(event, Answer):
                return
    finally:
        question.abandoned = True


async def _stream(
    body: ChatRequest, events: AsyncIterator[Event], first: Event, request_id: str, created: int
) -> AsyncIterator[str]:
    """Server-sent events; leaving the iterator abandons the question."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(chunk(request_id, created, body.model, choices, **more), ensure_ascii=False)}\n\n"

    def choice(number: int, delta: dict[str, str], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}]

    async with contextlib.aclosing(_preceded(first, events)) as all_events:  # type: ignore[type-var]
        for number in range(body.n or 1):
            yield event(choice(number, {"role": "assistant", "content": ""}))
        try:
            async for one in all_events:
                if isinstance(one, Answer):
                    for number, ended in enumerate(one.choices):
                        yield event(choice(number, {}, ended.reason))
                    if body.stream_options is not None and body.stream_options.include_usage:
                        yield event([], usage=_usage(one))
                else:
                    yield event(choice(one[0], {"content": one[1]}))
        except ApiError as error:  # too late for a status
            yield f"data: {bytes(error.response().body).decode()}\n\n"
        yield "data: [DONE]\n\n"


async def _preceded(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        yield first
        async for event in events:
            yield event


def _usage(answer: Answer) -> dict[str, int]:
    generated = sum(choice.tokens for choice in answer.choices)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": answer.prompt_tokens + generated,
    }


# ---------------------------------------------------------------------------------------------------------- embeddings


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> JSONResponse:
    """Embed texts and images where ITC compares them."""
    engine, settings = request.app.state.engine, request.app.state.settings
    if settings.embedding is None:
        raise ApiError(404, "no model of stage 1 is served; start with --stage1 FOLDER", "model_not_found", "model")
    _check_model(body.model, [settings.embedding])
    loaded, inputs, pixels = engine.models[settings.embedding], body.input, {}
    with _as_bad_request("input"):
        for place, one in enumerate(inputs):
            if one.text is not None and not one.text.strip():
                raise ValueError(f"input {place} is an empty text")
        async with request.app.state.decoders:
            for place, one in enumerate(inputs):
                if one.image is not None:
                    image = await image_from(one.image, settings.images)
                    pixels[place] = await anyio.to_thread.run_sync(loaded.pixels, image)

    def embed() -> tuple[list[np.ndarray], int]:
        return _embed(loaded.model, loaded.processor, inputs, pixels, body.pooling)

    try:
        vectors, tokens = await asyncio.wait_for(asyncio.wrap_future(engine.run(embed)), settings.seconds)
    except Exception as error:
        raise _for_client(error) from error
    data = [
        {"object": "embedding", "index": place, "embedding": _encoded(vector, body.encoding_format)}
        for place, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


@torch.inference_mode()
def _embed(
    model: Any, processor: Any, inputs: list[EmbeddingPart], pixels: dict[int, torch.Tensor], pooling: str
) -> tuple[list[np.ndarray], int]:
    """float32[D] of every input, [Q * D] for an image without pooling; and the number of tokens of the texts."""
    found: dict[int, torch.Tensor] = {}
    places = [place for place, one in enumerate(inputs) if one.text is not None]
    tokens = 0
    with bf16_autocast(model.device):
        if places:
            text = processor(qformer_text=[inputs[place].text for place in places]).to(model.device)
            tokens = int(text["qformer_attention_mask"].sum())
            vectors = model.text_features(text["qformer_input_ids"], text["qformer_attention_mask"])
            found |= dict(zip(places, vectors, strict=True))
        if pixels:
            batch = torch.stack(list(pixels.values())).to(model.device)
            queries = model.image_features(model.xformer(batch).fused_queries)  # [B, Q, D]
            vectors = normalize(queries.mean(1), dim=-1) if pooling == "mean" else queries.flatten(1)
            found |= dict(zip(pixels, vectors, strict=True))
    return [found[place].float().cpu().numpy() for place in range(len(inputs))], tokens


def _encoded(vector: np.ndarray, form: str) -> list[float] | str:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
