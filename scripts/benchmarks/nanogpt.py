"""A clone of karpathy/nanoGPT, to be run as it is.

In: a clone that the user names, and the text. Out: a copy of it in a temporary folder, with the text where nanoGPT's
`prepare.py` looks for it. The clone itself is not written to; nothing is downloaded.
"""

import shutil
from pathlib import Path

# Its README's example for a laptop without a GPU. (The README's figure is 1.88.)
CPU_EXAMPLE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
DATA = Path("data", "shakespeare_char")


def copy(clone: Path, text: Path, target: Path) -> None:
    """Copy the program and the text.

    Raises:
        SystemExit: if there is no nanoGPT there.
    """
    if not (clone / "train.py").is_file():
        raise SystemExit(f"{clone}: no train.py there; name a clone of https://github.com/karpathy/nanoGPT")
    shutil.copytree(clone, target, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "out*", "assets"))
    shutil.copy(text, target / DATA / "input.txt")
    (target / DATA / "requests.py").touch()  # prepare.py imports it for a download, which it skips if the text is there
