"""OpenAI's requests, as far as X-Former can answer them.

Fields that would change an answer, and are not supported, are refused; other unknown fields are ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

MOST_CHOICES = 8
MOST_STOPS = 4
MOST_INPUTS = 64

UNSUPPORTED = {
    "tools": None,
    "functions": None,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "audio": None,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
"""Field -> the value, besides null, that changes nothing."""


class ImageUrl(BaseModel):
    """Where an image is; `detail` is ignored."""

    url: str


class Part(BaseModel):
    """A part of a message: text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _is_there(self) -> "Part":
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} has no {self.type!r}")
        return self


class ChatMessage(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        """The content as a list."""
        if isinstance(self.content, str):
            return [Part(type="text", text=self.content)]
        return self.content or []

    @property
    def text(self) -> str:
        """The text of all parts."""
        return " ".join(part.text.strip() for part in self.parts if part.text).strip()

    @property
    def images(self) -> list[str]:
        """The URLs of the images."""
        return [part.image_url.url for part in self.parts if part.image_url is not None]


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class ChatRequest(BaseModel, extra="allow"):
    """`POST /v1/chat/completions`. Unlike OpenAI's, the default temperature is 0."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _is_supported(self) -> "ChatRequest":
        for name, harmless in UNSUPPORTED.items():
            if (self.model_extra or {}).get(name) not in (None, harmless):
                raise ValueError(f"{name} is not supported")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    def image(self) -> str:
        """The image that the question is about: the last one of the conversation.

        Raises ValueError for none, or several in one message.
        """
        for message in reversed(self.messages):
            if len(message.images) > 1:
                raise ValueError(f"a message has {len(message.images)} images; X-Former reads one")
            if message.images:
                return message.images[0]
        raise ValueError("no message has an image; add a part of type image_url with a data URL")


class EmbeddingPart(BaseModel):
    """A text or the URL of an image."""

    text: str | None = None
    image: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"image": value} if value.startswith("data:image/") else {"text": value}

    @model_validator(mode="after")
    def _is_one(self) -> "EmbeddingPart":
        if (self.text is None) == (self.image is None):
            raise ValueError('an input is a text, a data URL, {"text": …} or {"image": …}')
        return self


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`. A string that begins with data:image/ is an image, any other a text.

    pooling: of an image's queries. "mean": one vector of unit length. "none": all queries one after the other, each of
    unit length; ITC's similarity to a text is the largest of theirs.
    """

    model: str
    input: Annotated[list[EmbeddingPart], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    pooling: Literal["mean", "none"] = "mean"

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]


def chunk(request_id: str, created: int, model: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A piece of a stream."""
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": choices,
        **more,
    }
