# /// script
# requires-python = ">=3.11"
# dependencies = ["minigpt-hf[fast]>=0.2", "trackio>=0.43"]
# ///
"""Train a model with Hugging Face Jobs and publish it: `minigpt train` with the given flags, and `--push_to_hub`.

    hf jobs uv run --flavor l4x1 --timeout 3h --secrets HF_TOKEN scripts/jobs/train.py \\
        --recipe tinystories --hub_model_id USER/NAME

uv installs the dependencies listed above. The disk of a job is deleted at its end, so `--hub_model_id` is required; each
checkpoint is uploaded as a complete model.
"""

import sys

from minigpt_cli import main

if __name__ == "__main__":
    flags = sys.argv[1:]
    if not any(flag.partition("=")[0] == "--hub_model_id" for flag in flags):
        print("train.py: give --hub_model_id USER/NAME: the disk of a job is deleted at its end", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(["train", *flags, "--push_to_hub"]))
