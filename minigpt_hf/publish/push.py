"""A model folder -> a repository of the Hub, in one commit.

In: a model folder and the name of a repository. Out: the addresses of what was pushed. Only files that belong to a model
folder travel, and a branch moves when all of them have arrived, or not at all. It refuses links, and folders that lack a
file. The token is a matter between huggingface_hub and the Hub (`hf auth login` or HF_TOKEN): it is never kept here.
"""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..trust import read_metadata
from .card import render_card
from .model_folder import OPTIONAL, REQUIRED, published_files

REMEDIES = {
    401: "it does not know your token: log in again with `hf auth login`, or set HF_TOKEN to one that is valid",
    403: "your token may not write there: use one with write permission, or name another repository",
    404: "there is no such repository or branch: look at its name",
    409: "another change of it is under way: try again in a moment",
    412: "somebody else has pushed to it just now: try again",
    429: "it has had too many requests from you: wait some minutes, and try again",
}


def push_folder(
    folder: Path,
    repo_id: str,
    revision: str | None = None,
    private: bool = False,
    native: bool = False,
    checked: dict[Path, tuple[int, ...]] | None = None,
) -> list[str]:
    """Publish a model folder, and with `native` its twin without code on the branch of that name.

    Args:
        repo_id: USER/NAME; made if it is not there.
        revision: The branch; made if it is not there. Default: `main`.
        private: Nobody else may see the repository.
        checked: What `state_of` returned before the folder was examined: a file that has changed since is not uploaded.

    Returns:
        An address for each branch.

    Raises:
        MiniGPTError: if the folder is not whole, or something asked for cannot be.
        OSError: if the Hub refuses, or cannot be reached: in words, with what to do.
    """
    check_whole(folder)
    if native and revision == "native":
        raise MiniGPTError(
            "--revision native: the twin without code goes there; name another branch, or leave out --native"
        )
    with tempfile.TemporaryDirectory() as scratch:
        branches = [(revision, folder)]
        if native:
            from ..export.native import export_native  # loads two models to compare them: not for those who do not ask

            branches.append(("native", export_native(folder, Path(scratch) / "native")))
        repo_id = open_repository(repo_id, private)
        card = card_for(folder, repo_id)
        if checked is not None and state_of(folder) != checked:
            raise MiniGPTError(
                f"{folder}: has changed since it was examined: wait until nothing writes there, and push again"
            )
        return [commit_folder(each, repo_id, branch, card=card) for branch, each in branches]


def open_repository(repo_id: str, private: bool = False) -> str:
    """Make a repository, if it is not there, and return its full name.

    Raises:
        MiniGPTError: if there is no token, or the repository is to be private and is public already.
        OSError: as `push_folder`.
    """
    if get_token() is None:
        raise MiniGPTError("there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
    with hub_errors(repo_id):
        repo_id = HfApi().create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not HfApi().model_info(repo_id).private:
            raise MiniGPTError(
                f"{repo_id}: is there already, and public: change that in its settings, or name another one"
            )
    return repo_id


def commit_folder(
    folder: Path, repo_id: str, revision: str | None = None, message: str = "Upload model", card: str | None = None
) -> str:
    """Make a branch hold a model folder, in one commit, and return its address.

    What belongs to another state of a model folder is deleted (old shards would be loaded in place of the new weights);
    what else is there stays.

    Args:
        card: Goes up in place of `README.md`.
    """
    api, branch = HfApi(), revision or "main"
    with hub_errors(repo_id):
        if branch == "native":  # begins with nothing of `main`: what has code there is not to be seen here
            first = api.list_repo_commits(repo_id)[-1].commit_id
            api.create_branch(repo_id, branch=branch, revision=first, exist_ok=True)
        elif branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        before = api.model_info(repo_id, revision=branch)
        content = {file.relative_to(folder).as_posix(): file for file in published_files(folder)}
        if card is not None:
            content["README.md"] = card.encode()
        stale = [
            file.rfilename for file in before.siblings if _belongs(file.rfilename) and file.rfilename not in content
        ]
        api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, file) for path, file in content.items()),
            ],
            commit_message=message,
            revision=branch,
            parent_commit=before.sha,
        )
    return f"{api.endpoint}/{repo_id}" + ("" if branch == "main" else f"/tree/{branch}")


def commit_in_background(folder: Path, repo_id: str, revision: str | None, message: str) -> Future:
    """Do the same in a thread, one commit after another, and delete the folder; what goes wrong is told in a line."""

    def commit() -> None:
        try:
            commit_folder(folder, repo_id, revision, message)
        except (OSError, ValueError) as error:
            print(
                f"not pushed: {' '.join(str(error).split())}; training goes on, the next save tries again", flush=True
            )
        finally:
            shutil.rmtree(folder)

    return HfApi().run_as_future(commit)


def check_whole(folder: Path) -> None:
    """Refuse a folder that lacks what a stranger needs, or in which a name stands for a file elsewhere."""
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise MiniGPTError(f"{folder}: this is a run; its model is in {folder / 'model'}")
    names = {file.name for file in published_files(folder)}
    if "model.safetensors.index.json" in names:
        names.add("model.safetensors")
    if missing := [name for name in REQUIRED if name not in names]:
        raise MiniGPTError(f"{folder}: no model folder, it lacks {', '.join(missing)}")
    if links := [file for file in folder.rglob("*") if file.is_symlink()]:
        raise MiniGPTError(f"{links[0]}: is a link; put the file itself there")


def state_of(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Size, modification time and inode of each file that would be uploaded."""
    states = {file: file.stat() for file in published_files(folder)}
    return {file: (state.st_size, state.st_mtime_ns, state.st_ino) for file, state in states.items()}


def card_for(folder: Path, repo_id: str) -> str:
    """The card of a folder as it goes up: with the name of the repository, unless somebody has written in it."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    about = read_metadata(folder)
    config = MiniGPTConfig.from_pretrained(folder)
    return render_card({**about, "name": repo_id}, config) if card == render_card(about, config) else card


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises within the block into an `OSError` with one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise MiniGPTError(str(error)) from error
    except (HTTPError, RuntimeError) as error:
        cause = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__  # "Error while uploading", which hides the reason
        if isinstance(cause, HfHubHTTPError):
            status, said = cause.response.status_code, cause.server_message
            remedy = REMEDIES.get(status, "try again later" if status >= 500 else "nothing has changed there")
            raise OSError(f"{repo_id}: the Hub answered {status}{f' ({said})' if said else ''}: {remedy}") from error
        raise OSError(
            f"{repo_id}: the connection to {HfApi().endpoint} broke ({cause or type(cause).__name__}): what is there is "
            "whole; the same command tries again"
        ) from error


def _belongs(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in (*REQUIRED, *OPTIONAL))
