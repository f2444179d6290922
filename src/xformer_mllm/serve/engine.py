"""One thread that owns the models, answers waiting questions in batches, and encodes each image once.

Questions that wait together share a batch if they ask the same model with the same sampling. Each row of a batch has its
own limits, and ends by itself: at the model's end token, at a stop text, at its number of tokens, or when nobody waits
for it any more.

A answers of a batch, B images, S pixels.
"""

import contextlib
import hashlib
import logging
import math
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from xformer_mllm.inference import GREEDY_ANSWER, bf16_autocast, generate, most_new_tokens
from xformer_mllm.serve.metrics import Metrics

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
"""Encoded images that are kept, least recently used first to go."""


class FullError(Exception):
    """Too many requests wait already."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and its processor."""

    model: Any
    processor: Any

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Resize an image for the model: -> uint8[3, S, S]."""
        return self.processor(images=[image])["pixel_values"][0]

    def prompt(self, text: str) -> str:
        """The prompt for a question; an empty one asks for a caption."""
        return self.processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": text}]}])


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a temperature of 0 is greedy. With a seed, a question has a batch of its own."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Choice:
    """An answer. reason: "stop" at the end token or a stop text, "length" at the maximum number of tokens."""

    text: str
    tokens: int
    reason: str


@dataclass(frozen=True)
class Answer:
    """The answers to a question, and the number of tokens of its prompt with the image's."""

    choices: list[Choice]
    prompt_tokens: int


@dataclass(eq=False, kw_only=True)
class Question:
    """A prompt about an image, and who waits for the answer.

    Args:
        model: name of the model.
        pixels: uint8[3, S, S], from `Loaded.pixels`.
        max_tokens: of each answer.
        stop: texts that end an answer, and are not part of it.
        count: number of answers.
        deadline: on the clock of `time.monotonic`.
        on_text: called on the engine's thread with the number of the answer and its next piece of text.
        result: the answer; a ValueError if the prompt is too long, a TimeoutError after the deadline.
        abandoned: set by whoever no longer waits.
    """

    model: str
    prompt: str
    pixels: torch.Tensor
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    count: int = 1
    deadline: float = math.inf
    on_text: Callable[[int, str], None] | None = None
    result: "Future[Answer]" = field(default_factory=Future)
    abandoned: bool = False


@dataclass(eq=False)
class _Call:
    """Any other work with the models."""

    function: Callable[[], Any]
    result: Future = field(default_factory=Future)


