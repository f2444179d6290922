"""Training: real runs of a few steps on a few scenes, killed, resumed, repeated and broken on purpose."""

import dataclasses
import importlib.util
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers.utils import ModelOutput

from xformer_mllm.checkpoints import start_generation
from xformer_mllm.cli import main
from xformer_mllm.data.questions import QUESTION_PROMPT, ByImage
from xformer_mllm.embedded.scenes import SceneCaptions, SceneQuestions
from xformer_mllm.embedded.start import WEIGHTS, start_pretraining
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.train import freeze, logs
from xformer_mllm.train.batches import IGNORED, Stage1Collator, Stage2Collator
from xformer_mllm.train.config import Stage1Config, Stage2Config, differences, read_config, write_config
from xformer_mllm.train.logs import SPEED, RunLog
from xformer_mllm.train.loop import NonFiniteError, TrainingLoop, parameter_groups, start_accelerator
from xformer_mllm.train.run_folder import checkpoints, keep_until
from xformer_mllm.train.stages import run_stage1, run_stage2

# 8 scenes in batches of 3: two batches an epoch, so that checkpoints fall in the middle and at the end of epochs; a log
# every 4 steps and a checkpoint every 3, so that an average runs across a resumption.
TINY = ["--train-size", "8", "--batch-size", "3", "--steps", "8", "--logging-steps", "4", "--save-steps", "3"]
STAGE1 = ["train", "stage1", *TINY, "--sample-steps", "4", "--warmup-steps", "2"]

SHORT = ["--variant", "qformer", "--train-size", "4", "--batch-size", "2", "--steps", "1", "--sample-steps", "9"]

