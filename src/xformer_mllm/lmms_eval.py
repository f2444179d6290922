"""X-Former in lmms-eval: `lmms-eval --model xformer --model_args pretrained=DIR --tasks gqa` (docs/lmms-eval.md).

lmms-eval (0.7) finds `manifest` through the entry-point group "lmms_eval.models". Its "simple" interface: a request's
`args` are (context, generation_kwargs, doc_to_visual, doc_id, task, split), the document is
`task_dict[task][split][doc_id]`, and `doc_to_visual(document)` is the list of its images.
"""

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from xformer_mllm.checkpoints import load_model
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.inference import bf16_autocast, generate
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration
from xformer_mllm.model.processing_xformer import IMAGE_TOKEN

logger = logging.getLogger(__name__)

# Instructions that gqa, vqav2 and ok_vqa append to a question for models trained on them (LLaVA's). BLIP-2's prompt is
# the question alone.
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
)
MAX_NEW_TOKENS = 32  # for tasks without one, such as ok_vqa
DECODING = ("max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
SAMPLING = ("temperature", "top_p", "top_k")
IGNORED = -100  # cross_entropy's: no target there

Request = tuple[str, Any, Callable, int, str, str]


def manifest() -> Any:
    """Entry point that registers the model `xformer` with lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="xformer", simple_class_path=f"{__name__}.XFormer")


# ------------------------------------------------------------------------------------------------- what a task asks for


def question_in(context: str) -> str:
    """A task's context without the lines of `ANSWER_FORMATS`; answer options are kept."""
    lines = [line for line in context.split("\n") if line.strip() not in ANSWER_FORMATS]
    return "\n".join(lines).strip()


def generate_arguments(generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` -> arguments of transformers' `generate`.

    Greedy (or beams) unless `do_sample` or a temperature asks for sampling; temperature 0 is never sampling.
    `length_penalty` only counts with several beams. `until` is `stops`'. Others are ignored, with a warning.
    """
    given = {name: value for name, value in generation_kwargs.items() if value is not None}
    temperature = given.get("temperature")
    sample = temperature != 0 and bool(given.get("do_sample", temperature))
    known = {*DECODING, *SAMPLING, "do_sample", "length_penalty", "until"}
    if unknown := sorted(given.keys() - known):
        logger.warning("ignored, not supported by X-Former: generation_kwargs %s", ", ".join(unknown))
    names = [*DECODING, *(SAMPLING if sample else ()), *(["length_penalty"] if given.get("num_beams", 1) > 1 else [])]
    chosen = {name: given[name] for name in names if name in given}
    return {"max_new_tokens": MAX_NEW_TOKENS, **chosen, "do_sample": sample}


def stops(generation_kwargs: Mapping[str, Any]) -> list[str]:
    """`until` of a task: the texts that end an answer. Raises ValueError if it is neither a text nor a list of texts."""
    until = generation_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"generation_kwargs: until must be a text or a list of texts, not {until!r}")
    return [text for text in until if text]


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it, stripped."""
    ends = [answer.find(text) for text in until if text in answer]
    return answer[: min(ends, default=len(answer))].strip()


def batches(lengths: Sequence[int], groups: Sequence[str], size: int) -> Iterator[list[int]]:
    """Places of requests, `size` at a time: of one group, and the longest first, so that what is too long fails at once."""
    places: dict[str, list[int]] = defaultdict(list)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        places[groups[place]].append(place)
    for group in places.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


# ------------------------------------------------------------------------------------------------------------ the model


class XFormer(lmms):
    """A stage-2 X-Former (or any variant) as lmms-eval's model `xformer`.

    Under `accelerate launch` each process holds the model and lmms-eval gives it its share of the documents.

    Args (lmms-eval's --model_args, --batch_size and --device):
        pretrained: folder of a stage-2 run, or of its model.
        prompt: text after the image: {question} is the task's context without `ANSWER_FORMATS`, {context} all
            of it. Without either, every request has the same prompt (captioning: empty, or "a photo of").
        batch_size: requests per batch; a document's image is encoded once per batch.
        device: where the model runs; accelerate's choice if None, and always with several processes.

    Raises:
        FileNotFoundError, ValueError: for a folder without such a model, or an invalid batch size.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        prompt: str = QUESTION_PROMPT,
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of requests, at least 1, not {batch_size!r}")
        self.batch_size, self.prompt = int(batch_size), str(prompt)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self.device = self.accelerator.device if device is None or several else torch.device(device)
        model, self.processor = load_model(Path(str(pretrained)), [XFormerForConditionalGeneration])
        self.model = model.to(self.device)

    # -------------------------------------------------------------------------------------------------- requests' parts

    def _text(self, context: str) -> str:
        context = context.replace(IMAGE_TOKEN, "")  # the processor inserts the image's placeholders
        return self.prompt.replace("{context}", context).replace("{question}", question_in(context))

    def _document(self, request: Request) -> Any:
        _, _, _, doc_id, task, split = request
        return self.task_dict[task][split][doc_id]

    def _image(self, request: Request) -> Any:
        """The document's image. Raises ValueError for none or several: leaving one out would change the task."""
        _, _, doc_to_visual, doc_id, task, _ = request
        visuals = doc_to_visual(self._document(request)) or []
        if len(visuals) != 1:
            raise ValueError(f"{task}, document {doc_id}: {len(visuals)} images; an X-Former reads exactly one")
        return visuals[0]

    def _images(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """pixel_values uint8[images, 3, S, S], each document's image once, and image_index int64[requests]."""
        images: dict[tuple, Any] = {}
        for request in requests:
            if request[3:] not in images:
                images[request[3:]] = self._image(request)
        place = {document: number for number, document in enumerate(images)}
        return {
            "pixel_values": self.processor(images=list(images.values()))["pixel_values"],
            "image_index": torch.tensor([place[request[3:]] for request in requests]),
        }

    def _on_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _check_length(self, length: int) -> None:
        """Raises ValueError unless the language model reads more than `length` tokens."""
        positions = getattr(self.model.config.text_config, "max_position_embeddings", sys.maxsize)
        if length >= positions:
            raise ValueError(
                f"a prompt of {length} tokens (with the image's) leaves no position of the language model's {positions}"
            )

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(self.processor.tokenizer(text, verbose=False)["input_ids"]) for text in texts]

    def _progress(self, texts: Sequence[str]) -> tqdm:
        """A progress bar on the first process, after printing the first prompt, which belongs to a score."""
        if self.rank == 0 and texts:
            print(f"xformer: the first of {len(texts)} prompts: {texts[0]!r}", file=sys.stderr)
        return tqdm(total=len(texts), disable=self.rank != 0, desc="X-Former", unit="request")

    # --------------------------------------------------------------------------------------------- lmms-eval's interface

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in their order.

        Requests are batched by their generation_kwargs. An answer has at most as many tokens as the language model has
        positions left. Raises ValueError for a request without exactly one image, or whose prompt is too long.
        """
        asked: list[Request] = [request.args for request in requests]
        texts = [self._text(context) for context, *_ in asked]
        groups = [json.dumps(kwargs, sort_keys=True, default=str) for _, kwargs, *_ in asked]
        different = dict(zip(groups, (kwargs for _, kwargs, *_ in asked), strict=True))
        decoding = {group: (generate_arguments(kwargs), stops(kwargs)) for group, kwargs in different.items()}
        answers = [""] * len(asked)
        with self._progress(texts) as bar:
            for places in batches(self._lengths(texts), groups, self.batch_size):
                arguments, until = decoding[groups[places[0]]]
                found = self._generate([texts[p] for p in places], [asked[p] for p in places], arguments)
                for place, answer in zip(places, found, strict=True):
                    answers[place] = cut(answer, until)
                bar.update(len(places))
        return answers

    def _generate(self, texts: list[str], batch: Sequence[Request], arguments: Mapping[str, Any]) -> list[str]:
        images = self._on_device(self._images(batch))
        found = generate(self.model, self.processor, texts, images["pixel_values"], images["image_index"], **arguments)
        return [answer.text for answer in found]

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(loss, is_greedy) of each request's continuation, given the image and the prompt, in the requests' order.

        The loss is the mean negative log-probability of the continuation's tokens: what lmms-eval's own models return.
        Its base class documents log-probabilities, but its multiple-choice score takes the smallest (0.7.3,
        api/task.py; issue 370), so a log-probability would choose the least likely option. is_greedy: whether greedy
        decoding would generate it.

        In a request the continuation, or a function from the document to it, replaces generation_kwargs.
        Raises ValueError for an empty continuation, and as `generate_until` does.
        """
        asked: list[Request] = [request.args for request in requests]
        texts = [self._text(context) for context, *_ in asked]
        continuations = [
            continuation if isinstance(continuation, str) else continuation(self._document(request))
            for request, continuation in ((request, request[1]) for request in asked)
        ]
        found = [(0.0, False)] * len(asked)
        with bf16_autocast(self.device), self._progress(texts) as bar:
            for places in batches(self._lengths(texts), [""] * len(asked), self.batch_size):
                scores = self._score(
                    [texts[p] for p in places], [continuations[p] for p in places], [asked[p] for p in places]
                )
                for place, score in zip(places, scores, strict=True):
                    found[place] = score
                bar.update(len(places))
        return found

    def _score(self, texts: list[str], continuations: list[str], batch: Sequence[Request]) -> list[tuple[float, bool]]:
        """Score prompt + continuation as in training; an encoder-decoder's decoder reads the continuation alone."""
        tokenizer, prompts = self.processor.tokenizer, self.processor(text=texts)
        prompt_ids = self.processor.prompt_ids(texts)
        target_ids = self.processor.target_ids(texts, [continuation.strip() for continuation in continuations])
        for request, prompt, target in zip(batch, prompt_ids, target_ids, strict=True):
            if not target:
                raise ValueError(f"{request[4]}, document {request[3]}: an empty continuation has no likelihood")
            self._check_length(len(prompt) + len(target) - 1)
        targets = [torch.tensor(target) for target in target_ids]
        inputs = {**prompts, **self._images(batch)}
        if self.processor.encoder_decoder:
            following = pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(self.device)
            ids = self.model.language_model.prepare_decoder_input_ids_from_labels(following)
            logits = self.model(**self._on_device(inputs | {"decoder_input_ids": ids})).logits.float()  # [B, T, V]
        else:
            rows = [torch.tensor(prompt + target) for prompt, target in zip(prompt_ids, target_ids, strict=True)]
            labels = [torch.cat([torch.full((len(p),), IGNORED), t]) for p, t in zip(prompt_ids, targets, strict=True)]
            inputs["input_ids"] = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = self.model(**self._on_device(inputs)).logits[:, :-1].float()  # [B, T-1, V]
            following = pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, 1:].to(self.device)
        losses = cross_entropy(logits.transpose(1, 2), following, ignore_index=IGNORED, reduction="none")  # [B, T-1]
        scored = following != IGNORED
        mean = losses.sum(-1) / scored.sum(-1)
        greedy = ((logits.argmax(-1) == following) | ~scored).all(-1)
        return list(zip(mean.tolist(), greedy.tolist(), strict=True))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: X-Former answers one prompt about one image. Raises NotImplementedError."""
        raise NotImplementedError(
            "X-Former answers one prompt about one image and holds no conversation: choose a task whose output_type "
            "is generate_until or multiple_choice"
        )
