"""`python -m minigpt_hf.cli`: the same as `minigpt`."""

import sys

from . import main

sys.exit(main())
