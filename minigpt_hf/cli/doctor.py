"""`minigpt doctor`: check a model folder and print the result of each check as a table or JSON."""

import json

from .parser import Parser


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser(
        "doctor", epilog="Exit code: 0 if no check failed, 1 if a check failed, 2 if there is no such folder."
    )
    parser.add_argument("folder", help="model folder: a MiniGPT, its native twin, or any causal LM")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="execute the Python code of the folder, in a separate process without this package",
    )
    return parser


def run(argv: list[str]) -> int:
    """Check the folder and print the rows. Returns 1 if a check failed, else 0."""
    args = parser().parse_args(argv)

    from dataclasses import asdict

    from ..doctor import examine, failures
    from ..errors import MiniGPTError

    try:
        rows = examine(args.folder, args.trust_remote_code)
    except ValueError as error:  # not a model folder
        raise MiniGPTError(str(error)) from error
    failed = failures(rows)
    if args.json:
        print(json.dumps({"folder": args.folder, "failed": len(failed), "rows": [asdict(row) for row in rows]}))
        return 1 if failed else 0
    for row in rows:
        print(f"{'-' if row.state == 'not applicable' else row.state:<6}{row.name:<26}{row.reason}", end="")
        print(f"; {row.remedy}" if row.remedy else "")
    not_applicable = sum(row.state == "not applicable" for row in rows)
    print(f"\n{len(rows) - len(failed) - not_applicable} pass, {len(failed)} fail, {not_applicable} not applicable (-)")
    return 1 if failed else 0
