"""A model that differs from its sources is rejected; the report."""

from conftest import randomise
from published import BLIP2, fails, opt_config, opt_tokenizer, record, run
from transformers import OPTForCausalLM

from xformer_mllm import XFormerForConditionalGeneration
from xformer_mllm.convert.assembly import initialised

pytest_plugins = ["published_files"]


def test_another_language_model_is_rejected(files, tmp_path, capsys):
    randomise(OPTForCausalLM(opt_config())).save_pretrained(tmp_path / "other")
    opt_tokenizer().save_pretrained(tmp_path / "other")
    error = fails(files, capsys, tmp_path / "out", "--qformer", "blip2", "--mae", "mae", "--llm", tmp_path / "other")
    assert "logits: the new model differs from" in error
    assert "it is not kept" in error


def test_a_model_unlike_its_sources_is_rejected(files, tmp_path, capsys, monkeypatch):
    def opened(*arguments):
        return {name: tensor + 0.5 for name, tensor in initialised(*arguments).items()}

    monkeypatch.setattr("xformer_mllm.convert.assembly.initialised", opened)
    error = fails(files, capsys, tmp_path / "out", *BLIP2)
    assert "queries: the new model differs from" in error


def test_the_table_states_every_origin(files, converted, capsys, tmp_path):
    assert run(files, tmp_path / "again", *BLIP2, "--dtype", "float32") == 0
    shown = capsys.readouterr().out
    parts = {(row["part"], row["from"]): row for row in record(tmp_path / "again")["parts"]}
    model = XFormerForConditionalGeneration.from_pretrained(converted)
    assert sum(row["parameters"] for row in parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["fusion", "initialised"]["tensors"] == len(list(model.xformer.fusion.parameters()))
    assert parts["mae_decoder", str(files / "mae")]["tensors"] == len(model.xformer.mae_decoder.state_dict())
    assert not [row for row in parts if row[1] == "initialised" and row[0] != "fusion"]
    assert f"{parts['fusion', 'initialised']['parameters']:,}" in shown
    assert record(tmp_path / "again")["settings"]["mae"] == str(files / "mae")
    left = {row["why"] for row in record(tmp_path / "again")["left"]}
    assert left == {"the language model comes from --llm"}
    assert "logits" in shown
