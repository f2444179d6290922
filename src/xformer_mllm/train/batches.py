"""Records -> a batch of model inputs: the collators of the two stages.

B batch, T text tokens. Every batch has the inputs of the model's forward and "ids", the names of its records.
"""

import logging
import multiprocessing
import zlib
from typing import Any

import torch

from xformer_mllm.data.questions import CAPTION_PROMPT, QUESTION_PROMPT
from xformer_mllm.model.processing_xformer import without_placeholders

logger = logging.getLogger(__name__)

IGNORED = -100  # label of positions without loss
LENGTHS = 4  # texts are padded to a multiple of it


def _require_text(record: dict[str, Any], field: str) -> str:
    text = without_placeholders(record[field]).strip()
    if not text:
        raise ValueError(f"{record['id']}: empty {field}; add a text or remove the record")
    return text


class _Cutter:
    """Truncate lists of tokens or words, count the truncated ones and log the first.

    `count` is shared with the data loader's worker processes.
    """

    def __init__(self, limit: int):
        self.limit, self.count = limit, multiprocessing.Value("q", 0)

    def __call__(self, parts: list, name: str) -> list:
        """The first `limit` parts of the text of the record called `name`."""
        if len(parts) > self.limit:
            with self.count.get_lock():
                self.count.value += 1
                first = self.count.value == 1
            if first:
                logger.warning(
                    "%s: text of %d tokens truncated to %d, as all longer texts (--max-text-tokens)",
                    name, len(parts), self.limit,
                )  # fmt: skip
        return parts[: self.limit]


class Stage1Collator:
    """[{"id", "image", "caption"}] -> a batch of stage 1.

    pixel_values uint8[B, 3, H, W]; qformer_input_ids, qformer_attention_mask int64[B, T], padded on the right. A
    caption longer than `max_text_tokens` (with [CLS] and [SEP]) is truncated before [SEP]. Raises ValueError for an
    empty caption.
    """

    def __init__(self, processor: Any, max_text_tokens: int):
        self.processor = processor
        self.cut = _Cutter(max_text_tokens)

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        tokenizer = self.processor.qformer_tokenizer
        captions = [_require_text(record, "caption") for record in records]
        rows = []
        for record, tokens in zip(records, tokenizer(captions, verbose=False)["input_ids"], strict=True):
            kept = self.cut(tokens, record["id"])
            rows.append(kept if len(kept) == len(tokens) else [*kept[:-1], tokens[-1]])
        pixels = _pixels(self.processor, [record["image"] for record in records])
        return {
            "ids": [record["id"] for record in records],
            "pixel_values": pixels,
            "qformer_input_ids": _pad(rows, tokenizer.pad_token_id),
            "qformer_attention_mask": _pad([[1] * len(row) for row in rows], 0),
        }


class Stage2Collator:
    """A list of items -> a batch of stage 2.

    An item is {"id", "image", "caption"}, or a list of one image's {"id", "image", "question", "answer"}.

    pixel_values uint8[B, 3, H, W], each image once; input_ids, attention_mask, labels int64[texts, T]; image_index
    int64[texts], the image of each text; for an instruction-aware model qformer_input_ids and qformer_attention_mask,
    the prompts in the Q-Former's tokens. A row is [prompt][target][end token][padding], the prompt (with the image
    placeholders and, where it is used, the chat template) exactly what the processor makes of it at inference. Labels are
    IGNORED but on the target and the end token. An encoder-decoder's row is the prompt alone, and its labels, int64[texts,
    T'], the target and the end token. The prompt is empty for a caption, and the question prompt for a question.

    A target longer than `max_text_tokens` is truncated and then has no end token; a question is truncated to as many
    words. Raises ValueError for an empty text.
    """

    def __init__(self, processor: Any, end_token_id: int, max_text_tokens: int):
        self.processor, self.end_token_id = processor, end_token_id
        self.cut = _Cutter(max_text_tokens)

    def __call__(self, items: list[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
        images = [item if isinstance(item, list) else [item] for item in items]
        records = [record for image in images for record in image]
        prompts, targets = map(list, zip(*map(self._prompt_and_target, records), strict=True))
        read, said = self.processor.prompt_ids(prompts), self.processor.target_ids(prompts, targets)
        learned = [
            self.cut([*ids, self.end_token_id], record["id"]) for record, ids in zip(records, said, strict=True)
        ]
        if self.processor.encoder_decoder:
            rows, labels = read, learned
        else:
            rows = [[*before, *ids] for before, ids in zip(read, learned, strict=True)]
            labels = [[*[IGNORED] * len(before), *ids] for before, ids in zip(read, learned, strict=True)]
        read_by_qformer = self.processor.qformer_inputs(prompts) if self.processor.instruction_aware else {}
        return {
            **read_by_qformer,
            "ids": [record["id"] for record in records],
            "pixel_values": _pixels(self.processor, [image[0]["image"] for image in images]),
            "image_index": torch.tensor([place for place, image in enumerate(images) for _ in image]),
            "input_ids": _pad(rows, self.processor.tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0),
            "labels": _pad(labels, IGNORED),
        }

    def _prompt_and_target(self, record: dict[str, Any]) -> tuple[str, str]:
        if "question" in record:
            words = self.cut(_require_text(record, "question").split(), record["id"])
            return QUESTION_PROMPT.format(question=" ".join(words)), _require_text(record, "answer")
        caption = _require_text(record, "caption")
        return self._split(caption, record["id"]) if self.processor.encoder_decoder else (CAPTION_PROMPT, caption)

    def _split(self, caption: str, name: str) -> tuple[str, str]:
        """Prefix language modelling (BLIP-2, section 3.3): the encoder reads a caption's beginning, or nothing.

        The split depends on the caption and the image's id alone, so it is the same in every epoch.
        """
        words = caption.split()
        at = zlib.crc32(f"{name} {caption}".encode()) % len(words)
        return " ".join(self.cut(words[:at], name)), " ".join(words[at:])


def _pixels(processor: Any, images: list[Any]) -> torch.Tensor:
    """Stack images, or transformed images uint8[3, S, S], to uint8[B, 3, S, S]."""
    return torch.stack(images) if torch.is_tensor(images[0]) else processor(images=images)["pixel_values"]


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Pad rows on the right to int64[B, T], T a multiple of LENGTHS: a CPU compiles and keeps kernels for each length."""
    longest = max(map(len, rows))
    length = longest + -longest % LENGTHS
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
