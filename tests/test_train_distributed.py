"""Training in several processes: two real ones (gloo) do what one does with the joint batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import llm_inputs, randomise, tiny_config
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from transformers.utils import is_accelerate_available

from xformer_mllm import XFormerForConditionalGeneration, XFormerForPreTraining, processes
from xformer_mllm.embedded.scenes import SceneCaptions
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.model.distributed import rank
from xformer_mllm.train import fsdp as sharding
from xformer_mllm.train import state
from xformer_mllm.train.batches import Stage1Collator
from xformer_mllm.train.config import Stage1Config
from xformer_mllm.train.logs import RunLog, Samples
from xformer_mllm.train.loop import TrainingLoop, start_accelerator
from xformer_mllm.train.run_folder import checkpoints, fault

WORLD = 2
TABLE_ROWS = ["qformer", "xformer", "concat", "early_cross_attention", "clip_shallow", "no_reconstruction"]
PRETRAINING, GENERATION = XFormerForPreTraining, XFormerForConditionalGeneration


def records(count: int) -> list[dict]:
    """Images with texts of 3 to 9 tokens, and the noise of their masks."""
    made = []
    for number in range(count):
        rng = torch.Generator().manual_seed(number)
        length = 3 + number * 5 % 7
        made.append(
            {
                "id": str(number),
                "pixels": torch.randint(0, 256, (3, 32, 32), generator=rng, dtype=torch.uint8),
                "text": torch.randint(5, 40, (length,), generator=rng),
                "noise": torch.rand(16, generator=rng),
            }
        )
    return made


def padded(rows: list[torch.Tensor], value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def stage1_batch(batch: list[dict]) -> dict:
    """As Stage1Collator's; nothing is random: each pair's negatives are the next but one image and the next text."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    own, pairs = rank() * len(batch) + torch.arange(len(batch)), world * len(batch)
    negatives = ((own + 2) % pairs, (own + 1) % pairs)
    return {
        "ids": [record["id"] for record in batch],
        "pixel_values": torch.stack([record["pixels"] for record in batch]),
        "qformer_input_ids": padded([record["text"] for record in batch]),
        "qformer_attention_mask": padded([torch.ones_like(record["text"]) for record in batch]),
        "noise": torch.stack([record["noise"] for record in batch]),
        "negatives": negatives if pairs > 2 else None,
    }


def stage2_batch(batch: list[dict]) -> dict:
    """As Stage2Collator's; an image has one text or, with an even number, two."""
    config = tiny_config()
    texts, index = [], []
    for place, record in enumerate(batch):
        for _ in range(2 - int(record["id"]) % 2):
            texts.append(record["text"])
            index.append(place)
    prompt, _ = llm_inputs(config, len(texts), 0)
    targets, ones = padded(texts), padded([torch.ones_like(text) for text in texts])
    return {
        "ids": [record["id"] for record in batch],
        "pixel_values": torch.stack([record["pixels"] for record in batch]),
        "input_ids": torch.cat([prompt, targets], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prompt), ones], dim=1),
        "labels": torch.cat([torch.full_like(prompt, -100), padded(texts, -100)], dim=1),
        "image_index": torch.tensor(index),
    }


def write(model) -> list[dict]:
    """What the model says about two images."""
    pixels = torch.stack([record["pixels"] for record in records(2)])
    said = model.caption(pixels, 39, 5) if hasattr(model, "caption") else model.generate(pixels, max_new_tokens=5)
    return [{"id": str(place), "text": str(row.tolist()), "reference": ""} for place, row in enumerate(said)]


