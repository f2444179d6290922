"""Questions about pictures: ask a model, score the answers by type, compare two models on the same questions.

What belongs to the score, and is written beside it: the prompt (BLIP-2's for OPT, "Question: ... Answer:"), greedy
decoding, and exact match after lower-casing and stripping (GQA's rule, as every answer here is one word).

Intervals: Wilson's for one model; for the difference of two, a bootstrap over pictures, since the questions of one
picture stand or fall together.
"""

import dataclasses
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from xformer_mllm.checkpoints import bf16_is_fast, load_model, model_folder
from xformer_mllm.data.easy_vqa import EasyVqaQuestions
from xformer_mllm.data.questions import QUESTION_PROMPT, Question
from xformer_mllm.data.scene_questions import ask
from xformer_mllm.data.scenes import SceneQuestions
from xformer_mllm.data.world import draw_scene
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration

MAX_NEW_TOKENS = 8
RESAMPLES = 2_000
TRAINING_SCENES = 4_000  # enough to see which answer to a type of question is the most frequent one

# Fewer questions than this on which just one of two models is right cannot tell them apart: with five, all in favour
# of one model, an exact McNemar test has p = 2 / 2**5 > 0.05; with six, p = 2 / 2**6 < 0.05.
FEWEST_DISAGREEMENTS = 6

Prediction = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- asking


@torch.inference_mode()
def answer_questions(
    model: Any, processor: Any, dataset: Dataset, batch_size: int = 256, progress: bool = True
) -> list[Prediction]:
    """Ask `model` every question of `dataset`, in order; greedy.

    A picture whose questions stand side by side is encoded once per batch. Returns the record of each question (without
    its picture) with "prediction" and "correct".
    """
    model.eval()
    device = next(model.parameters()).device
    predictions: list[Prediction] = []
    total = len(dataset)  # type: ignore[arg-type]
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast())
    with precision, tqdm(total=total, disable=not progress, unit="question") as bar:
        for start in range(0, total, batch_size):
            items = [dataset[place] for place in range(start, min(start + batch_size, total))]
            answers = _answer_batch(model, processor, items, device)
            predictions += [_prediction(item, answer) for item, answer in zip(items, answers, strict=True)]
            bar.update(len(items))
    return predictions


