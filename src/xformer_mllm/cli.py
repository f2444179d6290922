"""The command `xformer`: a table of subcommands, each a configuration that tyro reads and a function that takes it.

Nothing heavy is imported before a subcommand is known. What a user can correct is one line on stderr
and exit code 2; Ctrl-C is 130; anything else is a bug and keeps its traceback.
"""

import difflib
import inspect
import os
import pkgutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xformer_mllm.files import printable


@dataclass(frozen=True)
class Command:
    """A subcommand. `config` and `run` are "module:name" inside the package: imported when it is asked for."""

    summary: str
    config: str
    run: str


COMMANDS = {
    "ask": Command("Answer questions about an image", "commands:AskConfig", "inference:ask"),
    "caption": Command("Describe images", "commands:CaptionConfig", "inference:caption"),
    "features": Command("Write the features of every stage", "commands:FeaturesConfig", "inference:features"),
    "reconstruct": Command(
        "Mask images and reconstruct them, side by side", "commands:ReconstructConfig", "inference:reconstruct"
    ),
    "serve": Command(
        "Serve a model: web page and OpenAI-compatible API", "commands:ServeConfig", "serve.server:serve"
    ),
    "demo": Command(
        "Train X-Former and the Q-Former and compare them", "embedded.commands:DemoConfig", "embedded.demo:run_demo"
    ),
    "study": Command(
        "Train and compare variants, seeds and settings from one file",
        "embedded.commands:StudyConfig",
        "embedded.study:run_study",
    ),
    "train stage1": Command(
        "Train stage 1: contrast, matching, generation and reconstruction",
        "train.config:Stage1Config",
        "train.stages:run_stage1",
    ),
    "train stage2": Command(
        "Train stage 2: align the queries to a frozen language model",
        "train.config:Stage2Config",
        "train.stages:run_stage2",
    ),
    "train encoders": Command(
        "Train the embedded world's tiny CLIP and MAE",
        "embedded.commands:EncodersConfig",
        "embedded.encoders:train_encoders",
    ),
    "train lm": Command(
        "Train the embedded world's tiny OPT", "embedded.commands:LmConfig", "embedded.encoders:train_lm"
    ),
    "estimate": Command(
        "Estimate a recipe's memory, FLOPs and hours",
        "commands:EstimateConfig",
        "estimate.estimation:estimate",
    ),
    "evaluate": Command(
        "Run a model on a benchmark and score it",
        "commands:EvaluateConfig",
        "evaluate.evaluation:evaluate",
    ),
    "score": Command(
        "Score any model's answers in a benchmark's official format",
        "commands:ScoreConfig",
        "evaluate.evaluation:score",
    ),
    "queries": Command(
        "Show where a model's queries attend, and how they differ",
        "commands:QueriesConfig",
        "evaluate.query_analysis:queries",
    ),
    "data inspect": Command(
        "Show what a source of images holds, and its broken samples",
        "commands:InspectConfig",
        "data.inspect:inspect",
    ),
    "data shard": Command("Write any source as webdataset shards", "commands:ShardConfig", "data.shard_writer:shard"),
    "data export": Command(
        "Write the embedded scenes in a benchmark's official files",
        "embedded.commands:SceneExportConfig",
        "embedded.exports:export",
    ),
    "data probe": Command(
        "Measure what frozen CLIP, MAE and random tokens hold",
        "embedded.commands:ProbeConfig",
        "embedded.probe:run_probe",
    ),
    "convert": Command(
        "Convert published checkpoints into a starting X-Former, and verify it",
        "commands:ConvertConfig",
        "convert:convert",
    ),
    "export": Command(
        "Write a self-contained model folder with a model card", "commands:ExportConfig", "export:export"
    ),
}

GROUPS = {
    "Use": ("ask", "caption", "features", "reconstruct", "serve"),
    "Train": ("demo", "study", "train stage1", "train stage2", "train encoders", "train lm", "estimate"),
    "Evaluate": ("evaluate", "score", "queries"),
    "Data": ("data inspect", "data shard", "data export", "data probe"),
    "Publish": ("convert", "export"),
}
"""The order of the overview."""

