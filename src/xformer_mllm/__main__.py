"""`python -m xformer_mllm` is the command `xformer`."""

import sys

from xformer_mllm.cli import main

sys.exit(main())
