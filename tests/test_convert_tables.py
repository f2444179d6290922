"""What a conversion prints and keeps: where everything comes from."""

from published import BLIP2, record, run

from xformer_mllm import XFormerForConditionalGeneration

pytest_plugins = ["published_files"]


def test_the_table_says_where_everything_comes_from(files, converted, capsys, tmp_path):
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