KILL_WHILE_WRITING = """
import os, signal, sys
from xformer_mllm.cli import main
from xformer_mllm.train import run_folder
def write_files(folder, files):
    write(folder, files)
    if folder.name == "checkpoint-6.partial":
        os.kill(os.getpid(), signal.SIGKILL)
write, run_folder.write_files = run_folder.write_files, write_files
main(sys.argv[1:])
"""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start(folder: Path, *command: str) -> subprocess.Popen:
    arguments = [sys.executable, *command, *STAGE1, "--output-dir", str(folder)]
    output = folder.with_suffix(".out").open("w")
    return subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`undisturbed` stage 1; `killed` after its first checkpoint; `cut`, killed in the middle of writing its second."""
    folder = tmp_path_factory.mktemp("runs")
    cut = start(folder / "cut", "-c", KILL_WHILE_WRITING)
    killed = start(folder / "killed", "-m", "xformer_mllm")
    deadline = time.monotonic() + 120
    while not checkpoints(folder / "killed") and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert main([*STAGE1, "--output-dir", str(folder / "undisturbed")]) == 0
    for process, name in ((killed, "killed"), (cut, "cut")):
        assert process.wait(120) == -signal.SIGKILL, (folder / name).with_suffix(".out").read_text()
        assert not (folder / name / "model").exists()
    return folder


def test_a_run_folder_holds_what_it_should(runs):
    run = runs / "undisturbed"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json", "freeze.json", "log.jsonl", "model", "samples", "samples.jsonl", "summary.json", "tensorboard"
    }  # fmt: skip
    log = lines(run / "log.jsonl")
    assert [record["step"] for record in log] == [1, 4, 8]
    for record in log:
        parts = [record[f"{name}_loss"] for name in ("itc", "itm", "itg", "reconstruction")]
        assert sum(parts) == pytest.approx(record["loss"], rel=1e-5)
        assert 0 <= record["itc_accuracy"] <= 1
        assert 0 <= record["itm_accuracy"] <= 1
        assert record["grad_norm"] > 0
        assert -1 <= record["query_similarity"] <= 1
    assert log[0]["temperature"] == pytest.approx(0.07)
    assert log[-1]["temperature"] != log[0]["temperature"]
    samples = lines(run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [4] * 4 + [8] * 4
    assert all((run / sample["image"]).is_file() and sample["reference"] for sample in samples)


def test_tensorboard_has_log_speed_texts_and_images(runs):
    run = runs / "undisturbed"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = set(lines(run / "log.jsonl")[0]) - {"step"}
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in (*names, *SPEED)}
    assert [event.step for event in events.Scalars("train/images_per_second")] == [1, 4, 8]
    assert [event.step for event in events.Images("reconstruction")] == [4, 8]
    assert "held-out images/text_summary" in events.Tags()["tensors"]
    for step in (4, 8):
        with Image.open(run / "samples" / f"reconstruction-{step:06}.png") as sheet:
            assert sheet.size == (8 + 4 * 200, 28 + 4 * 200)


def test_checkpoints_hold_what_was_trained_and_no_pickle(runs):
    checkpoint, *_ = checkpoints(runs / "cut")
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    model, _ = start_pretraining("xformer", 0)
    model.freeze()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert load_file(checkpoint / "trained.safetensors").keys() == trained


@pytest.mark.parametrize("name", ["killed", "cut"])
def test_after_kill_9_a_run_goes_on_as_if_undisturbed(runs, name, capsys):
    run = runs / name
    if name == "cut":
        assert (run / "checkpoint-6.partial" / "trained.safetensors").is_file()
        assert [checkpoint.name for checkpoint in checkpoints(run)] == ["checkpoint-3"]
    assert main([*STAGE1, "--output-dir", str(run)]) == 0
    assert f"resuming from {run / 'checkpoint-'}" in capsys.readouterr().out
    assert lines(run / "log.jsonl") == lines(runs / "undisturbed" / "log.jsonl")
    assert lines(run / "samples.jsonl") == lines(runs / "undisturbed" / "samples.jsonl")
    assert same(weights(run), weights(runs / "undisturbed"))
    assert not list(run.glob("*checkpoint*"))


def test_a_written_configuration_runs_again(runs, tmp_path):
    written = runs / "undisturbed" / "config.json"
    assert main(["train", "stage1", "--config", str(written), "--output-dir", str(tmp_path / "again")]) == 0
    assert lines(tmp_path / "again" / "log.jsonl") == lines(runs / "undisturbed" / "log.jsonl")
    other = ["--output-dir", str(tmp_path / "other"), "--seed", "1", "--steps", "1"]
    assert main(["train", "stage1", f"--config={written}", *other]) == 0
    assert lines(tmp_path / "other" / "log.jsonl")[0]["loss"] != lines(tmp_path / "again" / "log.jsonl")[0]["loss"]


def test_frozen_stays_frozen_and_the_rest_is_trained(runs):
    model, _ = start_pretraining("xformer", 0)
    model.freeze()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = dict(XFormerForPreTraining.from_pretrained(runs / "undisturbed" / "model").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], after[name]) != parameter.requires_grad, name
    table = json.loads((runs / "undisturbed" / "freeze.json").read_text())
    assert {row["name"] for row in table if row["trainable"] == 0} == {"clip_encoder", "mae_encoder", "mae_decoder"}
    assert sum(row["parameters"] for row in table) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("text", ["captions", "questions"])
def test_stage_2_trains_on_a_stage_1_run(runs, tmp_path, text):
    arguments = ["--from-pretraining", str(runs / "undisturbed"), "--text", text, "--output-dir", str(tmp_path)]
    assert main(["train", "stage2", *TINY, "--steps", "3", "--warmup-steps", "1", *arguments]) == 0
    model, _ = start_generation(runs / "undisturbed" / "model", "opt", 0)
    model.freeze()
    after = dict(XFormerForConditionalGeneration.from_pretrained(tmp_path / "model").named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, after[name]), name
    assert not torch.equal(model.language_projection.weight, after["language_projection.weight"])
    assert "language_model" in {
        row["name"] for row in json.loads((tmp_path / "freeze.json").read_text()) if not row["trainable"]
    }
    samples = lines(tmp_path / "samples.jsonl")
    assert len(samples) == 4
    assert all(("question" in sample) == (text == "questions") for sample in samples)


def test_a_batch_of_1_and_one_that_is_larger_than_the_data(tmp_path, capsys):
    for name, size in (("one", "1"), ("large", "7")):
        arguments = [*STAGE1, "--variant", "qformer", "--batch-size", size, "--train-size", "3", "--steps", "2"]
        assert main([*arguments, "--output-dir", str(tmp_path / name)]) == 0
        assert [record["step"] for record in lines(tmp_path / name / "log.jsonl")] == [1, 2]
    printed = capsys.readouterr().out.splitlines()
    warned = [line for line in printed if line.startswith("warning: ")]
    assert ["a batch of one pair" in line for line in warned] == [True, False, False, False]
    assert "the training data (3 images) does not fill one batch (--batch-size 7" in warned[2]
    assert all("2 steps end within --warmup-steps 2" in line for line in warned[1::2])
    said = [line for line in printed if line.startswith("step")]
    assert len(said) == 4
    assert all(" images/s  " in line and line.endswith(" left") for line in said)


def test_the_number_of_truncated_texts_is_printed(tmp_path, capsys):
    arguments = [*STAGE1, "--variant", "qformer", "--train-size", "3", "--steps", "2", "--max-text-tokens", "3"]
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
    assert "3 texts of the first epoch were truncated to --max-text-tokens 3" in capsys.readouterr().out


def test_ctrl_c_saves_a_checkpoint_after_the_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs.tqdm, "write", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    run = tmp_path / "run"
    assert main([*STAGE1, "--variant", "qformer", "--save-steps", "99", "--output-dir", str(run)]) == 130
    (saved,) = checkpoints(run)
    assert f"saved {saved}; run the same command to resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*STAGE1, "--variant", "qformer", "--output-dir", str(run)]) == 0
    assert main([*STAGE1, "--variant", "qformer", "--output-dir", str(tmp_path / "undisturbed")]) == 0
    assert lines(run / "log.jsonl") == lines(tmp_path / "undisturbed" / "log.jsonl")


def test_from_pretraining_names_the_run_below(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"did you mean --from-pretraining {runs}/"):
        run_stage2(Stage2Config(from_pretraining=runs, output_dir=tmp_path / "2"))
    (tmp_path / "cat.png").touch()
    with pytest.raises(FileNotFoundError, match="give the folder of a finished run of `xformer train stage1`"):
        run_stage2(Stage2Config(from_pretraining=tmp_path, output_dir=tmp_path / "2"))


def test_the_log_goes_where_it_is_asked_to(tmp_path, capsys):
    assert main(["train", "stage1", "--report-to", "--output-dir", str(tmp_path), *SHORT]) == 0
    assert not (tmp_path / "tensorboard").exists()
    if importlib.util.find_spec("wandb") is None:
        arguments = [*SHORT, "--output-dir", str(tmp_path / "other"), "--report-to", "wandb"]
        assert main(["train", "stage1", *arguments]) == 2
        assert "--report-to wandb: that package is not installed; pip install wandb" in capsys.readouterr().err


def test_stage_2_needs_a_finished_stage_1(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no stage-1 model there; run: xformer train stage1"):
        run_stage2(Stage2Config(from_pretraining=tmp_path, output_dir=tmp_path / "2"))
    with pytest.raises(ValueError, match="holds the variant xformer, not qformer"):
        run_stage2(Stage2Config(from_pretraining=runs / "undisturbed", output_dir=tmp_path / "2", variant="qformer"))
    assert not (tmp_path / "2").exists()


def test_a_model_with_a_language_model_goes_on_with_that_one(runs, tmp_path, capsys):
    arguments = ["train", "stage2", *TINY, "--steps", "1", "--from-pretraining"]
    assert main([*arguments, str(runs / "undisturbed"), "--output-dir", str(tmp_path / "1")]) == 0
    assert "language model: the one" not in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "1"), "--output-dir", str(tmp_path / "2"), "--llm", "smollm2"]) == 2
    refused = f"xformer: {tmp_path / '1' / 'model'}: holds its own language model; leave --llm out"
    assert refused in capsys.readouterr().err
    assert not (tmp_path / "2").exists()
    assert main([*arguments, str(tmp_path / "1"), "--output-dir", str(tmp_path / "2")]) == 0
    assert f"language model: the one in {tmp_path / '1' / 'model'} (opt of width 128)" in capsys.readouterr().out


def test_what_a_flag_names_and_is_not_to_be_had_is_one_line(runs, tmp_path, capsys):
    output, hub = ["--output-dir", str(tmp_path / "run")], "no such folder, and not available on the Hub"
    stage2 = ["train", "stage2", "--from-pretraining", str(runs / "undisturbed"), "--llm", "nosuch/model"]
    assert main([*stage2, *output]) == 2
    assert f"xformer: --llm nosuch/model: {hub}" in capsys.readouterr().err
    assert main(["train", "stage1", "--second-encoder", "nosuch", *output]) == 2
    assert f"xformer: --second-encoder nosuch: {hub}" in capsys.readouterr().err
    assert main(["train", "stage1", "--second-encoder", str(WEIGHTS / "opt"), *output]) == 2
    assert f"xformer: --second-encoder {WEIGHTS / 'opt'}: " in capsys.readouterr().err
    file = WEIGHTS / "mae" / "config.json"
    assert main(["train", "stage1", "--second-encoder", str(file), *output]) == 2
    assert f"xformer: --second-encoder {file}: a file; pass a folder" in capsys.readouterr().err
    unknown = ["train", "stage1", "--second-encoder", str(WEIGHTS / "mae"), "--variant", "xfromer"]
    assert main([*unknown, *output]) == 2
    assert "xformer: variant 'xfromer' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone_until_told(runs, tmp_path, capsys):
    config = Stage1Config(output_dir=tmp_path, steps=1, train_size=4, batch_size=2, sample_steps=9)
    run_stage1(config)
    (tmp_path / "mine.txt").write_text("kept")
    capsys.readouterr()
    run_stage1(config)
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another run \\(seed 1, not 0\\)"):
        run_stage1(dataclasses.replace(config, seed=1))
    before = weights(tmp_path)
    run_stage1(dataclasses.replace(config, steps=2, resume=False))
    assert not same(before, weights(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_stage_2_notices_that_stage_1_was_trained_again(tmp_path, capsys, monkeypatch):
    stage1 = ["train", "stage1", *SHORT, "--output-dir", str(tmp_path / "1")]
    assert main(stage1) == 0
    stage2 = [
        "train",
        "stage2",
        *SHORT[2:],
        "--steps",
        "2",
        "--save-steps",
        "1",
        "--from-pretraining",
        str(tmp_path / "1"),
    ]
    stage2 += ["--output-dir", str(tmp_path / "2")]
    monkeypatch.setattr(
        "xformer_mllm.train.run_folder.save_model", lambda *_: None
    )  # killed before the model was saved
    assert main(stage2) == 0
    assert checkpoints(tmp_path / "2")
    monkeypatch.undo()
    assert main([*stage1, "--no-resume", "--seed", "1"]) == 0
    refused = f"{tmp_path / '2'}: started from other weights than {tmp_path / '1'} holds now"
    capsys.readouterr()
    assert main(stage2) == 2
    assert refused in capsys.readouterr().err
    assert checkpoints(tmp_path / "2")
    assert main([*stage1, "--no-resume"]) == 0  # the same weights as before
    assert main(stage2) == 0
    assert "resuming from" in capsys.readouterr().out
    assert main([*stage1, "--no-resume", "--seed", "1"]) == 0
    assert main(stage2) == 2  # finished, from other weights
    assert refused in capsys.readouterr().err
    assert main([*stage2, "--no-resume"]) == 0
    assert main(stage2) == 0
    assert "this run is finished" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "1")
    assert main(stage2) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_stage_1_notices_that_its_start_was_replaced(tmp_path, capsys):
    assert main(["train", "stage1", *SHORT, "--output-dir", str(tmp_path / "1")]) == 0
    again = [
        "train",
        "stage1",
        *SHORT,
        "--start-from",
        str(tmp_path / "1" / "model"),
        "--output-dir",
        str(tmp_path / "2"),
    ]
    assert main(again) == 0
    assert main(["train", "stage1", *SHORT, "--seed", "1", "--no-resume", "--output-dir", str(tmp_path / "1")]) == 0
    capsys.readouterr()
    assert main(again) == 2
    assert f"started from other weights than {tmp_path / '1' / 'model'} holds now" in capsys.readouterr().err


def test_a_stage_1_notices_that_its_encoders_were_replaced(tmp_path, capsys):
    encoders, run = tmp_path / "encoders", tmp_path / "1"
    shutil.copytree(WEIGHTS, encoders)
    command = ["train", "stage1", *SHORT, "--encoders", str(encoders), "--output-dir", str(run)]
    assert main(command) == 0
    shutil.copy(WEIGHTS / "clip" / "model.safetensors", encoders / "opt")  # not read by stage 1
    assert main(command) == 0
    mae = encoders / "mae" / "model.safetensors"
    mae.write_bytes(mae.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert main(command) == 2
    assert f"{run}: started from other weights than {encoders} holds now" in capsys.readouterr().err
    assert main([*command, "--no-resume", "--encoders", str(tmp_path)]) == 2
    assert f"xformer: --encoders {tmp_path}: no clip/ in it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--encoders cannot be combined with --start-from"):
        Stage1Config(encoders=encoders, start_from=run)


def test_a_run_does_not_go_on_with_other_frozen_weights(tmp_path):
    model, _ = start_pretraining("qformer", 0)
    model.freeze()
    freeze.write(freeze.freeze_table(model), tmp_path / "freeze.json")
    freeze.check_same_frozen(freeze.freeze_table(model), tmp_path / "freeze.json")
    with torch.no_grad():
        next(model.xformer.clip_encoder.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="clip_encoder is not what this run began with"):
        freeze.check_same_frozen(freeze.freeze_table(model), tmp_path / "freeze.json")


def test_diverging_stops_the_run_naming_step_and_batch(tmp_path, capsys):
    arguments = [*STAGE1, "--learning-rate", "1e30", "--warmup-steps", "0", "--output-dir", str(tmp_path)]
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("xformer: stopped at step 2: ")
    assert "lower --learning-rate" in message
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["step"] == 2
    assert len(stopped["ids"]) == 3
    assert all(name in message for name in stopped["ids"])
    assert not (tmp_path / "model").exists()


class Standin(nn.Module):
    """A model of one weight whose loss is what the batch says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, value):
        loss = (self.weight.sum() + self.bias.sum()) * value.mean()
        return ModelOutput(loss=loss, part_loss=value.mean(), vector=value)


