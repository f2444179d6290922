"""`xformer convert`: published checkpoints -> a starting X-Former, verified against them.

In reading order:

    sources       the checkpoints that the arguments name
    layouts       names of tensors in published checkpoints, and their translation
    assembly      configuration, empty model, the origin of each tensor, and the files
    verification  the written model compared with its sources, and the report
"""

import json
from pathlib import Path

from transformers.utils import logging

from xformer_mllm.commands import ConvertConfig
from xformer_mllm.convert.assembly import build_target, make_plan, write_model
from xformer_mllm.convert.sources import open_sources
from xformer_mllm.convert.verification import record, show_checks, show_summary, summary, verify
from xformer_mllm.files import atomic_path, check_new_folder, write_whole

__all__ = ["convert"]


def convert(config: ConvertConfig) -> Path:
    """Convert, verify, and return the new model's folder.

    Raises:
        ValueError, OSError: if a source cannot be read or does not fit, or if the new model differs from its sources.
    """
    folder = config.output_dir
    check_new_folder(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no loading reports: the table below is complete
    try:
        target = build_target(config, open_sources(config))
        plan = make_plan(target)
        table = summary(plan, target)
        print(show_summary(table))
        with atomic_path(folder) as partial:
            partial.mkdir()
            write_model(partial, plan, target)
            checks = verify(partial, plan, target)
            print(f"\n{show_checks(checks)}")
            for check in checks:
                if not check.difference <= check.tolerance:  # nan counts as a difference
                    raise ValueError(
                        f"{check.what}: the new model differs from {check.against} by {check.difference:.1e} of the largest "
                        f"value (allowed: {check.tolerance:.0e}), so it is not kept; check that the sources belong together"
                    )
            write_whole(partial / "conversion.json", json.dumps(record(target, table, checks), indent=2) + "\n")
    finally:
        logging.set_verbosity(verbosity)
    print(f"\n{folder}: {type(target.model).__name__}")
    return folder
