"""`minigpt launch`: list the files for launchers and clusters, or print one.

The command is defined in `minigpt_cli`, because it needs no import that takes seconds.
"""

from minigpt_cli import launch as run
from minigpt_cli import launch_parser as parser

__all__ = ["parser", "run"]
