"""`python -m minigpt_hf.cli`: the same as `minigpt`, but torch is imported before the OpenMP policy is set."""

import sys

from minigpt_cli import main

sys.exit(main())
