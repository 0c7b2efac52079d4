"""What the commands share: a parser that raises `MiniGPTError`, and settings of library output."""

import argparse

from minigpt_cli import COMMANDS

from ..errors import MiniGPTError


class Parser(argparse.ArgumentParser):
    """The parser of one command. It accepts no abbreviations and raises `MiniGPTError` for invalid arguments."""

    def __init__(self, command: str, **kwargs):
        super().__init__(prog=f"minigpt {command}", description=COMMANDS[command], allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise MiniGPTError(message)


def quiet() -> None:
    """Disable the progress bars of datasets and transformers, and the retry warnings of huggingface_hub."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    huggingface_hub.utils.logging.set_verbosity_error()  # a final failure is raised as an error
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