class Engine:
    """Owns the models. Its methods are called from any thread."""

    def __init__(
        self,
        models: Mapping[str, Loaded],
        metrics: Metrics | None = None,
        max_batch: int = 16,
        max_waiting: int = 64,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.models = dict(models)
        self.metrics = metrics or Metrics()
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._images = _ImageCache(cache_bytes, self.metrics)
        self._waiting: deque[Question | _Call] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._closing

    def ask(self, question: Question) -> "Future[Answer]":
        """Queue a question. Raises FullError if too many wait."""
        self._queue(question)
        return question.result

    def run(self, function: Callable[[], Any]) -> Future:
        """Queue a function that uses the models, for the engine's thread. Raises FullError if too many wait."""
        call = _Call(function)
        self._queue(call)
        return call.result

    def close(self) -> None:
        """Answer what waits, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def features(self, name: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The frozen encoders' outputs for one image, with a first dimension of 1. On the engine's thread only."""
        loaded = self.models[name]
        return _stack([self._images.encode(name, loaded, [pixels])[0]])

    def _queue(self, work: "Question | _Call") -> None:
        with self._changed:
            if self._closing or len(self._waiting) >= self.max_waiting:
                raise FullError(f"{len(self._waiting)} requests are waiting; try again later")
            self._waiting.append(work)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                work = self._take()
                self.metrics.waiting.set(len(self._waiting))
            if not isinstance(work, _Call):
                self._answer(work)
            elif work.result.set_running_or_notify_cancel():
                with _reporting([work.result]):
                    work.result.set_result(work.function())

    def _take(self) -> "_Call | list[Question]":
        """The first that waits, with the questions that can share its batch."""
        first = self._waiting.popleft()
        if isinstance(first, _Call):
            return first
        batch, room = [first], self.max_batch - first.count
        for other in list(self._waiting) if first.sampling.seed is None else []:
            if isinstance(other, Question) and other.count <= room and _together(first, other):
                self._waiting.remove(other)
                batch.append(other)
                room -= other.count
        return batch

    def _answer(self, questions: list[Question]) -> None:
        loaded = self.models[questions[0].model]
        limits: dict[Question, tuple[int, int]] = {}  # tokens of the prompt, and of the answer
        for question in questions:
            if question.abandoned:
                question.result.cancel()
            if not question.result.set_running_or_notify_cancel():
                continue
            with _reporting([question.result]):
                _check_time(question)
                length = len(loaded.processor.prompt_ids([question.prompt])[0])
                mask = torch.ones(1, length, dtype=torch.long)
                limits[question] = length, most_new_tokens(loaded.model, mask, question.max_tokens)
        while limits:
            # A batch ends where its longest prompt has no positions left; a question that may go on comes afterwards.
            longest = torch.ones(1, max(limits.values())[0], dtype=torch.long)
            room = most_new_tokens(loaded.model, longest, sys.maxsize)
            batch = {question: limit for question, limit in limits.items() if limit[1] <= room}
            with _reporting([question.result for question in batch]):
                self._generate(loaded, batch)
            limits = {question: limit for question, limit in limits.items() if question not in batch}

    @torch.inference_mode()
    def _generate(self, loaded: Loaded, limits: Mapping[Question, tuple[int, int]]) -> None:
        questions = list(limits)
        name, sampling = questions[0].model, questions[0].sampling
        encoded = self._images.encode(name, loaded, [question.pixels for question in questions])
        rows = [
            _Row(question, number, limit, loaded)
            for question, (_, limit) in limits.items()
            for number in range(question.count)
        ]
        self.metrics.rows.observe(len(rows))
        with torch.random.fork_rng(enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            generate(
                loaded.model,
                loaded.processor,
                [row.question.prompt for row in rows],
                None,
                torch.tensor([questions.index(row.question) for row in rows]),
                features=_stack(encoded),
                stopping_criteria=StoppingCriteriaList([_Rows(rows)]),
                **GREEDY_ANSWER.options()
                | {"max_new_tokens": max(limit for _, limit in limits.values()), "min_new_tokens": 1}
                | sampling.options(),
            )
        for question, (length, _) in limits.items():
            choices = [row.choice() for row in rows if row.question is question]
            self.metrics.prompt_tokens.inc(length)
            self.metrics.generated_tokens.inc(sum(choice.tokens for choice in choices))
            with _reporting([question.result]):
                _check_time(question)
                question.result.set_result(Answer(choices, length))


def _together(first: Question, other: Question) -> bool:
    return first.model == other.model and first.sampling == other.sampling


def _check_time(question: Question) -> None:
    if time.monotonic() > question.deadline:
        raise TimeoutError("the request took too long")


@contextlib.contextmanager
def _reporting(results: Sequence[Future]):
    """Hand an exception to those who wait: the thread goes on with the next."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ValueError | TimeoutError):
            logger.exception("a request failed")
        for result in results:
            if not result.done():
                result.set_exception(error)


def _stack(features: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([one[name] for one in features]) for name in features[0]}


class _ImageCache:
    """What the frozen encoders make of images: an image of several questions, or of a conversation, is encoded once."""

    def __init__(self, most_bytes: int, metrics: Metrics):
        self._most_bytes, self._bytes, self._metrics = most_bytes, 0, metrics
        self._encoded: OrderedDict[tuple[str, bytes], dict[str, torch.Tensor]] = OrderedDict()

    def encode(self, name: str, loaded: Loaded, pixels: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Outputs of `XFormerModel.frozen_features` for each image, uint8[3, S, S], without the first dimension."""
        keys = [(name, hashlib.sha256(one.numpy().tobytes()).digest()) for one in pixels]
        missing = {key: one for key, one in zip(keys, pixels, strict=True) if key not in self._encoded}
        self._metrics.images_encoded.inc(len(missing))
        self._metrics.images_reused.inc(len(keys) - len(missing))
        new: dict[tuple[str, bytes], dict[str, torch.Tensor]] = {}
        if missing:
            batch = torch.stack(list(missing.values())).to(loaded.model.device)
            with torch.inference_mode(), bf16_autocast(batch.device):
                features = loaded.model.xformer.frozen_features(batch, masked=False)
            for place, key in enumerate(missing):
                new[key] = {part: tensor[place].clone() for part, tensor in features.items()}
        found = [new.get(key) or self._encoded[key] for key in keys]
        for key, features in zip(keys, found, strict=True):
            if key not in self._encoded:
                self._bytes += _size(features)
            self._encoded[key] = features
            self._encoded.move_to_end(key)
        while self._bytes > self._most_bytes:
            self._bytes -= _size(self._encoded.popitem(last=False)[1])
        return found


def _size(features: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in features.values())


class _Row:
    """An answer that is being generated."""

    def __init__(self, question: Question, number: int, limit: int, loaded: Loaded):
        self.question, self.number, self.limit = question, number, limit
        self.reason: str | None = None
        self._tokenizer = loaded.processor.tokenizer
        end = loaded.model.generation_config.eos_token_id
        self._ends = {end} if isinstance(end, int) else set(end or ())
        self._tokens: list[int] = []
        self._count = 0
        self._given = ""

    def add(self, token: int) -> None:
        """Take the next token, and end the row if it is the last."""
        if self.reason is not None:
            return
        self._count += 1
        if token in self._ends:
            self.reason = "stop"
        else:
            self._tokens.append(token)
        if self._count >= self.limit:
            self.reason = self.reason or "length"
        if self.question.abandoned or time.monotonic() > self.question.deadline:
            self.reason = "stop"
        if self.question.stop and _first(self.question.stop, self._text()) is not None:
            self.reason = "stop"
        if self.question.on_text is not None:
            self._give(self._whole() if self.reason else self._certain())

    def choice(self) -> Choice:
        """The finished answer."""
        return Choice(self._whole(), self._count, self.reason or "length")

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True).lstrip()

    def _whole(self) -> str:
        text = self._text()
        return text[: _first(self.question.stop, text)]

    def _certain(self) -> str:
        """The text without what the next tokens may change: half a character, or the start of a stop text."""
        text = self._text().rstrip("\ufffd")
        held = max((n for stop in self.question.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        return text[: len(text) - held]

    def _give(self, text: str) -> None:
        if text.startswith(self._given) and text != self._given:
            assert self.question.on_text is not None
            self.question.on_text(self.number, text[len(self._given) :])
            self._given = text


def _first(stop: Sequence[str], text: str) -> int | None:
    """Where the first stop text begins; None without one."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)


class _Rows(StoppingCriteria):
    """Hands each row its token after every step; called by transformers' `generate`."""

    def __init__(self, rows: Sequence[_Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        return torch.tensor([row.reason is not None for row in self.rows], device=input_ids.device)
