"""The command `xformer`: a table of subcommands, each a configuration that tyro reads and a function that takes it.

Nothing heavy is imported before a subcommand is known. What a user can do something about is one line on stderr and
exit code 2; Ctrl-C is 130; anything else is a bug and keeps its traceback.
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


@dataclass(frozen=True)
class Command:
    """A subcommand. `config` and `run` are "module:name" inside the package: imported when it is asked for."""

    summary: str
    config: str
    run: str


COMMANDS = {
    "demo": Command(
        "train and compare the Q-Former and X-Former in minutes", "embedded.demo:DemoConfig", "embedded.demo:run_demo"
    ),
    "data probe": Command(
        "what can be read from frozen CLIP, MAE, both, and a random network",
        "embedded.probe:ProbeConfig",
        "embedded.probe:run_probe",
    ),
    "data export": Command(
        "the embedded scenes in a benchmark's official files",
        "embedded.exports:SceneExportConfig",
        "embedded.exports:export",
    ),
    "data inspect": Command(
        "what a source of images holds, with a contact sheet, and what of it is broken",
        "data.inspect:InspectConfig",
        "data.inspect:inspect",
    ),
    "data shard": Command(
        "any source as webdataset shards",
        "data.shard_writer:ShardConfig",
        "data.shard_writer:shard",
    ),
    "train stage1": Command(
        "stage 1: image-text contrast, matching, generation and reconstruction",
        "train.config:Stage1Config",
        "train.stages:run_stage1",
    ),
    "train stage2": Command(
        "stage 2: the queries as a soft prompt of a frozen language model",
        "train.config:Stage2Config",
        "train.stages:run_stage2",
    ),
    "train encoders": Command(
        "the embedded world's tiny CLIP and MAE",
        "embedded.encoders:EncodersConfig",
        "embedded.encoders:train_encoders",
    ),
    "train lm": Command(
        "the embedded world's tiny OPT language model", "embedded.encoders:LmConfig", "embedded.encoders:train_lm"
    ),
    "caption": Command("describe an image", "inference:CaptionConfig", "inference:caption"),
    "ask": Command("answer a question about an image", "inference:AskConfig", "inference:ask"),
    "features": Command("an image's features, of every stage", "inference:FeaturesConfig", "inference:features"),
    "reconstruct": Command(
        "an image masked and reconstructed, side by side",
        "inference:ReconstructConfig",
        "inference:reconstruct",
    ),
    "evaluate": Command(
        "a model on a benchmark: answers, scores, the official results file, a page",
        "evaluate.evaluation:EvaluateConfig",
        "evaluate.evaluation:evaluate",
    ),
    "queries": Command(
        "where a model's queries look, and how different they are",
        "evaluate.query_analysis:QueriesConfig",
        "evaluate.query_analysis:queries",
    ),
    "score": Command(
        "any model's answers to a benchmark, in its official format",
        "evaluate.evaluation:ScoreConfig",
        "evaluate.evaluation:score",
    ),
    "estimate": Command(
        "what a recipe will cost: memory, FLOPs, hours",
        "estimate.estimation:EstimateConfig",
        "estimate.estimation:estimate",
    ),
    "convert": Command(
        "published checkpoints -> a starting X-Former, verified against them",
        "convert:ConvertConfig",
        "convert:convert",
    ),
    "export": Command(
        "a model -> a self-contained folder with a model card, ready for the hub",
        "export:ExportConfig",
        "export:export",
    ),
}

RUN_AGAIN = ("train stage1", "train stage2")  # they take --config FILE

# Packages that only some commands need -> the extra that brings them.
EXTRAS = {"easy_vqa": "easy-vqa", "gguf": "gguf", "pycocoevalcap": "eval", "peft": "lora"}


def main(arguments: list[str] | None = None) -> int:
    """Run `xformer` with `arguments` (those of the process if None) and return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _say("interrupted (a training goes on when the same command is given again)", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("xformer_mllm"):
            raise
        extra = EXTRAS.get(error.name, "train")
        return _say(f"needs the package {error.name}: pip install 'xformer-mllm[{extra}]'", 2)
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
    lines = [f"  xformer {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(
        [
            "X-Former: CLIP and MAE features unified for multimodal language models.",
            "",
            *lines,
            "",
            "xformer COMMAND --help shows its settings and their defaults.",
        ]
    )


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