def standin_loop(folder: Path, values: list[float], **config) -> TrainingLoop:
    folder.mkdir(exist_ok=True)
    records = [{"id": f"record {number}", "value": value} for number, value in enumerate(values)]

    def collate(batch):
        return {"ids": [record["id"] for record in batch], "value": torch.tensor([r["value"] for r in batch])}

    config = Stage1Config(output_dir=folder, batch_size=1, bf16="no", **{"warmup_steps": 0, **config})
    return TrainingLoop(start_accelerator(), Standin(), config, records, collate, RunLog(folder, config.steps))


@pytest.mark.parametrize(("bad", "what"), [(float("nan"), "loss nan, part_loss nan"), (3e38, "gradient norm inf")])
def test_nan_names_its_step_and_its_records(tmp_path, bad, what):
    loop = standin_loop(tmp_path, [1.0, 1.0, bad, 1.0], steps=4)
    loop.model.weight.data.mul_(1e-30)
    loop.model.bias.data.mul_(1e-30)
    with pytest.raises(NonFiniteError, match=what) as error:
        loop.train()
    assert f"stopped at step {loop.step + 1}: " in str(error.value)
    assert "on the batch of 1 [record 2]" in str(error.value)
    assert torch.isfinite(loop.model.weight).all()


def test_scalars_are_averaged_and_tensors_are_not_logged(tmp_path):
    standin_loop(tmp_path, [1.0, 2.0, 3.0, 4.0], steps=4, logging_steps=2, learning_rate=1e-12).train()
    logged = lines(tmp_path / "log.jsonl")
    assert [log["step"] for log in logged] == [1, 2, 4]
    assert (logged[0]["part_loss"] + logged[1]["part_loss"] + 2 * logged[2]["part_loss"]) == pytest.approx(10.0)
    assert all(log["loss"] == pytest.approx(6 * log["part_loss"]) for log in logged)
    assert not any("vector" in log for log in logged)


