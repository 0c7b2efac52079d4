"""Upload a model folder to a repository on the Hub.

`main` is the native twin: it loads without remote code, everywhere. The model folder itself, with the readable code, is the
branch `minigpt`. A single branch could not serve both: if `config.json` refers to code, the Hub displays every example with
`trust_remote_code=True`, and transformers asks for permission where Qwen3 has no class for an entry of `auto_map`.

Only files that belong to a model folder are uploaded, in one commit per branch, so a branch is updated completely or not at
all. huggingface_hub reads the token (`hf auth login` or HF_TOKEN); this module never stores or logs it.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from yaml import YAMLError

from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.native import qwen3_settings
from ..trust import read_metadata, recipe_text
from .card import Place, base_model, card_for, hub_id, rendered_card, report_system_messages, space_in
from .model_folder import CODE, OPTIONAL, REQUIRED, published_files, report_stray_weights
from .space import PROGRAM_FILES, space_of

logger = logging.getLogger(__name__)

CODE_BRANCH = "minigpt"
UPLOAD_DEMO = "Upload demo"  # message of every commit to a Space

# Files that are not part of every model folder, and that `from_pretrained` would read if an earlier model left them.
FOREIGN = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_templates/*",
    "additional_chat_templates/*",
    "adapter_config.json",
    "custom_generate/*",  # code that `generate` runs instead of its own, if code of the repository is trusted
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)

# HTTP status -> explanation and remedy.
REMEDIES = {
    401: "the token is invalid: log in again with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "the token has no write permission for this repository: use another token or another repository",
    404: "the repository or branch does not exist: check its name",
    409: "another change of the repository is in progress: try again in a moment",
    412: "the branch has received another commit in the meantime: try again",
    429: "too many requests: wait some minutes and try again",
}


def push_folder(
    folder: Path,
    repo_id: str,
    revision: str | None = None,
    private: bool = False,
    checked: dict[Path, tuple[int, ...]] | None = None,
    space: str | None = None,
    page: str | None = None,
    collection: str | None = None,
) -> list[str]:
    """Upload a model folder: its native twin, and, next to `main`, the folder itself as branch `minigpt`.

    Repositories are created first, so that missing permissions are reported before anything is uploaded.

    Args:
        repo_id: USER/NAME; created if it does not exist.
        revision: Branch; created if it does not exist. Default: `main`.
        private: Create a private repository.
        checked: Result of `file_states` before the folder was checked; nothing is uploaded if a file has changed since.
        space: USER/NAME of a Space that demonstrates the model; created if it does not exist, private if the model is.
        page: HTML that runs the model in a browser, the content of the Space. Default: a program that loads the model.
        collection: Title of a collection of the user, created if it does not exist, or the slug of an existing one, to which
            the model and its Space are added.

    Returns:
        The URL of each updated branch, of the Space and of the collection.

    Raises:
        MiniGPTError: if the folder is incomplete or has changed, no card can be rendered from its metadata, `revision` is
            `minigpt`, or the Space demonstrates another model.
        OSError: if the Hub rejects the request or cannot be reached.
    """
    check_complete(folder)
    rendered_card(folder)  # otherwise raises before anything is created
    revision = check_revision(revision)
    repo_id = open_repository(repo_id, private)
    if space is not None or collection is not None:
        with hub_errors(repo_id):
            private = private or bool(HfApi().model_info(repo_id).private)  # a page contains the weights
    if space is not None:
        if page is None:
            report_system_messages(folder, "the program of the Space")
        content = space_of(repo_id, page, revision, recipe_text(folder, "system"))
        space = open_repository(space, private, content.sdk)
        earlier = check_space(space, repo_id)
    with hub_errors(repo_id):
        linked = space or linked_space(repo_id, revision)
    urls = commit_folder(folder, repo_id, revision, space=linked, checked=checked)
    if space is None and linked is not None:
        flag = "--space" if linked == repo_id else f"--space {linked}"
        logger.warning("the demo in the Space %s is not changed; %s updates it", linked, flag)
    if space is not None:
        with naming(urls):
            card = content.card(read_metadata(folder), repo_id, revision)
            report_edited_demo(space)
            urls += _commit({"main": {"README.md": card, **content.files}}, space, UPLOAD_DEMO, repo_type="space")
            with hub_errors(repo_id):
                is_still_linked = (
                    earlier not in (None, revision or "main") and space_in_branch(repo_id, earlier) == space
                )
        if is_still_linked:
            logger.warning(
                "the card of the branch %s still links the Space %s, which is the demo of the branch %s now: push %s again",
                *(earlier, space, revision or "main", earlier),
            )
    if collection is not None:
        with naming(urls):
            urls.append(add_to_collection(collection, repo_id, space, private))
    if private and space is not None and page is None:
        logger.warning("%s reads the private model with a token: store one as its secret HF_TOKEN", space)
    return urls


def open_repository(repo_id: str, private: bool = False, sdk: str | None = None) -> str:
    """Create a repository if it does not exist, and return its full name.

    Args:
        sdk: SDK of a Space; None for a model.

    Raises:
        MiniGPTError: if there is no token, or `private` is requested for an existing public repository.
        OSError: if the Hub rejects the request or cannot be reached.
    """
    if get_token() is None:
        raise MiniGPTError("no token for the Hub was found: log in with `hf auth login`, or set HF_TOKEN")
    with hub_errors(repo_id):
        kind = "space" if sdk else "model"
        repo_id = (
            HfApi().create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True, space_sdk=sdk).repo_id
        )
        if private and not HfApi().repo_info(repo_id, repo_type=kind).private:
            raise MiniGPTError(
                f"{repo_id}: exists and is public: change its visibility in its settings, or choose another name"
            )
    return repo_id


def commit_folder(
    folder: Path,
    repo_id: str,
    revision: str | None = None,
    message: str = "Upload model",
    space: str | None = None,
    checked: dict[Path, tuple[int, ...]] | None = None,
) -> list[str]:
    """Update a branch to the native twin of a model folder, and, after `main`, the branch `minigpt` to the folder itself.

    Card and metadata name the repository.

    Args:
        message: Commit message.
        space: Hub id of the Space that the card links. Default: see `linked_space`.
        checked: See `push_folder`.

    Returns:
        The URL of each updated branch.
    """
    checked = file_states(folder) if checked is None else checked
    metadata, revision = read_metadata(folder), check_revision(revision)
    with hub_errors(repo_id):
        space = space or linked_space(repo_id, revision)
        place = Place(native=True, absent=absent_from_hub(metadata), space=space, revision=revision)
    # Only the weights are read during the upload, before each commit.
    files: dict[str, Path | bytes] = {
        file.relative_to(folder).as_posix(): file if file.suffix == ".safetensors" else file.read_bytes()
        for file in published_files(folder)
    }
    files["README.md"] = card = card_for(folder, place, repo_id).encode()
    about = {**metadata, "name": repo_id, "hub_revision": revision}
    if not revision:
        del about["hub_revision"]
    files["minigpt.json"] = json_bytes(about)
    config = MiniGPTConfig.from_pretrained(folder)
    report_stray_weights(folder, "not uploaded")
    changed = MiniGPTError(
        f"{folder}: has changed since it was checked: wait until no process writes to it, and push again"
    )
    if file_states(folder) != checked:
        raise changed
    native = {name: file for name, file in files.items() if name not in CODE}
    native["config.json"] = json_bytes(qwen3_settings(config))
    weights = {file: state for file, state in checked.items() if file.suffix == ".safetensors"}

    def check_weights() -> None:
        if _states(weights) != weights:
            raise changed

    branches = {revision: native} if revision else {"main": native, CODE_BRANCH: files}
    for branch in branches:
        report_replaced_card(repo_id, branch, card)
    return _commit(branches, repo_id, message, check=check_weights)


def report_replaced_card(repo_id: str, branch: str, card: bytes) -> None:
    """Log that the card of a branch, which another program or a person has written, is replaced by `card`."""
    with hub_errors(repo_id):
        try:
            names = ["README.md", "minigpt.json", "config.json"]
            folder = Path(HfApi().snapshot_download(repo_id, revision=branch, allow_patterns=names))
            present = (folder / "README.md").read_bytes()
        except (RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError):
            return
    try:
        written = rendered_card(folder).encode()
    except (MiniGPTError, OSError, ValueError):  # e.g. without a model
        written = None
    if present not in (card, written):
        logger.warning(
            "%s: README.md of the branch %s has been edited on the Hub, or was not written by this version of the package, "
            "and is replaced; the earlier one is in the commit %s",
            *(repo_id, branch, folder.name),
        )


def report_edited_demo(space: str) -> None:
    """Log which files of a Space, edited since the last push, are replaced by the next one."""
    api, names = HfApi(), ["README.md", *PROGRAM_FILES]
    with hub_errors(space):
        commits = api.list_repo_commits(space, repo_type="space")
        pushed = next((commit.commit_id for commit in commits if commit.title == UPLOAD_DEMO), None)
        if pushed in (None, commits[0].commit_id):
            return
        before, present = (
            {file.path: file.blob_id for file in files if isinstance(file, RepoFile)}
            for files in (
                api.get_paths_info(space, names, revision=commit, repo_type="space")
                for commit in (pushed, commits[0].commit_id)
            )
        )
    if edited := [name for name, blob in present.items() if before.get(name) != blob]:
        logger.warning(
            "%s: %s of the Space %s been edited on the Hub, and %s replaced; the earlier one is in the commit %s",
            *(space, ", ".join(edited), *(("have", "are") if edited[1:] else ("has", "is")), commits[0].commit_id),
        )


def check_space(space: str, repo_id: str) -> str | None:
    """Check that a Space is empty or demonstrates the model, so that no other program is overwritten.

    Returns:
        The branch of the model that it demonstrates; `None` if it is empty.

    Raises:
        MiniGPTError: otherwise.
        OSError: if the Hub cannot be reached.
    """
    with hub_errors(space):
        is_empty = {*HfApi().list_repo_files(space, repo_type="space")} <= {"README.md", ".gitattributes"}
        branch = None if is_empty else demonstrated(space, repo_id)
        if not is_empty and branch is None:
            raise MiniGPTError(
                f"{space}: this Space is not a demo of {repo_id} (its README.md names other models, or none): choose another "
                "name for --space"
            )
    return branch


def linked_space(repo_id: str, revision: str | None) -> str | None:
    """Return the demo of a branch, if it is linked by its card or has the name of the model; every push links it."""
    candidates = dict.fromkeys((space_in_branch(repo_id, revision), repo_id))
    demos = [space for space in candidates if space and demonstrated(space, repo_id) == (revision or "main")]
    return demos[0] if demos else None


def space_in_branch(repo_id: str, revision: str | None) -> str | None:
    """Return the Space that the card of a branch links, or `None` if there is none."""
    try:
        card = Path(HfApi().hf_hub_download(repo_id, "README.md", revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        return None
    return hub_id(space_in(card.read_text(encoding="utf-8", errors="replace")))


def demonstrated(space: str, repo_id: str) -> str | None:
    """Return the branch of the model that a Space demonstrates according to its `README.md`, or `None` if there is none."""
    try:
        card = SpaceCard.load(space)
        if repo_id not in (card.data.get("models") or []):
            return None
        branch = re.search(rf"/{re.escape(repo_id)}/tree/([^)\s]+)", card.text)
    except (RepositoryNotFoundError, EntryNotFoundError, ValueError, TypeError, YAMLError):  # absent or malformed
        return None
    return unquote(branch[1]) if branch else "main"


def add_to_collection(collection: str, repo_id: str, space: str | None, private: bool) -> str:
    """Add a model and its Space to a collection, and return its URL. See `push_folder` for the arguments."""
    api = HfApi()
    with hub_errors(collection):
        is_slug = re.fullmatch(r"[^/\s]+/[^/\s]+-[0-9a-f]{16,24}", collection)
        slug = collection if is_slug else api.create_collection(collection, private=private, exists_ok=True).slug
        api.add_collection_item(slug, repo_id, "model", exists_ok=True)
        if space is not None:
            api.add_collection_item(slug, space, "space", exists_ok=True)
    return f"{api.endpoint}/collections/{slug}"


@contextmanager
def naming(urls: list[str]) -> Iterator[None]:
    """Append to the message of an error or an interrupt in the block the URLs that were updated before it."""
    try:
        yield
    except (OSError, MiniGPTError, KeyboardInterrupt) as error:
        kind = next(kind for kind in (MiniGPTError, OSError, KeyboardInterrupt) if isinstance(error, kind))
        before = [str(error)] if str(error) else []  # that of an interrupt is empty
        raise kind("; ".join([*before, *(f"{url} was updated before" for url in urls)])) from error


def _commit(
    branches: dict[str, dict[str, Path | bytes]],
    repo_id: str,
    message: str,
    repo_type: str = "model",
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Update branches to sets of files, in one commit each, and return their URLs.

    The parents of all commits are read before the first one, so that of two concurrent calls at least one is rejected: the
    branches cannot be left with files of different calls without an error.

    Files that transformers would read in addition are deleted, and named in the log: old shards would be loaded instead of
    the new weights, and an old `added_tokens.json` would change the tokenizer. Other files are not changed.

    Args:
        branches: Content by path, for each branch.
        check: Called after the files of a branch were read and before they are committed; raises if one has changed.
    """
    api = HfApi()
    parents: dict[str, str | None] = {}
    with hub_errors(repo_id):
        for branch in branches:
            if branch == CODE_BRANCH:  # starts at the initial commit, so that it contains no other files of `main`
                first = api.list_repo_commits(repo_id)[-1].commit_id
                api.create_branch(repo_id, branch=branch, revision=first, exist_ok=True)
            elif branch != "main":
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            parents[branch] = api.repo_info(repo_id, repo_type=repo_type, revision=branch).sha
    prefix = "spaces/" if repo_type == "space" else ""
    read = (*REQUIRED, *OPTIONAL, *FOREIGN) if repo_type == "model" else PROGRAM_FILES
    urls: list[str] = []
    for branch, content in branches.items():
        with naming(urls), hub_errors(repo_id):
            paths = api.list_repo_files(repo_id, repo_type=repo_type, revision=parents[branch])
            stale = [path for path in paths if path not in content and any(fnmatch(path, pattern) for pattern in read)]
            stale = [path for path in stale if not path.startswith("figures/")]  # only the card refers to figures
            if stale:
                logger.warning("%s: files of an earlier model are deleted: %s", repo_id, ", ".join(stale))
            additions = [CommitOperationAdd(path, file) for path, file in content.items()]
            api.preupload_lfs_files(repo_id, additions, repo_type=repo_type, revision=branch, free_memory=False)
            check()
            api.create_commit(
                repo_id,
                repo_type=repo_type,
                operations=[*(CommitOperationDelete(path) for path in stale), *additions],
                commit_message=message,
                revision=branch,
                parent_commit=parents[branch],
            )
        urls.append(
            f"{api.endpoint}/{prefix}{repo_id}" + ("" if branch == "main" else f"/tree/{quote(branch, safe='')}")
        )
    return urls


