"""Prediction: the right image for every question, the same answers however a run is cut into processes and pieces."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.prediction import predict, remove_parts
from xformer_mllm.inference import GenerationSettings, most_new_tokens

SETTINGS = GenerationSettings(prompt="{question}", num_beams=1, length_penalty=0.0, max_new_tokens=4)


class Tokenizer:
    def batch_decode(self, tokens, skip_special_tokens):
        return [f" {number} " for number in tokens[:, 0].tolist()]


class Batch(dict):
    def to(self, device):
        return self


class Processor:
    """An image's one number is its red; a text's one token is how long it is."""

    tokenizer = Tokenizer()

    def __call__(self, images=None, text=None):
        if images is not None:
            reds = [image.getpixel((0, 0))[0] for image in images]
            return Batch(pixel_values=torch.tensor(reds, dtype=torch.float32)[:, None])
        ids = torch.tensor([[len(prompt)] for prompt in text])
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids))


class Model(torch.nn.Linear):
    """Answers with the image's number, so that an image given to the wrong question is seen."""

    config = SimpleNamespace(text_config=SimpleNamespace(is_encoder_decoder=False))  # reads texts of any length

    def __init__(self, stop_after=None):
        super().__init__(1, 1)
        self.encoded = self.batches = 0
        self.stop_after = stop_after

    def generate(self, pixel_values, image_index, input_ids, attention_mask, **_):
        if self.batches == self.stop_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.encoded += len(pixel_values)
        assert len(image_index) == len(input_ids)
        return torch.cat([input_ids, pixel_values[image_index].long()], dim=1)


class Images:
    """Ten questions on four images, which are not next to each other; image "broken" cannot be read."""

    def __init__(self, broken=None):
        self.broken = broken
        self.records = [Question(str(n), str(n % 4), "q" * (n + 1), None, "count") for n in range(10)]

    def load(self, record):
        if record.image_id == self.broken:
            raise ValueError(f"{record.image_id}.jpg: cannot be read as an image")
        return Image.new("RGB", (2, 2), (7 * int(record.image_id), 0, 0))


RIGHT = {str(n): str(7 * (n % 4)) for n in range(10)}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_answers_are_about_their_own_image(tmp_path, batch_size):
    found = predict(Model(), Processor(), Images(), SETTINGS, tmp_path, batch_size)
    assert dict(found.answers) == RIGHT
    assert list(found.answers) == [str(n) for n in range(10)]
    assert not found.problems
    remove_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_image_is_encoded_once_per_batch(tmp_path):
    model = Model()
    predict(model, Processor(), Images(), SETTINGS, tmp_path, 100)
    assert model.encoded == 4


def test_questions_on_a_broken_image_are_left_out(tmp_path):
    found = predict(Model(), Processor(), Images(broken="2"), SETTINGS, tmp_path, 3)
    assert dict(found.answers) == {name: answer for name, answer in RIGHT.items() if int(name) % 4 != 2}
    assert found.problems == {"2": "2.jpg: cannot be read as an image"}
    alone = Images(broken="2")
    alone.records = [alone.records[2]]
    assert not predict(Model(), Processor(), alone, SETTINGS, tmp_path / "alone", 3).answers


def test_an_interrupted_run_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict(Model(stop_after=2), Processor(), Images(), SETTINGS, tmp_path, 2)
    cut = tmp_path / "parts" / "process-0.jsonl"
    with cut.open("ab") as file:
        file.write('{"id": "9", "answer": "é'.encode()[:-1])  # killed while it was writing, within a character
    model = Model()
    found = predict(model, Processor(), Images(), SETTINGS, tmp_path, 2)
    assert dict(found.answers) == RIGHT
    assert model.batches == 3
    again = Model()
    assert predict(again, Processor(), Images(), SETTINGS, tmp_path, 2).answers == found.answers
    assert again.batches == 0


def test_answers_of_other_settings_are_not_reused(tmp_path):
    predict(Model(), Processor(), Images(), SETTINGS, tmp_path, 2, made_by={"model": "one"})
    with pytest.raises(ValueError, match="another model, data or settings"):
        predict(Model(), Processor(), Images(), SETTINGS, tmp_path, 2, made_by={"model": "two"})


def test_answers_fit_the_language_model():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model = Model()
    assert most_new_tokens(model, mask, 9) == 9
    for encoder_decoder, room, expected in ((False, 5, 2), (False, 4, 1), (False, 99, 9), (True, 4, 4)):
        settings = SimpleNamespace(max_position_embeddings=room, is_encoder_decoder=encoder_decoder)
        model.config = SimpleNamespace(text_config=settings)
        assert most_new_tokens(model, mask, 9) == expected
    settings.max_position_embeddings = 3
    with pytest.raises(ValueError, match=r"the prompt is 4 tokens with the image's, .* reads at most 3"):
        most_new_tokens(model, mask, 9)


def evaluate_command(runs, output, *extra):
    words = [
        "evaluate",
        str(runs / "stage2"),
        "--size",
        "12",
        "--batch-size",
        "4",
        "--output-dir",
        str(output),
        *extra,
    ]
    return ["-m", "xformer_mllm", *words]


def test_two_processes_and_a_killed_run_give_the_file_of_one(runs, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, *evaluate_command(runs, tmp_path / "one")]
    subprocess.run(one, check=True, env=environment, capture_output=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [*launch, *evaluate_command(runs, tmp_path / "two")]
    process = subprocess.Popen(two, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = tmp_path / "two" / "parts"
    deadline = time.monotonic() + 120
    while sum(path.stat().st_size > 0 for path in parts.glob("process-*.jsonl")) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, "finished before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(two, check=True, env=environment, capture_output=True, text=True)
    for name in ("predictions.jsonl", "official.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    scores = [json.loads((tmp_path / run / "metrics.json").read_text())["scores"] for run in ("one", "two")]
    assert scores[0] == scores[1]
    assert done.stdout.count("report.html") == 1
    assert not parts.exists()
