"""One picture -> one tensor for both encoders; text -> ids for the Q-Former and for the language model.

Pictures are resized to a square (BLIP-2's evaluation transform: bicubic, no crop) and stay uint8: each encoder's mean and
deviation are applied in the model. The language model's text gets image placeholders in front, before its start token,
as `Blip2Processor` has it.
"""

import logging
import os

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.tokenization_utils_base import AddedToken

from .images import load_image

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
MAX_CAPTION_TOKENS = 32  # of the Q-Former's tokenizer: LAVIS max_txt_len

Picture = str | os.PathLike | Image.Image


def image_processor(image_size: int) -> BlipImageProcessorPil:
    """Resizes to a square of `image_size` and keeps uint8."""
    return BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, do_rescale=False, do_normalize=False
    )


class XFormerProcessor(ProcessorMixin):
    """Pictures and texts -> what the X-Former models take.

    Args:
        image_processor: from `image_processor(image_size)`.
        tokenizer: the language model's; before stage 2 there is none, and the Q-Former's stands here too.
        qformer_tokenizer: the Q-Former's, BERT's kind: [CLS] text [SEP].
        num_query_tokens: placeholders in front of each of the language model's texts.
        instruction_aware: the language model's text is also given to the Q-Former, as the model's configuration asks.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        qformer_tokenizer,
        num_query_tokens: int | None = None,
        instruction_aware: bool = False,
        **kwargs,
    ):
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        self.num_query_tokens = num_query_tokens
        self.instruction_aware = instruction_aware
        super().__init__(image_processor, tokenizer, qformer_tokenizer, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder in the language model's tokenizer: the model's `image_token_index`."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: Picture | list[Picture] | None = None,
        text: str | list[str] | None = None,
        qformer_text: str | list[str] | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str = "pt",
        **_,
    ) -> BatchFeature:
        """Any of the three; lists make a batch.

        Args:
            images: paths or PIL images, any mode or size -> pixel_values, uint8[B, 3, S, S].
            text: for the language model -> input_ids, attention_mask, int64[B, Q+T], placeholders in front. Padding is
                on the left, as generation needs it.
            qformer_text: for the Q-Former (stage 1, retrieval) -> qformer_input_ids, qformer_attention_mask, int64[B, T],
                cut behind `MAX_CAPTION_TOKENS` tokens.
            padding: to the longest (True) or to `max_length` ("max_length").
            max_length: cut the language model's text behind so many tokens, not counting the placeholders.

        Raises:
            ValueError, FileNotFoundError: in one line, for a picture that cannot be read or an empty text.
        """
        data = {}
        if images is not None:
            pictures = [load_image(picture) for picture in _as_list(images)]
            data["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        if text is not None:
            data |= self._llm_text(_as_list(text), padding, max_length)
            if self.instruction_aware:
                data |= self.qformer_inputs(_as_list(text), padding)
        if qformer_text is not None:
            for caption in _as_list(qformer_text):
                if not caption.strip():
                    raise ValueError("a text for the Q-Former is empty; leave the pair out or give it a caption")
            data |= self.qformer_inputs(_as_list(qformer_text), padding)
        if not data:
            raise ValueError("give the processor images, text or qformer_text")
        return BatchFeature(data, tensor_type=return_tensors)

    def _llm_text(self, texts: list[str], padding: bool | str, max_length: int | None) -> dict:
        # A prompt that a chat template or a pipeline has already given placeholders is not given them twice.
        texts = [text.replace(IMAGE_TOKEN, "") for text in texts]
        encoded = encode(self.tokenizer, texts, padding, max_length, padding_side="left")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if self.num_query_tokens is not None:
            placeholders = ids.new_full((len(texts), self.num_query_tokens), self.image_token_id)
            ids = torch.cat([placeholders, ids], dim=1)
            mask = torch.cat([torch.ones_like(placeholders), mask], dim=1)
        return {"input_ids": ids, "attention_mask": mask}

    def qformer_inputs(self, texts: list[str], padding: bool | str = True) -> dict:
        """Texts -> qformer_input_ids, qformer_attention_mask, int64[B, T], cut behind `MAX_CAPTION_TOKENS` tokens."""
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
    """Texts -> input_ids and attention_mask, int64[B, T]. A text that is cut is said so once in the log."""
    encoded = tokenizer(texts, return_token_type_ids=False, verbose=False)["input_ids"]
    longest = max(len(ids) for ids in encoded)
    if max_length is not None and longest > max_length:
        logger.warning("a text of %d tokens was cut to %d: '%.60s…'", longest, max_length, max(texts, key=len))
    return tokenizer(
        texts,
        padding=padding,
        truncation=max_length is not None,
        max_length=max_length,
        padding_side=padding_side,
        return_token_type_ids=False,
        return_tensors="pt",
    )


def _as_list(value):
    return list(value) if isinstance(value, list | tuple) else [value]


__all__ = ["IMAGE_TOKEN", "XFormerProcessor", "encode", "image_processor"]
