"""What the verbs share: a parser whose errors are `MiniGPTError`s, and silence where nothing takes long."""

import argparse

from ..errors import MiniGPTError
from . import VERBS


class Parser(argparse.ArgumentParser):
    """A parser for one verb; abbreviations are not guessed, and a bad value is a `MiniGPTError`."""

    def __init__(self, verb: str, **kwargs):
        super().__init__(prog=f"minigpt {verb}", description=VERBS[verb], allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise MiniGPTError(message)


def quiet() -> None:
    """No bars for steps that take a blink; what takes long says so in lines of its own."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    huggingface_hub.utils.logging.set_verbosity_error()  # it warns of each try; what fails in the end is told in one line
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
