"""Images and texts -> inputs of the X-Former models.

Images are resized to a square (BLIP-2's evaluation transform: bicubic, no crop) and stay uint8; the model normalises them
for each encoder. The language model's input has this layout, in training and at inference (`[…]` is one token, `Q` the
number of queries):

    decoder              Q x [<image>] [start] prompt | target [end]                         as in `Blip2Processor`
    with a chat template Q x [<image>] inside the user's turn, before the prompt | target [end of turn]
    encoder-decoder      Q x [<image>] prompt [end] (encoder) | target [end] (decoder)
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image as fetch_image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.tokenization_utils_base import AddedToken

from .images import load_image

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
MAX_CAPTION_TOKENS = 32  # of the Q-Former's tokenizer: LAVIS max_txt_len

# One question about one image is what training has; the rest of the prompt is added with the placeholders.
CHAT_TEMPLATE = """\
{%- set said = namespace(text='') -%}
{%- if messages | length != 1 or messages[0].role != 'user' -%}
{{ raise_exception('X-Former answers one question about one image: pass a single user message') }}
{%- endif -%}
{%- if messages[0].content is string -%}
{%- set said.text = messages[0].content -%}
{%- else -%}
{%- for part in messages[0].content if part.type == 'text' -%}{%- set said.text = said.text + part.text -%}{%- endfor -%}
{%- endif -%}
{{- 'Question: ' + said.text + ' Answer:' if said.text else '' -}}
"""

ImageInput = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


def image_processor(image_size: int) -> BlipImageProcessorPil:
    """Return an image processor that resizes to a square of `image_size` and keeps uint8."""
    return BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, do_rescale=False, do_normalize=False
    )


class XFormerProcessor(ProcessorMixin):
    """Prepare images and texts for the X-Former models.

    Args:
        image_processor: from `image_processor(image_size)`.
        tokenizer: the language model's; before stage 2, the Q-Former's again.
        qformer_tokenizer: the Q-Former's, a BERT tokenizer: [CLS] text [SEP].
        num_query_tokens: number of image placeholders in each text for the language model.
        instruction_aware: also tokenize the text for the Q-Former, for a model with `config.instruction_aware`.
        encoder_decoder: the language model is an encoder-decoder; its texts are padded on the right.
        turn: the language model's chat template as text [before the image, after the prompt, before the answer]; None for
            plain prompts. It is kept as text because a template may contain the current date.
        chat_template: Jinja template from messages to a prompt; by default `CHAT_TEMPLATE` where there is a language model.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        qformer_tokenizer,
        num_query_tokens: int | None = None,
        instruction_aware: bool = False,
        encoder_decoder: bool = False,
        turn: Sequence[str] | None = None,
        chat_template: str | None = None,
    ):
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        self.num_query_tokens = num_query_tokens
        self.instruction_aware = instruction_aware
        self.encoder_decoder = encoder_decoder
        self.turn = None if turn is None else list(turn)
        if chat_template is None and num_query_tokens is not None:
            chat_template = CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, qformer_tokenizer, chat_template=chat_template)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder in the language model's tokenizer: the model's `image_token_index`."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: ImageInput | Sequence | None = None,
        text: str | list[str] | None = None,
        qformer_text: str | list[str] | None = None,
        padding: bool | str = True,
        truncation: bool | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
        text_kwargs: dict | None = None,
        videos: None = None,
        audio: None = None,
    ) -> BatchFeature:
        """Prepare images, prompts, or texts for the Q-Former; lists make a batch.

        Args:
            images: paths, URLs, `data:` URLs, PIL images, or arrays and tensors (uint8, or float in [0, 1]; [H, W, 3] or
                [3, H, W], also with a batch dimension); nested lists are flattened -> pixel_values, uint8[B, 3, S, S].
            text: prompts for the language model -> input_ids, attention_mask, int64[B, T], with image placeholders (and the
                chat template).
            qformer_text: for the Q-Former (stage 1, retrieval) -> qformer_input_ids, qformer_attention_mask, int64[B, T],
                truncated to `MAX_CAPTION_TOKENS` tokens unless `truncation` is False.
            padding: to the longest (True, "longest"), to `max_length` ("max_length"), or none (False, "do_not_pad").
            truncation: whether to truncate prompts to `max_length`; by default if that is given.
            max_length: number of tokens, not counting image placeholders.
            padding_side: of prompts; by default left, as generation requires, and right for an encoder-decoder.
            pad_to_multiple_of: round the padded length of prompts up to a multiple.
            return_tensors: "pt", "np", or None for lists.
            text_kwargs: any of the previous six, as other processors take them.
            videos, audio: not supported.

        Raises:
            ValueError, FileNotFoundError, TypeError: for an unreadable image, an empty text or list, or another type.
        """
        if videos is not None or audio is not None:
            raise ValueError("X-Former reads images and text; it takes no videos or audio")
        if text_kwargs:
            return self(images, text, qformer_text, **({"return_tensors": return_tensors} | text_kwargs))
        layout = _Layout(padding, truncation, max_length, padding_side, pad_to_multiple_of)
        data = {}
        if images is not None:
            loaded = [load_image(image) for image in _flat(images)]
            if not loaded:
                raise ValueError("images is empty; pass at least one, or omit it")
            data["pixel_values"] = self.image_processor(loaded, return_tensors="pt")["pixel_values"]
        if text is not None:
            data |= self._llm_text(_texts(text, "text"), layout)
            if self.instruction_aware:
                data |= self._qformer_text(_texts(text, "text"), layout)
        if qformer_text is not None:
            for caption in _texts(qformer_text, "qformer_text"):
                if not caption.strip():
                    raise ValueError("a text for the Q-Former is empty; remove the pair or give it a caption")
            data |= self._qformer_text(_texts(qformer_text, "qformer_text"), layout)
        if not data:
            raise ValueError("pass images, text or qformer_text")
        return BatchFeature(data, tensor_type=return_tensors)

    def _llm_text(self, texts: list[str], layout: "_Layout") -> dict:
        rows = self.prompt_ids(texts)
        room = None if layout.max_length is None else layout.max_length + (self.num_query_tokens or 0)
        if layout.truncation and room is not None and max(map(len, rows)) > room:
            logger.warning("a text of %d tokens was truncated to %d", max(map(len, rows)), room)
            rows = self.prompt_ids([self._cut(text, len(row) - room) for text, row in zip(texts, rows, strict=True)])
        side = layout.padding_side or ("right" if self.encoder_decoder else "left")
        return {
            "input_ids": layout.pad(rows, room, self.tokenizer.pad_token_id, side),
            "attention_mask": layout.pad([[1] * len(row) for row in rows], room, 0, side),
        }

    def _cut(self, text: str, surplus: int) -> str:
        """The text without its last `surplus` tokens."""
        if surplus <= 0:
            return text
        return self.tokenizer.decode(self.tokenizer(text, add_special_tokens=False)["input_ids"][:-surplus])

    def prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Tokens of each prompt, with image placeholders, start token and chat template."""
        placeholders, rows = [self.image_token_id] * (self.num_query_tokens or 0), self._ids(map(self._asked, prompts))
        if self.turn is None:
            return [placeholders + ids for ids in rows]
        places = [ids.index(self.image_token_id) for ids in rows]
        return [[*ids[:at], *placeholders, *ids[at + 1 :]] for ids, at in zip(rows, places, strict=True)]

    def target_ids(self, prompts: list[str], targets: list[str]) -> list[list[int]]:
        """Tokens of each target text after its prompt, without the end token.

        Tokenizers join a space to the following word, each in its own way, so prompt and target are tokenized together.
        """
        targets = list(map(without_placeholders, targets))
        if self.encoder_decoder:
            return self.tokenizer(targets, add_special_tokens=False)["input_ids"]
        asked = [self._asked(prompt) for prompt in prompts]
        spaces = [(" " if prompt else "") if self.turn is None else self.turn[2] for prompt in prompts]
        said = [space + target for space, target in zip(spaces, targets, strict=True)]
        alone = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        whole = self._ids(map("".join, zip(asked, said, strict=True)))
        return [
            both[len(before) :] if both[: len(before)] == before else target
            for both, before, target in zip(whole, self._ids(asked), alone, strict=True)
        ]

    def _asked(self, prompt: str) -> str:
        """A prompt within the chat template, with one placeholder."""
        if self.turn is None:
            return without_placeholders(prompt)
        return self.turn[0] + IMAGE_TOKEN + without_placeholders(prompt) + self.turn[1]

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Tokenize; a chat template has the start token in it."""
        return self.tokenizer(list(texts), add_special_tokens=self.turn is None, verbose=False)["input_ids"]

    def qformer_inputs(self, texts: list[str]) -> dict:
        """Texts -> qformer_input_ids, qformer_attention_mask, int64[B, T], truncated to `MAX_CAPTION_TOKENS` tokens."""
        return {name: torch.tensor(rows) for name, rows in self._qformer_text(texts, _Layout()).items()}

    def _qformer_text(self, texts: list[str], layout: "_Layout") -> dict:
        longest = None if layout.truncation is False else MAX_CAPTION_TOKENS
        padding = "longest" if layout.padding == "max_length" and longest is None else layout.padding
        encoded = encode(self.qformer_tokenizer, texts, padding, longest, padding_side="right", return_tensors=None)
        return {
            "qformer_input_ids": encoded["input_ids"],
            "qformer_attention_mask": encoded["attention_mask"],
        }

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask"]


