"""`xformer convert`: published checkpoints -> a starting X-Former, and the proof that it still is its parents.

In the order of reading:

    settings       what can be asked for
    files          a hub id, a folder or a .pth file -> names, shapes, and tensors one at a time
    sources        the checkpoints of a conversion, and whether each can be what it is named as
    layouts        each layout's names -> transformers' names of BLIP-2 -> ours
    pieces         the sources' tensors by those names
    configuration  what the sources say of their sizes -> the new model's configuration and tokenizers
    target         the new model, still empty, and its processor
    plan           for each tensor where it comes from; what is initialised; what is left over
    writing        tensor by tensor into shards: never a second copy of a part in memory
    references     the sources on a test image, run by their own code
    checks         the written model against them: logits, scores, reconstruction loss
    tables         what is printed, and kept as conversion.json
"""

import json
import os
import shutil
from pathlib import Path

from transformers.utils import logging

from xformer_mllm.convert.checks import verify
from xformer_mllm.convert.plan import make_plan
from xformer_mllm.convert.settings import ConvertConfig
from xformer_mllm.convert.sources import open_sources
from xformer_mllm.convert.tables import record, show_checks, show_summary, summary
from xformer_mllm.convert.target import build_target
from xformer_mllm.convert.writing import write_model
from xformer_mllm.files import write_whole

__all__ = ["ConvertConfig", "convert"]


def convert(config: ConvertConfig) -> Path:
    """Convert, verify, and return the new model's folder.

    Raises:
        ValueError, OSError: in one line, for a source that cannot be read or does not fit, and for a difference.
    """
    folder = config.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: there is something already; name another --output-dir or remove it")
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers' own reports of what it loaded: ours is complete
    try:
        target = build_target(config, open_sources(config))
        plan = make_plan(target)
        table = summary(plan, target)
        print(show_summary(table))
        partial.mkdir(parents=True)
        write_model(partial, plan, target)
        checks = verify(partial, plan, target)
        print(f"\n{show_checks(checks)}")
        for check in checks:
            check.demand()
        write_whole(partial / "conversion.json", json.dumps(record(target, table, checks), indent=2) + "\n")
        os.replace(partial, folder)
    finally:
        logging.set_verbosity(verbosity)
        shutil.rmtree(partial, ignore_errors=True)
    print(f"\n{folder}: {type(target.model).__name__}")
    return folder
