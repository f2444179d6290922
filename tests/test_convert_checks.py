"""A model that is not its parents is found out."""

from conftest import randomise
from published import BLIP2, fails, opt_config, opt_tokenizer
from transformers import OPTForCausalLM

from xformer_mllm.convert.assembly import initialised

pytest_plugins = ["published_files"]


def test_a_language_model_with_other_weights_is_found_out(files, tmp_path, capsys):
    randomise(OPTForCausalLM(opt_config())).save_pretrained(tmp_path / "other")
    opt_tokenizer().save_pretrained(tmp_path / "other")
    error = fails(files, capsys, tmp_path / "out", "--qformer", "blip2", "--mae", "mae", "--llm", tmp_path / "other")
    assert "logits: the new model is" in error
    assert "it is not kept" in error


def test_a_model_that_is_not_its_parents_is_found_out(files, tmp_path, capsys, monkeypatch):
    def opened(*arguments):
        return {name: tensor + 0.5 for name, tensor in initialised(*arguments).items()}

    monkeypatch.setattr("xformer_mllm.convert.assembly.initialised", opened)
    error = fails(files, capsys, tmp_path / "out", *BLIP2)
    assert "queries: the new model is" in error
