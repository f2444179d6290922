"""OK-VQA: questions that need knowledge from outside the image, in VQA's file format and by VQA's accuracy."""

from collections.abc import Mapping

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import Scores
from xformer_mllm.evaluate.vqa_accuracy import vqa_accuracy
from xformer_mllm.evaluate.vqav2 import OfficialFiles, Vqav2


class OkVqa(Vqav2):
    """OK-VQA by stemmed answers ("all", and by type of question) and by the answers as typed ("raw answers").

    Each annotator's answer is given twice: stemmed ("answer": "dog") and typed ("raw_answer": "dogs"). "all" is the
    official score: the VQA evaluation reads "answer". It does not stem the prediction, so "dogs" is wrong in "all" and
    right in "raw answers".

    Published numbers are comparable with neither score: LAVIS lemmatises BLIP-2's predictions (spaCy, nouns and verbs: 40
    instead of 35 according to salesforce/LAVIS#156), OpenFlamingo stems them with NLTK and a list of exceptions.

    "lavis" is VQAv2's: LAVIS uses the same prompt for OK-VQA, but has settings for FlanT5 only.
    """

    name = "ok-vqa"
    splits = ("val",)
    normalisation = (
        f"{Vqav2.normalisation}; the annotators' answers are stemmed (not for 'raw answers'), the predictions are not"
    )
    files = (
        "OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json and the images "
        "val2014/COCO_val2014_*.jpg"
    )
    official_files = {
        "val": OfficialFiles("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014")
    }
    has_raw_answers = True

    def score(self, answers: Mapping[str, str]) -> Scores:
        """{"all", "raw answers", "question:" types: {"accuracy", "n"}}; only {"all": {"n": 0}} without predictions."""
        scores = super().score(answers)
        typed = [
            vqa_accuracy(answers[record.id], self._annotations[record.id].raw_answers)
            for record in self.answered(answers)
        ]
        if not typed:
            return scores
        return {"all": scores["all"], "raw answers": {"accuracy": sum(typed) / len(typed), "n": len(typed)}, **scores}

    def _groups(self, record: Question) -> list[str]:
        return ["all", f"question:{record.question_type}"]  # every answer_type is "other"
