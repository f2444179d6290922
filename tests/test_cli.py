"""The command line: what it offers, and one clear line for what a user can do something about."""

import dataclasses
import pkgutil
import re
import subprocess
import sys

import pytest

from xformer_mllm import cli
from xformer_mllm.defaults import shipped_model
from xformer_mllm.embedded.commands import ProbeConfig
from xformer_mllm.train.config import Stage2Config, write_config
from xformer_mllm.variants import VARIANTS


def error_line(capsys, *words: str) -> str:
    """The one line on stderr of a command that a user got wrong."""
    assert cli.main(list(words)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xformer: ")]
    return line.removeprefix("xformer: ")


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"xformer {name} " in shown for name in cli.COMMANDS)
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "xformer train stage1" in shown
    assert "xformer caption" not in shown
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name):
    command = cli.COMMANDS[name]
    assert isinstance(pkgutil.resolve_name(f"xformer_mllm.{command.config}"), type)
    assert callable(pkgutil.resolve_name(f"xformer_mllm.{command.run}"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_its_defaults(name, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main([*name.split(), "--help"])
    assert exited.value.code == 0
    options = re.sub(r"(?m)^[│ ]{1,3}--", "¦--", capsys.readouterr().out)
    shown = " ".join(options.replace("│", " ").split())
    assert f"xformer {name}" in shown
    kind = pkgutil.resolve_name(f"xformer_mllm.{cli.COMMANDS[name].config}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        after = re.split(rf"¦{flag}[ ,]", shown)[-1]
        values = field.default if isinstance(field.default, tuple) else [field.default]
        words = [str(getattr(value, "value", value)) for value in values]
        assert after.partition("(default:")[2].partition(")")[0].split() == words, flag


def test_training_help_shows_every_field_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "stage2", "--help"])
    options = re.sub(r"(?m)^[│ ]{1,3}--", "¦--", capsys.readouterr().out)
    shown = " ".join(options.replace("│", " ").split())
    assert "--config FILE takes the settings of a run's config.json" in shown
    assert (
        "--max-grad-norm FLOAT Maximum gradient norm for gradient clipping; 0 disables clipping. (default: 1.0)"
        in shown
    )
    assert (
        "--steps INT Total number of optimizer steps, and the length of the cosine schedule. (default: 800)" in shown
    )


def test_training_help_names_every_variant(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "stage1", "--help"])
    options = re.sub(r"(?m)^[│ ]{1,3}--", "¦--", capsys.readouterr().out)
    shown = " ".join(options.replace("│", " ").split())
    listed = shown.partition("Model variant: ")[2].partition(" (variants.py")[0]
    names = listed.replace("(rows of the paper's tables)", "").replace(" ", "").split(",")
    assert names == list(VARIANTS)


def test_probe_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "probe", "--help"])
    options = re.sub(r"(?m)^[│ ]{1,3}--", "¦--", capsys.readouterr().out)
    shown = " ".join(options.replace("│", " ").split())
    for field in dataclasses.fields(ProbeConfig):
        flag = f"--{field.name.replace('_', '-')} "
        assert shown.partition(flag)[2].partition("(default:")[0].split(maxsplit=1)[1:], flag


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("xformer-mllm ")


def test_an_unknown_command_is_told_the_nearest(capsys):
    assert error_line(capsys, "tran") == "unknown command 'tran'; did you mean train?"
    assert error_line(capsys, "train", "stage3") == "unknown command 'train stage3'; did you mean train stage2?"
    assert error_line(capsys, "fly") == "unknown command 'fly'; see xformer --help"


def test_an_unknown_variant_is_told_the_names(capsys, tmp_path):
    line = error_line(capsys, "train", "stage1", "--variant", "xfromer", "--output-dir", str(tmp_path / "run"))
    assert "xfromer" in line
    assert all(name in line for name in VARIANTS)
    assert not (tmp_path / "run").exists()


def test_unknown_data_and_impossible_numbers_are_one_line(capsys, tmp_path):
    output = ("--output-dir", str(tmp_path / "run"))
    line = error_line(capsys, "train", "stage1", "--data", str(tmp_path / "none"), *output)
    assert line.startswith(
        f"{tmp_path / 'none'}: no such data source; expected scenes, scenes-detailed, photographs, easy-vqa, a folder"
    )
    assert error_line(capsys, "train", "stage1", "--data", "scene", *output).startswith("scene: no such data source")
    with pytest.raises(SystemExit) as exited:  # tyro's own words around ours
        cli.main(["train", "stage1", "--steps", "0", *output])
    assert exited.value.code == 2
    assert "--steps must be at least 1, not 0" in capsys.readouterr().err