def _answer_batch(model: Any, processor: Any, items: Sequence[Mapping[str, Any]], device: torch.device) -> list[str]:
    pictures = {item["image_id"]: item["image"] for item in items}
    place = {image_id: number for number, image_id in enumerate(pictures)}
    pixels = processor(images=list(pictures.values()), return_tensors="pt")["pixel_values"].to(device)
    prompts = [QUESTION_PROMPT.format(question=item["question"]) for item in items]
    text = processor(text=prompts, padding=True, padding_side="left", return_tensors="pt").to(device)
    new_tokens = model.generate(
        pixels,
        image_index=torch.tensor([place[item["image_id"]] for item in items], device=device),
        **text,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    return [answer.strip() for answer in processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def _prediction(item: Mapping[str, Any], answer: str) -> Prediction:
    record = {name: value for name, value in item.items() if name != "image"}
    return record | {"prediction": answer, "correct": normalised(answer) == normalised(item["answer"])}


def normalised(answer: str) -> str:
    """Lower-cased and stripped: what exact match compares."""
    return answer.strip().lower()


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Blind:
    """What can be answered without the picture, learned from training questions.

    by_type: the most frequent answer to each type of question; by_words: to each question's very words.
    """

    by_type: Mapping[str, str]
    by_words: Mapping[str, str]

    @classmethod
    def learn(cls, training_questions: Iterable[Question]) -> "Blind":
        by_type: dict[str, Counter] = defaultdict(Counter)
        by_words: dict[str, Counter] = defaultdict(Counter)
        for question in training_questions:
            by_type[question.question_type][question.answer] += 1
            by_words[question.question][question.answer] += 1
        return cls(*({key: most.most_common(1)[0][0] for key, most in kind.items()} for kind in (by_type, by_words)))

    def majority(self, row: Prediction) -> str | None:
        """The most frequent training answer to this type of question."""
        return self.by_type.get(row["question_type"])

    def from_words(self, row: Prediction) -> str | None:
        """The most frequent training answer to these words; to the type of question where the words are new."""
        return self.by_words.get(row["question"], self.majority(row))


def score(predictions: Sequence[Prediction], blind: Blind | None = None) -> dict[str, dict[str, Any]]:
    """Accuracy by group: "all", each question type, "structural:x" and "semantic:x".

    {group: {"accuracy", "n", "ci95": [low, high] (Wilson)}}, and if `blind` is given, what is right without looking at
    the picture: "majority" (most frequent training answer to the type of question) and "question_only" (to the words).
    """
    scores = {}
    for group, rows in _grouped(predictions).items():
        right = sum(row["correct"] for row in rows)
        scores[group] = {"accuracy": right / len(rows), "n": len(rows), "ci95": wilson(right, len(rows))}
        if blind is not None:
            scores[group]["majority"] = _share_right(rows, blind.majority)
            scores[group]["question_only"] = _share_right(rows, blind.from_words)
    return scores


def _share_right(rows: Sequence[Prediction], guess: Any) -> float:
    return sum(guess(row) == row["answer"] for row in rows) / len(rows)


def _groups(row: Prediction) -> list[str]:
    groups = ["all", row["question_type"]]
    return groups + [f"{kind}:{row[kind]}" for kind in ("structural", "semantic") if row[kind] is not None]


def _grouped(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Rows by group: "all" first, then the question types, then GQA's types, each in alphabetical order."""
    grouped: dict[str, list[Prediction]] = defaultdict(list)
    for row in predictions:
        for group in _groups(row):
            grouped[group].append(row)
    return {
        group: grouped[group] for group in sorted(grouped, key=lambda group: (group != "all", ":" in group, group))
    }


def wilson(right: int, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's score interval of a proportion (95 % by default), within [0, 1]."""
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def compare(first: Sequence[Prediction], second: Sequence[Prediction], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`second` minus `first` on the same questions.

    {group: {"difference", "ci95": [low, high], "n", "only_first", "only_second", "clear"}}: `only_first` counts the
    questions that only the first answered correctly. ci95 is a percentile bootstrap over pictures. `clear`: the
    interval leaves out 0 and the two disagree on enough questions to tell.

    Raises ValueError if the questions are not the same.
    """
    if [row["id"] for row in first] != [row["id"] for row in second]:
        raise ValueError("the two lists of predictions are not about the same questions in the same order")
    pictures = {image_id: place for place, image_id in enumerate(dict.fromkeys(row["image_id"] for row in first))}
    groups = {group: place for place, group in enumerate(_grouped(first))}
    gains, asked = np.zeros((2, len(pictures), len(groups)))
    only = np.zeros((2, len(groups)), dtype=int)
    for one, other in zip(first, second, strict=True):
        for group in _groups(one):
            gain = int(other["correct"]) - int(one["correct"])
            gains[pictures[one["image_id"]], groups[group]] += gain
            asked[pictures[one["image_id"]], groups[group]] += 1
            if gain:
                only[(gain + 1) // 2, groups[group]] += 1
    low, high = _bootstrap(gains, asked, seed)
    return {
        group: _difference(gains[:, place].sum(), int(asked[:, place].sum()), low[place], high[place], only[:, place])
        for group, place in groups.items()
    }


def _bootstrap(gains: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """2.5 % and 97.5 % points of sum(gains) / sum(asked) over resampled pictures.

    gains, asked: float[pictures, groups] -> float[2, groups].
    """
    pictures = len(gains)
    weights = np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES)
    total = weights @ asked
    ratios = np.divide(weights @ gains, total, out=np.full_like(total, np.nan), where=total > 0)
    return np.nanquantile(ratios, (0.025, 0.975), axis=0)


def _difference(gain: float, n: int, low: float, high: float, only: np.ndarray) -> dict[str, Any]:
    clear = (low > 0 or high < 0) and only.sum() >= FEWEST_DISAGREEMENTS
    return {
        "difference": float(gain) / n,
        "ci95": [float(low), float(high)],
        "n": n,
        "only_first": int(only[0]),
        "only_second": int(only[1]),
        "clear": bool(clear),
    }


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Ask a trained model questions about held-out pictures and score its answers."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a stage-2 run, or of its model."""
    data: Literal["scenes", "easy-vqa"] = "scenes"
    """The embedded world, or easy-VQA's own questions."""
    split: Literal["validation", "test"] = "test"
    """Which held-out pictures."""
    size: int = 2_000
    """How many scenes; easy-VQA is always taken whole."""
    questions_per_picture: int = 4
    """How many questions about each scene."""
    seed: int = 0
    """Of the scenes."""
    batch_size: int = 256
    """Questions per batch."""
    output_dir: Path | None = None
    """Where predictions.jsonl and metrics.json go; by default a folder beside the model."""


def questions_of(data: str, split: str, size: int, questions_per_picture: int = 4, seed: int = 0) -> Dataset:
    """The questions of a split; `size` and what follows only matter for scenes."""
    if data == "scenes":
        return SceneQuestions(split, size, seed, questions_per_picture)
    if data == "easy-vqa":
        return EasyVqaQuestions(split)  # type: ignore[arg-type]
    raise ValueError(f"no questions called {data!r}: scenes or easy-vqa")


def training_questions(data: str, questions_per_picture: int = 4, seed: int = 0) -> Iterable[Question]:
    """Questions of the training split, without their pictures."""
    if data == "scenes":
        scenes = (draw_scene("train", index, seed) for index in range(TRAINING_SCENES))
        return (question for scene in scenes for question in ask(scene, questions_per_picture))
    return EasyVqaQuestions("train").questions


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run `xformer evaluate`: answer, score, write predictions.jsonl and metrics.json; returns what the latter holds.

    Raises FileNotFoundError or ValueError, in one line, if there is no such model or no such data.
    """
    dataset = questions_of(config.data, config.split, config.size, config.questions_per_picture, config.seed)
    model, processor = load_model(config.model, [XFormerForConditionalGeneration])
    start = time.perf_counter()
    predictions = answer_questions(model, processor, dataset, config.batch_size)
    blind = Blind.learn(training_questions(config.data, config.questions_per_picture, config.seed))
    metrics = {
        "scores": score(predictions, blind),
        "prompt": QUESTION_PROMPT,
        "decoding": f"greedy, at most {MAX_NEW_TOKENS} new tokens",
        "normalisation": "lower-cased, stripped, exact match",
        "seconds": round(time.perf_counter() - start, 1),
        "config": {name: _plain(value) for name, value in dataclasses.asdict(config).items()},
    }
    output_dir = config.output_dir or model_folder(config.model).parent / f"questions-{config.data}-{config.split}"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_predictions(output_dir / "predictions.jsonl", predictions)
    _write(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")  # last: it says that all is there
    return metrics


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line, whole or not at all."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split within an answer, at U+2028
    return [json.loads(line) for line in lines if line]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