RUN_AGAIN = ("train stage1", "train stage2")  # they take --config FILE

EXTRAS = {
    **{"easy_vqa": "easy-vqa", "gguf": "gguf", "pycocoevalcap": "eval", "peft": "lora"},
    **dict.fromkeys(("fastapi", "gradio", "uvicorn", "prometheus_client", "httpx", "anyio", "pydantic"), "serve"),
}
"""Package that only some commands need -> the extra that installs it; others come with `train`."""


def main(arguments: list[str] | None = None) -> int:
    """Run `xformer` with `arguments` (those of the process if None) and return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    for word in words:
        shown = printable(word)
        if shown != word:
            return _say(f"the argument {shown!r} is not UTF-8; type it in UTF-8, or rename the file", 2)
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("xformer_mllm"):
            raise
        extra = EXTRAS.get(error.name.partition(".")[0], "train")
        package = error.name.partition(".")[0].replace("_", "-")
        return _say(
            f"this needs the package {package}: pip install {package}, or in a clone pip install -e '.[{extra}]'", 2
        )
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("XFORMER_TRACEBACK"):
            raise
        return _say(str(error).replace("\n", " "), 2)


def _say(message: str, code: int) -> int:
    print(f"xformer: {message}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    if words == ["--version"]:
        print(f"xformer-mllm {version('xformer-mllm')}")
        return 0
    for name, command in COMMANDS.items():
        length = len(name.split())
        if words[:length] == name.split():
            _run(name, command, words[length:])
            return 0
    asked = " ".join(word for word in words[:2] if not word.startswith("-"))
    group = {name: command for name, command in COMMANDS.items() if name.startswith(f"{asked} ") or not asked}
    if group:
        print(_overview(group))
        return 0 if {"-h", "--help"} & set(words) else 2
    near = difflib.get_close_matches(asked, [*COMMANDS, *(name.split()[0] for name in COMMANDS)], n=1)
    hint = f"did you mean {near[0]}?" if near else "see xformer --help"
    raise ValueError(f"unknown command {asked!r}; {hint}")


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = ["X-Former: CLIP and MAE features unified for multimodal language models."]
    for group, names in GROUPS.items():
        if shown := [f"  xformer {name:<{width}}  {commands[name].summary}" for name in names if name in commands]:
            lines += ["", group, *shown]
    return "\n".join([*lines, "", "xformer COMMAND --help shows its settings and their defaults."])


def _run(name: str, command: Command, words: list[str]) -> None:
    import tyro

    kind = pkgutil.resolve_name(f"xformer_mllm.{command.config}")
    default = None
    if name in RUN_AGAIN:
        from xformer_mllm.train.config import read_config

        words, file = _take_config_file(words)
        default = read_config(file, kind, name) if file else None
    description = inspect.cleandoc(kind.__doc__)
    if name in RUN_AGAIN:
        description += (
            "\n\n--config FILE takes the settings of a run's config.json, or folder; flags beside it override them."
        )
    config: Any = tyro.cli(kind, args=words, default=default, prog=f"xformer {name}", description=description)
    run = pkgutil.resolve_name(f"xformer_mllm.{command.run}")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing weights: a bar for each of five small files
    run(config)


def _take_config_file(words: list[str]) -> tuple[list[str], Path | None]:
    """Take `--config FILE` (or --config=FILE) out of the arguments. Raises ValueError if no file follows."""
    for place, word in enumerate(words):
        if word == "--config":
            if place + 1 == len(words):
                raise ValueError("--config needs a file: the config.json of a run's folder")
            return words[:place] + words[place + 2 :], Path(words[place + 1])
        if word.startswith("--config="):
            return words[:place] + words[place + 1 :], Path(word.removeprefix("--config="))
    return words, None


if __name__ == "__main__":
    sys.exit(main())
