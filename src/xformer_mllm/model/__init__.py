"""The paper's figure: configuration, processor, encoders, Q-Former masks, fusion, reconstruction, losses, models."""

import transformers  # noqa: F401  # first: it registers X-Former, which imports the modules of this package
