"""A checkpoint that cannot be found or read is said in one line."""

import pytest
import torch
from published import blip2_config, fails
from torch.nn import functional

pytest_plugins = ["published_files"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "no such file or folder"),
        ("Salesforce/blip2-opt-2.7b", "not to be had from the hub"),
        ("strange", "transformers does not know ('strange')"),
        ("empty", "no config.json in it"),
        ("no_weights", "no weights in it"),
        ("broken", "damaged or cut short"),
        ("code.pth", "not a checkpoint that can be read safely"),
        ("list.pth", "no tensors in it"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(files, name, message, tmp_path, capsys):
    for folder in ("strange", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    blip2_config().save_pretrained(tmp_path / "no_weights")
    blip2_config().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x10\0\0\0")
    torch.save({"model": functional.gelu}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    named = tmp_path / name if (tmp_path / name).exists() else name
    assert message in fails(files, capsys, tmp_path / "out", "--qformer", named, "--mae", "mae")