def train(folder: Path, kind: type, collate, count: int, batch: int, sharded=False, resume=None, **settings):
    """A run of `kind` on `count` records, everything equal but for how the work is shared.

    Keeps the gradients of every step and the weights at the end, as one process sees them.
    """
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    config = tiny_config()
    config.qformer_config.use_qformer_text_input = kind is PRETRAINING
    model = randomise(kind(config))
    model.freeze()
    if kind is GENERATION:
        model.language_model.to(torch.bfloat16)  # frozen, beside trained fp32
    fields = {"steps": 3, "logging_steps": 1, "max_grad_norm": 1.0, "learning_rate": 1e-2} | settings
    config = Stage1Config(
        output_dir=folder, batch_size=batch, warmup_steps=0, bf16="no", report_to=(), sample_steps=2, **fields
    )
    accelerator = start_accelerator()
    if sharded:  # accelerate shards on GPUs alone; told that these processes are to be sharded, it shards CPU tensors
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    samples = Samples(folder, None, write)
    loop = TrainingLoop(accelerator, model, config, records(count), collate, RunLog(folder, config.steps), samples)
    for group in loop.optimizer.param_groups:
        group["eps"] = 1e-3  # else a gradient of 1e-9, which is 0 but for rounding, becomes a whole step
    gradients = {}

    def keep(*_):
        for name, parameter in loop.whole_model.named_parameters():
            if parameter.requires_grad:
                gradients[f"{loop.step}.{name}"] = state.whole(parameter.grad).clone()

    loop.optimizer.optimizer.register_step_pre_hook(keep)
    loop.train(Path(resume) if resume else None)
    weights = {name: state.whole(p.detach()).clone() for name, p in loop.whole_model.named_parameters()}
    saved = loop.whole_weights()
    if processes.is_first():
        save_file(gradients, folder / "gradients.safetensors")
        save_file(weights, folder / "weights.safetensors")
        loop.whole_model.save_pretrained(folder / "model", state_dict=saved)
    if sharded:
        accelerator.state.distributed_type = DistributedType.MULTI_CPU


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


RUNS = {  # name: model, collator, records, joint batch. 9 records: what is left over of an epoch is dropped
    "stage1": (PRETRAINING, stage1_batch, 9, 4),
    "stage2": (GENERATION, stage2_batch, 9, 4),
    "one pair each": (PRETRAINING, stage1_batch, 9, 2),
}
SHARDED = ("stage1", "stage2") if is_accelerate_available(sharding.ACCELERATE) else ()


newer = pytest.mark.skipif(not SHARDED, reason=f"FSDP needs accelerate {sharding.ACCELERATE}")


