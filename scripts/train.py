"""`minigpt train` as a script, for launchers that require a file: accelerate launch scripts/train.py --recipe …"""

import sys

from minigpt_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