def test_trackers_receive_every_log_with_its_speed(tmp_path):
    loop, tracked = standin_loop(tmp_path, [1.0, 2.0], steps=2, logging_steps=1), []
    loop.run_log.track = lambda values, step: tracked.append((step, values))
    loop.train()
    assert [step for step, _ in tracked] == [1, 2]
    assert all({"loss", "part_loss", "learning_rate", *SPEED} <= values.keys() for _, values in tracked)


def test_the_rate_rises_linearly_and_falls_as_a_cosine(tmp_path):
    steps = {"steps": 6, "logging_steps": 1, "learning_rate": 1e-9, "min_learning_rate": 2e-10}
    loop = standin_loop(tmp_path, [1.0] * 6, warmup_steps=2, **steps)
    loop.train()
    logged = [log["learning_rate"] for log in lines(tmp_path / "log.jsonl")]
    falling = [2e-10 + 8e-10 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert logged == pytest.approx([0, 5e-10, *falling], rel=1e-6)
    assert loop.schedule.get_last_lr()[0] == pytest.approx(2e-10)


def test_accumulated_steps_are_the_mean_of_their_batches(tmp_path):
    standin_loop(tmp_path, [1.0, 3.0, 5.0], steps=2, gradient_accumulation_steps=2, max_grad_norm=0).train()
    first, second = lines(tmp_path / "log.jsonl")
    of_all = first["part_loss"] * 2 + second["part_loss"]  # the last batch of an epoch is a step by itself
    assert of_all == pytest.approx(9.0)
    assert first["grad_norm"] == pytest.approx(first["part_loss"] * 6**0.5)
    assert second["grad_norm"] == pytest.approx(second["part_loss"] * 6**0.5)


def test_only_matrices_that_train_decay():
    decayed, others = parameter_groups(Standin(), 0.05)
    assert decayed["weight_decay"] == 0.05
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 2)]
    assert others["weight_decay"] == 0
    assert [tuple(p.shape) for p in others["params"]] == [(2,)]