def test_wrong_settings_and_attributes_are_one_line(capsys, tmp_path):
    words = ("train", "stage1", "--model-settings", "num_query_token=3", "--output-dir", str(tmp_path / "run"))
    assert error_line(capsys, *words).startswith("--model-settings num_query_token=3: expected NAME=VALUE")
    line = error_line(capsys, "data", "probe", "--attributes", "textures")
    assert line.startswith("--attributes textures: not a type of question; choose from count_all")


def test_a_wrong_configuration_file_is_one_line(capsys, tmp_path):
    missing = tmp_path / "config.json"
    assert error_line(capsys, "train", "stage1", "--config", str(missing)) == f"{missing}: no such configuration file"
    assert error_line(capsys, "train", "stage1", "--config", str(tmp_path)).startswith(f"{missing}: no such")
    assert error_line(capsys, "train", "stage1", "--config").startswith("--config needs a file")
    write_config(Stage2Config(output_dir=tmp_path), "train stage2")
    assert "not of `xformer train stage1`" in error_line(capsys, "train", "stage1", "--config", str(tmp_path))
    assert error_line(capsys, "train", "stage1", f"--config={missing}") == (
        f"{missing}: the configuration of `xformer train stage2`, not of `xformer train stage1`"
    )
    missing.write_text('{"model_type": "xformer"}')
    assert "not a run's configuration" in error_line(capsys, "train", "stage1", "--config", str(missing))
    missing.write_text('{"command": "train stage1", "stepps": 3}')
    assert "unknown field 'stepps'; fields: augment, batch_size" in error_line(
        capsys, "train", "stage1", "--config", str(missing)
    )


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "xformer: interrupted"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ValueError("two\nlines"), 2, "xformer: two lines\n"),
        (ModuleNotFoundError("no", name="easy_vqa"), 2, "pip install -e '.[easy-vqa]'"),
        (ModuleNotFoundError("no", name="tyro"), 2, "pip install -e '.[train]'"),
    ],
)
def test_errors_a_user_can_correct_have_no_traceback(monkeypatch, capsys, raised, code, said):
    def caption(config):
        raise raised

    monkeypatch.setattr("xformer_mllm.inference.caption", caption)
    assert cli.main(["caption", "a.png"]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), ModuleNotFoundError("a bug", name="xformer_mllm.nothing")])
def test_a_bug_keeps_its_traceback(monkeypatch, raised):
    def caption(config):
        raise raised

    monkeypatch.setattr("xformer_mllm.inference.caption", caption)
    with pytest.raises(type(raised), match="a bug"):
        cli.main(["caption", "a.png"])


def imported_after(program, packages):
    program = f"import sys; from xformer_mllm import cli\n{program}\nprint({packages} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[-1]


def test_the_overview_imports_nothing_heavy():
    program = "cli.main(['--help']); cli.main(['--version']); cli.main(['aks'])"
    assert imported_after(program, {"torch", "transformers", "tyro"}) == "set()"


def test_no_command_needs_torch_for_its_help():
    program = "import pkgutil\nfor c in cli.COMMANDS.values(): pkgutil.resolve_name(f'xformer_mllm.{c.config}')"
    assert imported_after(program, {"torch", "transformers", "huggingface_hub"}) == "set()"


def test_python_dash_m_is_the_command():
    words = [sys.executable, "-m", "xformer_mllm", "--version"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("xformer-mllm ")


@pytest.mark.parametrize(
    "first",
    [
        "import xformer_mllm, transformers",
        "import transformers, xformer_mllm",
        "import xformer_mllm.variants, transformers",
        "import xformer_mllm.language_models, transformers",
        "import xformer_mllm.model.fusion, transformers",
        "import xformer_mllm, xformer_mllm.files, transformers",
    ],
)
def test_auto_classes_know_x_former_in_any_order(first):
    folder = str(shipped_model("xformer"))
    program = f"{first}; print(type(transformers.AutoConfig.from_pretrained({folder!r})))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "XFormerConfig" in found.stdout


def test_overview_lists_every_command_once():
    assert sorted(name for names in cli.GROUPS.values() for name in names) == sorted(cli.COMMANDS)


NOT_UTF8 = [
    ["ask", "scene:test:3"],
    ["ask", "scene:test:3", "--model"],
    ["caption"],
    ["evaluate", "runs/x", "--prompt"],
    ["train", "stage1", "--data"],
    ["data", "inspect"],
    ["data", "shard", "x", "--output-dir"],
    ["train", "stage2", "--config"],
]


@pytest.mark.parametrize("words", NOT_UTF8, ids=" ".join)
def test_arguments_that_are_not_utf8(words, capsys):
    said = error_line(capsys, *words, "caf\udce9")
    assert said == r"the argument 'caf\\udce9' is not UTF-8; type it in UTF-8, or rename the file"


def test_bytes_of_a_shell_that_are_not_utf8():
    command = [sys.executable, "-m", "xformer_mllm", "ask", "scene:test:3", b"\xff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
