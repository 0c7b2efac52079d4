"""`minigpt push`: a model folder -> a repository on the Hub."""

from pathlib import Path

from ..errors import MiniGPTError
from .parser import Parser, quiet


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser(
        "push",
        epilog="The token comes from `hf auth login` or the variable HF_TOKEN. Only files that belong to a model folder are "
        "uploaded, all in one commit.",
    )
    parser.add_argument("folder", help="a model folder, as training writes it: runs/NAME/model")
    parser.add_argument("--repo-id", "--repo_id", required=True, help="USER/NAME on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a repository that nobody else sees")
    parser.add_argument("--revision", help="the branch; made if it is not there (default: main)")
    parser.add_argument("--native", action="store_true", help="also write the twin without code to the branch `native`")
    return parser


def run(argv: list[str]) -> None:
    """Look the folder over, upload it, and print where it is."""
    args = parser().parse_args(argv)

    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from ..doctor import examine, failures
    from ..publish.push import check_complete, file_states, push_folder

    quiet()
    folder = Path(args.folder)
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise MiniGPTError(str(error)) from error
    check_complete(folder)
    checked = file_states(folder)
    if found := failures(examine(folder)):
        faults = "; ".join(f"{row.name}: {row.reason}" for row in found)
        raise MiniGPTError(
            f"{folder}: is not pushed, the doctor found {faults}; `minigpt doctor {folder}` says what to do"
        )
    print(*push_folder(folder, args.repo_id, args.revision, args.private, args.native, checked), sep="\n")