def commit_in_background(folder: Path, repo_id: str, revision: str | None, message: str) -> Future:
    """Run `commit_folder` in a background thread, in the order of the calls, and delete the folder afterwards.

    A failure is logged and does not affect training.
    """

    def commit() -> None:
        try:
            commit_folder(folder, repo_id, revision, message)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            logger.warning("not pushed: %s; training continues, and the next checkpoint will be pushed", reason)
        finally:
            shutil.rmtree(folder)

    return HfApi().run_as_future(commit)


def check_complete(folder: Path) -> None:
    """Check that a model folder has every required file and no links.

    Raises:
        MiniGPTError: otherwise.
    """
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise MiniGPTError(f"{folder}: this is a run folder; its model folder is {folder / 'model'}")
    names = {file.name for file in published_files(folder)}
    if "model.safetensors.index.json" in names:
        names.add("model.safetensors")
    if missing := [name for name in REQUIRED if name not in names]:
        is_twin = {*missing} <= {*CODE}
        remedy = f"; of a downloaded model, give the branch {CODE_BRANCH}, which contains them" if is_twin else ""
        raise MiniGPTError(f"{folder}: not a model folder: {', '.join(missing)} missing{remedy}")
    if links := [file for file in folder.rglob("*") if file.is_symlink()]:
        raise MiniGPTError(f"{links[0]}: is a link; replace it by the file")


