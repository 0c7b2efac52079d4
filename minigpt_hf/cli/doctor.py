"""`minigpt doctor`: a folder -> a table of what is right and wrong with it, and an exit code."""

import json

from .parser import Parser


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser(
        "doctor", epilog="Exit code: 0 if nothing failed, 1 if something did, 2 if there is no such folder."
    )
    parser.add_argument("folder", help="a model folder: a MiniGPT, its native twin, or any causal LM")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run the folder's own code, in a process of its own, as a stranger would",
    )
    return parser


def run(argv: list[str]) -> int:
    """Examine, print, and say by the exit code whether something failed."""
    args = parser().parse_args(argv)

    from dataclasses import asdict

    from ..doctor import examine, failures
    from ..errors import MiniGPTError

    try:
        rows = examine(args.folder, args.trust_remote_code)
    except ValueError as error:  # there is no model folder to check
        raise MiniGPTError(str(error)) from error
    failed = failures(rows)
    if args.json:
        print(json.dumps({"folder": args.folder, "failed": len(failed), "rows": [asdict(row) for row in rows]}))
        return 1 if failed else 0
    for row in rows:
        print(f"{'-' if row.state == 'not applicable' else row.state:<6}{row.name:<26}{row.reason}", end="")
        print(f"; {row.remedy}" if row.remedy else "")
    idle = sum(row.state == "not applicable" for row in rows)
    print(f"\n{len(rows) - len(failed) - idle} pass, {len(failed)} fail, {idle} do not apply (-)")
    return 1 if failed else 0
