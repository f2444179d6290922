"""Serve an X-Former with `transformers serve`, which knows only transformers' own classes: register, then start it.

    python examples/transformers_serve.py FOLDER --port 8000

FOLDER is a stage-2 model or the folder of its run's `model/`; the options are those of `transformers serve`, which needs
`pip install 'transformers[serving]'`. Tried with transformers 5.23.0.
"""

import sys

import transformers
from transformers.cli.transformers import main
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from xformer_mllm import XFormerConfig, XFormerForConditionalGeneration

# The class is looked up by name in transformers' own module, and its name in the list of models that read images.
transformers.XFormerForConditionalGeneration = XFormerForConditionalGeneration
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[XFormerConfig.model_type] = XFormerForConditionalGeneration.__name__

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    main()