def check_revision(revision: str | None) -> str | None:
    """Check that a branch has the name of a branch and is not the one that holds the code; return it, or `None` for `main`.

    Raises:
        MiniGPTError: otherwise.
    """
    if revision is not None and (not re.fullmatch(r"[\w.][\w./-]*", revision) or revision.startswith("refs/")):
        raise MiniGPTError(f"{revision!r} is not the name of a branch: use letters, digits, `.`, `_`, `-` and `/`")
    if revision == CODE_BRANCH:
        raise MiniGPTError(
            f"the branch {CODE_BRANCH} holds the code and is updated with main: choose another branch, or omit it"
        )
    return None if revision == "main" else revision


def file_states(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Return size, modification time in nanoseconds and inode of each file that would be uploaded."""
    return _states(published_files(folder))


def _states(files: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    states = {file: file.stat() for file in files if file.is_file()}
    return {file: (state.st_size, state.st_mtime_ns, state.st_ino) for file, state in states.items()}


def absent_from_hub(metadata: dict[str, Any]) -> frozenset[str]:
    """Return the datasets and the base model in `minigpt.json` that do not exist on the Hub, or only for others."""
    linked = {(name, "dataset") for name in metadata["data"]["datasets"]}
    if base := base_model(metadata):
        linked.add((base, "model"))
    return frozenset(name for name, kind in linked if not HfApi().repo_exists(name, repo_type=kind))


def json_bytes(content: dict[str, Any]) -> bytes:
    """Format a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Convert the exceptions of huggingface_hub in the block to an `OSError` or `MiniGPTError` with a remedy."""
    try:
        yield
    except HFValidationError as error:
        raise MiniGPTError(str(error)) from error
    except (HTTPError, RuntimeError) as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__  # huggingface_hub wraps upload errors in a `RuntimeError` without the reason
        if isinstance(cause, HfHubHTTPError):
            status, message = cause.response.status_code, cause.server_message
            remedy = REMEDIES.get(status, "try again later" if status >= 500 else "this request changed nothing")
            detail = f" ({message})" if message else ""
            raise OSError(f"{repo_id}: the Hub answered {status}{detail}: {remedy}") from error
        raise OSError(
            f"{repo_id}: the connection to {HfApi().endpoint} was lost ({cause or type(cause).__name__}): the repository is "
            "consistent; run the same command again"
        ) from error
