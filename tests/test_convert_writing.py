"""The new model's folder: dtypes, shards, what is initialised, and a disk that is full."""

from types import SimpleNamespace

import torch
from published import BLIP2, differences, fails, run
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from xformer_mllm import XFormerForConditionalGeneration
from xformer_mllm.model.modeling_xformer import FROZEN

pytest_plugins = ["published_files"]


def test_frozen_parts_are_saved_in_bf16_and_trained_ones_in_fp32(files, tmp_path):
    assert run(files, tmp_path / "out", *BLIP2) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        frozen = set(FROZEN) & set(name.split(".")[:2])
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    assert max(differences(tmp_path / "out").values()) < 1e-2


def test_shards_load_as_one_file_does(files, converted, tmp_path, monkeypatch):
    monkeypatch.setattr("xformer_mllm.convert.assembly.SHARD_BYTES", 300_000)
    assert run(files, tmp_path / "out", *BLIP2, "--dtype", "float32") == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    a, b = (
        XFormerForConditionalGeneration.from_pretrained(path).state_dict() for path in (converted, tmp_path / "out")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_seed_decides_what_is_initialised(files, converted, tmp_path):
    assert run(files, tmp_path / "out", *BLIP2, "--dtype", "float32", "--seed", 1) == 0
    a, b = (
        XFormerForConditionalGeneration.from_pretrained(path).state_dict() for path in (converted, tmp_path / "out")
    )
    changed = {name.split(".")[1] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"fusion"}


def test_a_full_disk_is_said_before_anything_is_written(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xformer_mllm.convert.assembly.shutil.disk_usage", lambda _: SimpleNamespace(free=1e6))
    assert "the model needs 0.0 GB" in fails(files, capsys, tmp_path / "out", *BLIP2)


def test_a_disk_that_fills_up_is_said_too(files, tmp_path, capsys, monkeypatch):
    def save_file(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("xformer_mllm.convert.assembly.save_file", save_file)
    assert "No space left on device" in fails(files, capsys, tmp_path / "out", *BLIP2)


def test_who_may_read_the_configuration_may_read_the_weights(converted):
    assert (converted / "model.safetensors").stat().st_mode == (converted / "config.json").stat().st_mode
