"""`python -m minigpt_hf.cli`: the commands without `minigpt_cli`, hence without its OpenMP policy."""

import sys

from . import main

sys.exit(main())