def both(process: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    processes.join()
    root = Path(folder)
    for name, (kind, collate, count, batch) in RUNS.items():
        train(root / f"{name}, two", kind, collate, count, batch // WORLD)
    for name in SHARDED:
        kind, collate, count, batch = RUNS[name]
        train(root / f"{name}, sharded", kind, collate, count, batch // WORLD, sharded=True)
    train(root / "few", PRETRAINING, stage1_batch, 3, 2, steps=2)
    train(root / "saved", PRETRAINING, stage1_batch, 9, 2, save_steps=2)
    saved = str(root / "saved" / "checkpoint-2")
    train(root / "resumed by two", PRETRAINING, stage1_batch, 9, 2, resume=saved)
    if SHARDED:
        train(root / "resumed sharded", PRETRAINING, stage1_batch, 9, 2, sharded=True, resume=saved)
    refusal(process, root)
    torch.distributed.destroy_process_group()


REFUSALS = {
    "first": ["ValueError('wrong folder')", "SystemExit(2)"],
    "second": ["ValueError('process 1: no such image')", "SystemExit(2)"],
    "none": ["0", "1"],
    "decided": ["5", "5"],
}


def refusal(process: int, folder: Path) -> None:
    """Somebody finds something wrong: all of them end, and only the first one says why."""

    def look(at: int, what: str):
        if process == at:
            raise ValueError(what)
        return process

    tries = {
        "first": lambda: processes.on_first(lambda: look(0, "wrong folder")),
        "second": lambda: processes.together(lambda: look(1, "no such image")),
        "none": lambda: processes.together(lambda: look(2, "")),
        "decided": lambda: processes.on_first(lambda: process + 5),
    }
    for name, attempt in tries.items():
        try:
            found = attempt()
        except BaseException as error:
            found = error
        (folder / f"{name}-{process}").write_text(repr(found))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.spawn(both, args=(str(folder), port), nprocs=WORLD, join=False)
    for name, (kind, collate, count, batch) in RUNS.items():
        train(folder / name, kind, collate, count, batch)
    while not context.join():
        pass
    train(folder / "resumed by one", PRETRAINING, stage1_batch, 9, 4, resume=str(folder / "saved" / "checkpoint-2"))
    return folder


def assert_same(one: Path, other: Path, what: str) -> None:
    ours, theirs = load_file(one / what), load_file(other / what)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            theirs[name], ours[name], atol=2e-5, rtol=2e-3, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize(
    ("name", "shared"), [*((name, "two") for name in RUNS), *((name, "sharded") for name in SHARDED)]
)
def test_two_processes_are_one_with_the_joint_batch(results, name, shared):
    one, other = results / name, results / f"{name}, {shared}"
    ours, theirs = map(log_of, (one, other))
    assert [log["step"] for log in theirs] == [1, 2, 3]
    compared = {name for name in ours[0] if name.endswith(("loss", "accuracy"))}
    assert compared >= ({"lm_loss"} if name == "stage2" else {"itc_loss", "itm_loss", "itg_loss", "itm_accuracy"})
    for log, other_log in zip(ours, theirs, strict=True):
        for value in [*compared, "grad_norm", "query_similarity"]:
            assert other_log[value] == pytest.approx(log[value], rel=1e-4, abs=1e-5), value
    assert_same(one, other, "gradients.safetensors")
    assert_same(one, other, "weights.safetensors")


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_speaks_and_is_saved_whole(results, name):
    one, sharded = results / name, results / f"{name}, sharded"
    said = (one / "samples.jsonl").read_text()
    assert len(said.splitlines()) == 4
    assert (sharded / "samples.jsonl").read_text() == said
    kind, *_ = RUNS[name]
    weights = load_file(sharded / "weights.safetensors")
    for parameter_name, parameter in kind.from_pretrained(sharded / "model").named_parameters():
        assert torch.equal(parameter, weights[parameter_name]), parameter_name
    assert json.loads((sharded / "model" / "config.json").read_text())["architectures"] == [kind.__name__]


@pytest.mark.parametrize("by", ["two", "one"])
def test_a_checkpoint_of_two_processes_is_resumed(results, by):
    """By as many, bit for bit."""
    for what in ("gradients.safetensors", "weights.safetensors"):
        ours, theirs = load_file(results / "stage1, two" / what), load_file(results / f"resumed by {by}" / what)
        for name, tensor in theirs.items():
            if by == "two":
                assert torch.equal(tensor, ours[name]), name
            torch.testing.assert_close(tensor, ours[name], atol=2e-5, rtol=2e-3)


@newer
def test_a_checkpoint_is_resumed_with_fsdp(results):
    assert_same(results / "resumed by two", results / "resumed sharded", "gradients.safetensors")
    assert_same(results / "resumed by two", results / "resumed sharded", "weights.safetensors")


def test_a_checkpoint_holds_the_random_states_of_both(results):
    saved = results / "saved" / "checkpoint-2"
    assert fault(saved) is None
    states = load_file(saved / "processes.safetensors")
    assert states.keys() == {"0.cpu", "1.cpu"}
    assert not torch.equal(states["0.cpu"], states["1.cpu"])


def test_fewer_records_than_a_joint_batch(results):
    log = log_of(results / "few")
    assert [record["step"] for record in log] == [1, 2]


def test_what_one_process_refuses_ends_all_and_is_said_once(results):
    said = {name: [(results / f"{name}-{process}").read_text() for process in range(WORLD)] for name in REFUSALS}
    assert said == REFUSALS


COMMAND = [
    "train",
    "stage1",
    "--variant",
    "qformer",
    "--train-size",
    "12",
    "--batch-size",
    "3",
    "--logging-steps",
    "2",
]
COMMAND += ["--save-steps", "2", "--sample-steps", "4", "--warmup-steps", "1", "--steps", "4"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--no-python"],
    "accelerate": [
        "accelerate.commands.accelerate_cli", "launch", "--config_file", "recipes/accelerate/one-node-ddp.yaml",
        "--num_processes", "2", "--no_python",
    ],
}  # fmt: skip


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(Path(sys.executable).with_name("xformer"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *COMMAND, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_itself_under_a_launcher(launcher, tmp_path):
    run = tmp_path / "run"
    done = launch(launcher, "--output-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes on cpu, DDP") == 1
    assert done.stdout.count("step      4/4") == 1
    assert {path.name for path in run.iterdir()} == {
        "config.json", "freeze.json", "log.jsonl", "model", "samples", "samples.jsonl", "summary.json", "tensorboard"
    }  # fmt: skip
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert json.loads((run / "summary.json").read_text())["processes"] == 2
    assert len((run / "samples.jsonl").read_text().splitlines()) == 4
    assert "this run is finished" in launch(launcher, "--output-dir", str(run)).stdout
    refused = launch(launcher, "--output-dir", str(run), "--seed", "1")
    assert refused.returncode != 0
    assert refused.stderr.count("holds another run (seed 1, not 0)") == 1


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_resume(tmp_path):
    steps = ["--steps", "12"]
    assert launch("torchrun", *steps, "--output-dir", str(tmp_path / "undisturbed")).returncode == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(Path(sys.executable).with_name("xformer")), *COMMAND]
    launcher = subprocess.Popen(
        [*command, *steps, "--output-dir", str(killed)], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not checkpoints(killed):
        assert launcher.poll() is None
        time.sleep(0.002)
    second = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()[-1]
    os.kill(int(second), signal.SIGKILL)
    assert launcher.wait(120) != 0
    assert not (killed / "model").exists()
    resumed = launch("torchrun", *steps, "--output-dir", str(killed))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert (killed / "log.jsonl").read_text() == (tmp_path / "undisturbed" / "log.jsonl").read_text()


@newer
@pytest.mark.parametrize("name", ["one-gpu", "one-node-ddp", "one-node-fsdp", "multi-node"])
def test_the_recipes_are_accelerates_own_settings(name):
    settings = load_config_from_file(str(Path(__file__).parents[1] / "recipes" / "accelerate" / f"{name}.yaml"))
    assert settings.mixed_precision == "no"
    sharded = settings.fsdp_config
    assert bool(sharded) == (name == "one-node-fsdp")
    if sharded:
        assert sharded.pop("fsdp_auto_wrap_policy") == "TRANSFORMER_BASED_WRAP"
        assert sharded.pop("fsdp_offload_params") is False
        fields = {key if key == "fsdp_version" else key.removeprefix("fsdp_"): sharded[key] for key in sharded}
        plugin = FullyShardedDataParallelPlugin(**fields)
        sharding.plan(XFormerForPreTraining(tiny_config()), plugin, torch.device("cpu"))
        assert plugin.transformer_cls_names_to_wrap == ["CLIPEncoderLayer", "ViTMAELayer"]


@newer
@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"fsdp_version": 1}, "second version"), ({"cpu_ram_efficient_loading": True}, "every process")],
)
def test_what_fsdp_cannot_do_is_said(wrong, what, monkeypatch):
    # The plugin writes its answer into the environment, where the processes of other tests would find it.
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **wrong})
    with pytest.raises(ValueError, match=what):
        sharding.plan(XFormerForPreTraining(tiny_config()), plugin, torch.device("cpu"))


@pytest.mark.parametrize("variant", TABLE_ROWS)
def test_all_that_is_trained_has_a_gradient(variant):
    """So that DDP need not look for what has none in every step."""
    model, processor = start_pretraining(variant, 0)
    model.freeze()
    batch = Stage1Collator(processor, 32)([SceneCaptions("train", 2)[place] for place in range(2)])
    del batch["ids"]
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
