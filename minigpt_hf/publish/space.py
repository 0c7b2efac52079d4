"""The files of a Space that demonstrates a model: its configuration (`README.md`), and a page or a program."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import transformers
from huggingface_hub import SpaceCardData

APP = Path(__file__).with_name("space_app.py")
# Lines of `APP` that are replaced.
MODEL, REVISION, SYSTEM = 'MODEL = "USER/NAME"', 'REVISION = "main"', 'SYSTEM = ""'
GRADIO = "6.31.0"
# Files of Spaces of any SDK; those of another SDK are deleted.
PROGRAM_FILES = ("app.py", "requirements.txt", "index.html")


@dataclass(frozen=True)
class Space:
    """The content of a Space.

    Args:
        sdk: `gradio` or `static`.
        files: Content by path, without `README.md`.
        settings: Settings that depend on the SDK.
    """

    sdk: str
    files: dict[str, bytes]
    settings: dict[str, Any]

    def card(self, metadata: dict[str, Any], repo_id: str, revision: str | None = None) -> bytes:
        """Return the content of `README.md`.

        Args:
            metadata: Content of `minigpt.json`.
            repo_id: Hub id of the model.
            revision: Branch of the model; None: `main`.
        """
        data = SpaceCardData(
            title=repo_id.partition("/")[2],
            emoji="\N{MEMO}",
            colorFrom="gray",
            colorTo="indigo",
            sdk=self.sdk,
            **self.settings,
            pinned=False,
            license=metadata["license"],
            models=[repo_id],
            short_description="A small GPT trained with minigpt-hf",
        )
        link = f"https://huggingface.co/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")
        return f"---\n{data.to_yaml()}\n---\n\nDemo of [{repo_id}]({link}).\n".encode()


def space_of(repo_id: str, page: str | None = None, revision: str | None = None, system: str = "") -> Space:
    """Return the Space of a model: its page, or else a program that loads the model from the Hub.

    Args:
        repo_id: Hub id of the model.
        page: HTML that runs the model in a browser.
        revision: Branch that the program loads; None: `main`.
        system: System message with which the program starts each conversation, as in training; '' for none.
    """
    if page is not None:
        return Space("static", {"index.html": page.encode()}, {"app_file": "index.html"})
    app = APP.read_text(encoding="utf-8")
    for line, value in ((MODEL, repo_id), (REVISION, revision or "main"), (SYSTEM, system)):
        assert app.count(f"{line}\n") == 1
        app = app.replace(line, f"{line.partition(' ')[0]} = {json.dumps(value, ensure_ascii=False)}")
    versions = f"torch=={torch.__version__.partition('+')[0]}\ntransformers=={transformers.__version__}\n"
    files = {"app.py": app.encode(), "requirements.txt": versions.encode()}
    return Space("gradio", files, {"sdk_version": GRADIO, "app_file": "app.py"})