def test_a_folder_of_images_trains_stage_1(tmp_path):
    for number in range(6):
        Image.new("RGB", (30 + number, 50), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"image {number}\nein Bild\n")
    run = tmp_path / "run"
    arguments = ["--variant", "qformer", "--data", str(tmp_path), "--output-dir", str(run), "--steps", "1"]
    assert main(["train", "stage1", *arguments, "--batch-size", "64"]) == 0
    shown = {sample["reference"] for sample in lines(run / "samples.jsonl")}
    assert shown
    assert shown < {f"image {number}" for number in range(6)}


def test_over_long_captions_are_cut_and_it_is_said_once(caplog):
    _, processor = start_pretraining("qformer", 0)
    tokenizer = processor.qformer_tokenizer
    image = Image.new("RGB", (48, 48))
    records = [{"id": f"n{n}", "image": image, "caption": "red circle " * n} for n in (1, 40, 50)]
    collator = Stage1Collator(processor, max_text_tokens=10)
    with caplog.at_level(logging.WARNING):
        collator(records)
        batch = collator(records)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("xformer_mllm.train")]
    assert said == ["n40: text of 82 tokens truncated to 10, as all longer texts (--max-text-tokens)"]
    assert batch["qformer_input_ids"].shape == (3, 12)  # a multiple of 4
    assert batch["qformer_input_ids"][:, 0].tolist() == [tokenizer.cls_token_id] * 3
    assert batch["qformer_input_ids"][1:, 9].tolist() == [tokenizer.sep_token_id] * 2
    assert batch["qformer_attention_mask"].sum(1).tolist() == [4, 10, 10]
    assert batch["qformer_input_ids"][0, 4:].tolist() == [tokenizer.pad_token_id] * 8


