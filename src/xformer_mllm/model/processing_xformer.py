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
from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.tokenization_utils_base import AddedToken

from .images import load_image

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
MAX_CAPTION_TOKENS = 32  # of the Q-Former's tokenizer: LAVIS max_txt_len

ImageInput = str | os.PathLike | Image.Image


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
        turn: the chat template's text [before the image, after the prompt, before the answer]; None for plain prompts. It is
            kept as text because a template may contain the current date.
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
        **kwargs,
    ):
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        self.num_query_tokens = num_query_tokens
        self.instruction_aware = instruction_aware
        self.encoder_decoder = encoder_decoder
        self.turn = None if turn is None else list(turn)
        super().__init__(image_processor, tokenizer, qformer_tokenizer, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder in the language model's tokenizer: the model's `image_token_index`."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: ImageInput | list[ImageInput] | None = None,
        text: str | list[str] | None = None,
        qformer_text: str | list[str] | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str = "pt",
        **_,
    ) -> BatchFeature:
        """Prepare images, prompts, or texts for the Q-Former; lists make a batch.

        Args:
            images: paths or PIL images, any mode or size -> pixel_values, uint8[B, 3, S, S].
            text: prompts for the language model -> input_ids, attention_mask, int64[B, T], with image placeholders (and the
                chat template). Padded on the left, as generation requires; for an encoder-decoder on the right.
            qformer_text: for the Q-Former (stage 1, retrieval) -> qformer_input_ids, qformer_attention_mask, int64[B, T],
                truncated to `MAX_CAPTION_TOKENS` tokens.
            padding: to the longest (True) or to `max_length` ("max_length").
            max_length: maximum number of tokens, not counting image placeholders; longer prompts are truncated.

        Raises:
            ValueError, FileNotFoundError, TypeError: for an unreadable image, an empty text or list, or another type.
        """
        data = {}
        if images is not None:
            loaded = [load_image(image) for image in _as_list(images, "images")]
            data["pixel_values"] = self.image_processor(loaded, return_tensors="pt")["pixel_values"]
        if text is not None:
            data |= self._llm_text(_texts(text, "text"), padding, max_length)
            if self.instruction_aware:
                data |= self.qformer_inputs(_texts(text, "text"), padding)
        if qformer_text is not None:
            for caption in _texts(qformer_text, "qformer_text"):
                if not caption.strip():
                    raise ValueError("a text for the Q-Former is empty; remove the pair or give it a caption")
            data |= self.qformer_inputs(_texts(qformer_text, "qformer_text"), padding)
        if not data:
            raise ValueError("pass images, text or qformer_text")
        return BatchFeature(data, tensor_type=return_tensors)

    def _llm_text(self, texts: list[str], padding: bool | str, max_length: int | None) -> dict:
        rows = self.prompt_ids(texts)
        room = None if max_length is None else max_length + (self.num_query_tokens or 0)
        if room is not None and max(map(len, rows)) > room:
            logger.warning("a text of %d tokens was truncated to %d", max(map(len, rows)), room)
            rows = self.prompt_ids([self._cut(text, len(row) - room) for text, row in zip(texts, rows, strict=True)])
        length = max(map(len, rows)) if padding is True or room is None else room
        return {
            "input_ids": self._pad(rows, length, self.tokenizer.pad_token_id),
            "attention_mask": self._pad([[1] * len(row) for row in rows], length, 0),
        }

    def _cut(self, text: str, surplus: int) -> str:
        """The text without its last `surplus` tokens."""
        if surplus <= 0:
            return text
        return self.tokenizer.decode(self.tokenizer(text, add_special_tokens=False)["input_ids"][:-surplus])

    def _pad(self, rows: list[list[int]], length: int, value: int) -> torch.Tensor:
        padding = [[value] * (length - len(row)) for row in rows]
        pairs = zip(rows, padding, strict=True)
        return torch.tensor([row + pad if self.encoder_decoder else pad + row for row, pad in pairs])

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

    def qformer_inputs(self, texts: list[str], padding: bool | str = True) -> dict:
        """Texts -> qformer_input_ids, qformer_attention_mask, int64[B, T], truncated to `MAX_CAPTION_TOKENS` tokens."""
        encoded = encode(self.qformer_tokenizer, texts, padding, MAX_CAPTION_TOKENS, padding_side="right")
        return {
            "qformer_input_ids": encoded["input_ids"],
            "qformer_attention_mask": encoded["attention_mask"],
        }

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask"]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    padding: bool | str,
    max_length: int | None,
    padding_side: str,
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
        return_tensors="pt",
    )


def without_placeholders(text: str) -> str:
    """Remove image placeholders from a text.

    Web captions may contain the string, and pipelines add placeholders of their own; the Q-Former has no embedding for
    them, and the language model needs exactly `num_query_tokens`.
    """
    return text.replace(IMAGE_TOKEN, "")


def _as_list(value, name: str) -> list:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"{name} is empty; pass at least one, or omit it")
    return values


def _texts(value, name: str) -> list[str]:
    texts = _as_list(value, name)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str or a list of str; it contains a {type(text).__name__}")
    return texts


__all__ = ["IMAGE_TOKEN", "XFormerProcessor", "encode", "image_processor", "without_placeholders"]
