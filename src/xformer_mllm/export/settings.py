"""What `xformer export` is asked for; tyro turns the fields into flags and the texts under them into --help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from huggingface_hub.utils import validate_repo_id


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Make a self-contained folder of a model, with a model card: ready for the hub, and for transformers alone."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or of its model."""
    output_dir: Path
    """The new folder; must not exist yet, or be empty."""
    max_shard_size: str = "5GB"
    """At most so much in one file of weights (a larger tensor has a file of its own)."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the frozen parts, in place of the one that they have; what is trained stays as it is."""
    repo_id: str | None = None
    """The model's name on the hub (you/xformer-opt-2.7b), for the card; by default the new folder's name."""
    license: str = "other"
    """Of the whole, frozen parts included, as the hub names it (apache-2.0, cc-by-nc-4.0, ...): yours to choose."""
    license_name: str | None = None
    """What the licence is called, where --license is other."""
    license_link: str | None = None
    """Where it can be read, where --license is other."""
    base_models: tuple[str, ...] = ()
    """What the model was made from, each with its licence: facebook/opt-2.7b=other facebook/vit-mae-huge=cc-by-nc-4.0.
    Names are found beside the model where they can be; licences are not."""
    datasets: tuple[str, ...] = ()
    """What it was trained on, as the hub names it."""
    metrics: tuple[Path, ...] = ()
    """metrics.json of evaluations; those that `xformer evaluate` put beside the model are found."""

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for settings that cannot be."""
        if self.repo_id is not None:
            validate_repo_id(self.repo_id)
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError(f"--license-name and --license-link belong to --license other, not to {self.license}")
        for named in self.base_models:
            if not all(named.partition("=")[::2]):
                raise ValueError(f"--base-models {named}: give each name with its licence: NAME=LICENCE")
