"""Records -> a batch of model inputs: the collators of the two stages.

B batch, T text tokens. Every batch has the inputs of the model's forward and "ids", the names of its records.
"""

import logging
from typing import Any

import torch

from xformer_mllm.data.questions import CAPTION_PROMPT, QUESTION_PROMPT

logger = logging.getLogger(__name__)

IGNORED = -100  # no loss there


def _require_text(record: dict[str, Any], field: str) -> str:
    text = record[field].strip()
    if not text:
        raise ValueError(f"{record['id']}: empty {field}; give it a text or leave it out")
    return text


class _Cutter:
    """Cuts lists of tokens (or words) to a length, and says so for the first one."""

    def __init__(self, limit: int):
        self.limit, self.said = limit, False

    def __call__(self, parts: list, name: str) -> list:
        """The first `limit` parts of the text of the record called `name`."""
        if len(parts) > self.limit and not self.said:
            self.said = True
            logger.warning(
                "%s: a text of %d tokens is cut to %d, and so is any other (--max-text-tokens sets the length)",
                name, len(parts), self.limit,
            )  # fmt: skip
        return parts[: self.limit]


class Stage1Collator:
    """[{"id", "image", "caption"}] -> a batch of stage 1.

    pixel_values uint8[B, 3, H, W]; qformer_input_ids, qformer_attention_mask int64[B, T], padded on the right. A
    caption longer than `max_text_tokens` (with [CLS] and [SEP]) is cut; [SEP] stays. Raises ValueError for an empty
    caption.
    """

    def __init__(self, processor: Any, max_text_tokens: int):
        self.processor = processor
        self.cut = _Cutter(max_text_tokens)

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        tokenizer = self.processor.qformer_tokenizer
        captions = [_require_text(record, "caption") for record in records]
        rows = []
        for record, tokens in zip(records, tokenizer(captions)["input_ids"], strict=True):
            kept = self.cut(tokens, record["id"])
            rows.append(kept if len(kept) == len(tokens) else [*kept[:-1], tokens[-1]])
        pixels = self.processor(images=[record["image"] for record in records], return_tensors="pt")["pixel_values"]
        return {
            "ids": [record["id"] for record in records],
            "pixel_values": pixels,
            "qformer_input_ids": _pad(rows, tokenizer.pad_token_id),
            "qformer_attention_mask": _pad([[1] * len(row) for row in rows], 0),
        }


class Stage2Collator:
    """A list of items -> a batch of stage 2.

    An item is {"id", "image", "caption"}, or a list of one picture's {"id", "image", "question", "answer"}.

    pixel_values uint8[B, 3, H, W], each picture once; input_ids, attention_mask, labels int64[texts, T]; image_index
    int64[texts], the picture of each text; for an instruction-aware model qformer_input_ids and qformer_attention_mask,
    the prompts in the Q-Former's tokens. A row is [image placeholders][prompt][target][end token][padding], up to the
    target exactly what the processor makes of the prompt at inference (nothing for a caption, the question prompt for a
    question). Labels are IGNORED but on the target and the end token. A target longer than `max_text_tokens` is cut and
    then has no end token, for the text does not end there; a question is cut to as many words. Raises ValueError for an
    empty text.
    """

    def __init__(self, processor: Any, end_token_id: int, max_text_tokens: int):
        self.processor, self.end_token_id = processor, end_token_id
        self.cut = _Cutter(max_text_tokens)

    def __call__(self, items: list[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        pictures = [item if isinstance(item, list) else [item] for item in items]
        records = [record for picture in pictures for record in picture]
        prompts, targets = zip(*map(self._prompt_and_target, records), strict=True)
        placeholders = [self.processor.image_token_id] * self.processor.num_query_tokens
        prompt_ids = [placeholders + ids for ids in tokenizer(list(prompts))["input_ids"]]
        target_ids = tokenizer(list(targets), add_special_tokens=False)["input_ids"]
        rows, labels = [], []
        for record, prompt, target in zip(records, prompt_ids, target_ids, strict=True):
            learned = self.cut([*target, self.end_token_id], record["id"])
            rows.append([*prompt, *learned])
            labels.append([*[IGNORED] * len(prompt), *learned])
        read_by_qformer = self.processor.qformer_inputs(list(prompts)) if self.processor.instruction_aware else {}
        return {
            **read_by_qformer,
            "ids": [record["id"] for record in records],
            "pixel_values": self.processor(images=[picture[0]["image"] for picture in pictures])["pixel_values"],
            "image_index": torch.tensor([place for place, picture in enumerate(pictures) for _ in picture]),
            "input_ids": _pad(rows, tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0),
            "labels": _pad(labels, IGNORED),
        }

    def _prompt_and_target(self, record: dict[str, Any]) -> tuple[str, str]:
        if "question" not in record:
            return CAPTION_PROMPT, _require_text(record, "caption")
        words = self.cut(_require_text(record, "question").split(), record["id"])
        # A BPE tokenizer has the space in the word's first token.
        return QUESTION_PROMPT.format(question=" ".join(words)), " " + _require_text(record, "answer")


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of different lengths as int64[B, T], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
