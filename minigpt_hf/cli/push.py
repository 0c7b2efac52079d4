"""`minigpt push`: check a model folder and upload it to the Hub."""

from pathlib import Path

from ..errors import MiniGPTError
from .parser import Parser, quiet


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser(
        "push",
        epilog="Uses the token of `hf auth login` or of the environment variable HF_TOKEN. `main` becomes the native "
        "twin, which loads without remote code, and the branch `minigpt` the folder with its code. Only files of a model "
        "folder are uploaded, in one commit per branch.",
    )
    parser.add_argument("folder", help="model folder written by training, e.g. runs/NAME/model")
    parser.add_argument(
        "--repo-id", "--repo_id", required=True, help="USER/NAME on the Hub; created if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--revision", help="branch; created if it does not exist (default: main, with the code in the branch minigpt)"
    )
    parser.add_argument(
        "--space",
        nargs="?",
        const="",
        metavar="USER/NAME",
        help="also create a Space with a demo: a page that runs the model in the browser, or a program if the model does "
        "not fit into a page (default: with the name of the model)",
    )
    parser.add_argument(
        "--collection", help="also add the model to this collection: its slug, or a title; created if it does not exist"
    )
    return parser


def run(argv: list[str]) -> None:
    """Check the folder, upload it and print the addresses."""
    args = parser().parse_args(argv)

    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from ..doctor import examine, failures
    from ..export.html import demo_page
    from ..publish.push import check_complete, check_revision, file_states, push_folder

    quiet()
    folder = Path(args.folder)
    space = args.repo_id if args.space == "" else args.space
    try:
        for repo_id in (args.repo_id, space):
            if repo_id is not None:
                validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MiniGPTError(str(error)) from error
    if args.collection is not None and not args.collection.strip():
        raise MiniGPTError("--collection is empty: give a title or a slug")
    check_complete(folder)
    check_revision(args.revision)
    checked = file_states(folder)
    if found := failures(examine(folder)):
        faults = "; ".join(f"{row.name}: {row.reason}" for row in found)
        raise MiniGPTError(
            f"{folder}: not uploaded, checks failed: {faults}; `minigpt doctor {folder}` prints the remedies"
        )
    page = None if space is None else demo_page(folder, args.repo_id)
    urls = push_folder(folder, args.repo_id, args.revision, args.private, checked, space, page, args.collection)
    print(*urls, sep="\n")