@pytest.mark.parametrize("field", ["caption", "question", "answer"])
def test_an_empty_text_is_named(runs, field):
    _, processor = start_generation(runs / "undisturbed" / "model", "opt", 0)
    texts = {"caption": {"caption": " "}, "question": {"question": " ", "answer": "no"}}
    texts["answer"] = {"question": "Is it?", "answer": ""}
    with pytest.raises(ValueError, match=f"cat.png: empty {field}"):
        Stage2Collator(processor, 4, 32)([{"id": "cat.png", "image": Image.new("RGB", (48, 48)), **texts[field]}])


def test_labels_are_the_target_and_the_end_token(runs):
    model, processor = start_generation(runs / "undisturbed" / "model", "opt", 0)
    tokenizer, end = processor.tokenizer, model.generation_config.eos_token_id
    rng = random.Random(0)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]

    def text(longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    records = []
    for number in range(20):
        texts = {"question": text(9), "answer": text(2)} if number % 2 else {"caption": text(12)}
        records.append({"id": str(number), "image": Image.new("RGB", (48, 48)), **texts})
    batch = Stage2Collator(processor, end, max_text_tokens=8)(records)
    assert batch["ids"] == [record["id"] for record in records]
    assert batch["pixel_values"].dtype == torch.uint8
    for record, ids, mask, labels in zip(
        records, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        words_asked = " ".join(record.get("question", "").split()[:8])
        prompt = QUESTION_PROMPT.format(question=words_asked) if "question" in record else ""
        inference = processor(text=[prompt])["input_ids"][0].tolist()
        target = tokenizer(record.get("answer") or record["caption"], add_special_tokens=False)["input_ids"]
        target = [*target, end][:8]
        length = len(inference) + len(target)
        assert ids.tolist()[:length] == inference + target
        assert labels.tolist()[:length] == [IGNORED] * len(inference) + target
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert set(ids.tolist()[length:]) <= {tokenizer.pad_token_id}
        assert set(labels.tolist()[length:]) <= {IGNORED}


def test_a_configuration_survives_its_file(tmp_path):
    config = Stage2Config(output_dir=tmp_path, betas=(0.8, 0.9), from_pretraining=Path("somewhere"), text="questions")
    write_config(config, "train stage2")
    read = read_config(tmp_path / "config.json", Stage2Config, "train stage2")
    assert read == config
    assert differences(read, Stage2Config(output_dir=tmp_path, save_steps=7, resume=False)) == [
        "betas (0.8, 0.9), not (0.9, 0.98)", "from_pretraining somewhere, not runs/stage1", "text questions, not captions"
    ]  # fmt: skip


@pytest.mark.parametrize("field", ["steps", "batch_size", "learning_rate", "save_steps"])
def test_impossible_numbers_are_refused(field):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} must"):
        Stage1Config(**{field: 0})


def test_a_minimum_above_the_peak_is_refused():
    with pytest.raises(ValueError, match=r"--min-learning-rate 0.01 is above the peak, --learning-rate 0.001"):
        Stage1Config(learning_rate=1e-3, min_learning_rate=1e-2)


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"text": "é'.encode()[:-1])
    keep_until(log, 2)
    assert lines(log) == [{"step": 1}, {"step": 2}]


def test_data_is_not_what_a_step_waits_for():
    """Preparing a batch takes a small part of what a training step takes (a third, with much room for a busy machine)."""
    model, processor = start_pretraining("qformer", 0)
    collator, scenes = Stage1Collator(processor, 32), SceneCaptions("train", 96)
    collator([scenes[index] for index in range(48)])
    began = time.process_time()
    batch = collator([scenes[index] for index in range(48, 96)])
    prepared = time.process_time()
    del batch["ids"]
    model(**batch).loss.backward()
    assert prepared - began < (time.process_time() - prepared) / 3


def test_scene_questions_make_a_stage_2_batch(runs):
    model, processor = start_generation(runs / "undisturbed" / "model", "opt", 0)
    questions = SceneQuestions("train", 2, questions_per_scene=3)
    by_image = ByImage(questions, [[0, 1, 2], [3, 4, 5]])
    batch = Stage2Collator(processor, model.generation_config.eos_token_id, 32)([by_image[0], by_image[1]])
    assert batch.pop("ids") == [questions[place]["id"] for place in range(6)]
    assert batch["pixel_values"].shape[0] == 2
    assert batch["image_index"].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.isfinite(model(**batch).loss)
