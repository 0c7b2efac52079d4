"""Copy a clone of karpathy/nanoGPT, together with the text, into a temporary folder, to run it unmodified.

The clone itself is not modified and nothing is downloaded.
"""

import shutil
from pathlib import Path

# The example of nanoGPT's README for a laptop without a GPU, where it reports a validation loss of 1.88.
CPU_EXAMPLE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
DATA = Path("data", "shakespeare_char")


def copy(clone: Path, text: Path, target: Path) -> None:
    """Copy nanoGPT without its outputs, and the text to where `prepare.py` reads it.

    Raises:
        SystemExit: if `clone` is not a clone of nanoGPT.
    """
    if not (clone / "train.py").is_file():
        raise SystemExit(f"{clone} has no train.py: give a clone of https://github.com/karpathy/nanoGPT")
    shutil.copytree(clone, target, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "out*", "assets"))
    shutil.copy(text, target / DATA / "input.txt")
    (target / DATA / "requests.py").touch()  # imported by prepare.py for a download that it skips if input.txt exists