@dataclass(frozen=True)
class _Layout:
    """How rows of tokens are truncated and padded; the arguments of `XFormerProcessor`."""

    padding: bool | str = True
    truncation: bool | None = None
    max_length: int | None = None
    padding_side: str | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(
                f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', not {self.padding!r}"
            )
        if self.padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {self.padding_side!r}")
        if self.max_length is None and (self.truncation or self.padding == "max_length"):
            raise ValueError("pass max_length to truncate or pad to")
        if self.truncation is None:
            object.__setattr__(self, "truncation", None if self.max_length is None else True)

    def pad(self, rows: list[list[int]], room: int | None, value: int, side: str) -> list[list[int]]:
        """Pad rows to the longest, or to `room` with padding "max_length"."""
        if self.padding in (False, "do_not_pad"):
            return rows
        length = max(max(map(len, rows)), room or 0 if self.padding == "max_length" else 0)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of if self.pad_to_multiple_of else length
        padded = [(row, [value] * (length - len(row))) for row in rows]
        return [row + padding if side == "right" else padding + row for row, padding in padded]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    padding: bool | str,
    max_length: int | None,
    padding_side: str,
    return_tensors: str | None = "pt",
) -> dict[str, torch.Tensor]:
    """Texts -> input_ids and attention_mask, int64[B, T]. Truncation is logged."""
    texts = list(map(without_placeholders, texts))
    encoded = tokenizer(texts, return_token_type_ids=False, verbose=False)["input_ids"]
    longest = max(len(ids) for ids in encoded)
    if max_length is not None and longest > max_length:
        logger.warning("a text of %d tokens was truncated to %d: '%.60s…'", longest, max_length, max(texts, key=len))
    return tokenizer(
        texts,
        padding=padding,
        truncation=max_length is not None,
        max_length=max_length,
        padding_side=padding_side,
        return_token_type_ids=False,
        return_tensors=return_tensors,
    )


def without_placeholders(text: str) -> str:
    """Remove image placeholders from a text.

    Web captions may contain the string, and pipelines add placeholders of their own; the Q-Former has no embedding for
    them, and the language model needs exactly `num_query_tokens`.
    """
    return text.replace(IMAGE_TOKEN, "")


def _flat(images: Any) -> Iterator[Any]:
    """Every image of nested lists and batches, as a path or a PIL image."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    elif isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim == 4:
            yield from map(to_pil_image, images)
        else:
            yield to_pil_image(images)
    elif isinstance(images, str) and images.startswith(("http://", "https://", "data:")):
        yield fetch_image(images)
    else:
        yield images


def _texts(value, name: str) -> list[str]:
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if not texts:
        raise ValueError(f"{name} is empty; pass at least one, or omit it")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str or a list of str; it contains a {type(text).__name__}")
    return texts


__all__ = ["CHAT_TEMPLATE", "IMAGE_TOKEN", "XFormerProcessor", "encode", "image_processor", "without_placeholders"]
