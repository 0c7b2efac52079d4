"""Mutation testing of data preparation, training and evaluation.

    python scripts/mutants.py --sample 100 --seed 0

1. Copy the working tree, run the tests once, and record the lines that each test executes (coverage.py), including those
   executed in subprocesses and fixtures.
2. Generate all mutants with the operators below, and draw a random sample.
3. For each mutant, run the tests that execute the changed lines in the copy, up to the first failure.

A mutant is killed if a test fails or exceeds its time limit. Otherwise it survives: either a behavior is not tested, or the
mutant is equivalent to the original. The exit code is 1 if more than 10 % of the sample survive.

Expressions are mutated by the operators of mutmut. They are applied to the source text, one mutant at a time, because
mutmut itself omits decorated functions and module-level code. Not mutated, because no test should depend on them: strings
(messages, docstrings, help), annotations, reporting code, large numbers, the lines in `EQUIVALENT` and the changes in
`EQUIVALENT_CHANGES`. Mutmut's operator that replaces a value by None is omitted as well: it nearly always raises an
exception, which would lower the surviving share.
"""

import argparse
import contextlib
import difflib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from coverage import CoverageData
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators

ROOT = Path(__file__).parents[1]
SOURCES = ("minigpt_hf/data/*.py", "minigpt_hf/training/*.py", "minigpt_hf/inference/evaluation.py")
TESTS = (
    "tests/data",
    "tests/training",
    "tests/publish/test_push.py",
    "tests/test_api.py",
    "tests/test_bad_input.py",
    "tests/test_cli.py",
    "tests/test_docs.py",
    "tests/inference/test_evaluation.py",
)
THRESHOLD = 0.1  # share of mutants that may survive

# Patterns of lines whose mutants no test should detect, with the reason.
EQUIVALENT = {
    r"\btqdm\b|\bbar\b|self\.bar|with_bar": "progress bars",
    r"perf_counter|_per_second|busy\b|seconds_per_step|measure_step|duration\(|min\(seconds\)|round\(\S*seconds": (
        "times, which differ between runs"
    ),
    r"flush=True|\bindent=|ensure_ascii|\bverbose=": "format of output",
    r"\"cuda\"|!= \"cpu\"|is_torch_bf16_gpu_available|pin_memory|cuda\.": "needs an accelerator",
    r"\broom\b|PART_CHARACTERS|PIECE_CHARACTERS|chunksize": "sizes of chunks",
    r"os\.name == \"nt\"|msvcrt\.|WINDOWS_OFFSET|os\.lseek\(descriptor": "needs Windows",
    r"wait_for_everyone\(\)": "the order of operations of several processes, which matters only in a race",
    r"__all__|^[A-Z]\w+ = tuple\[": "no behavior",
    r"^ *assert ": "assertions about the code itself",
    r"^(FINE_)?WIDTHS = ": "candidates of a search",
    r"trainer\.train_dataset\[0, i\]": "the data of a step that is only timed",
}
# Patterns of "line before -> line after" whose change no test can detect, with the reason; other mutants of these lines are
# tested.
EQUIVALENT_CHANGES = {
    r"1 << (16|20)\b.* -> .*(2 << \1|1 << (17|21))\b": "sizes of chunks",
    r"<= CHUNK_CHARACTERS: -> .*< CHUNK_CHARACTERS:": "a boundary is searched for, and none is found",
    r"> LONG_WORD and .* -> .*>= LONG_WORD and": "encoding in windows gives the same tokens",
    r"kind=\"stable\"": "the order of copies of a document",
    r"loss > EXPLOSION \* .* -> .*loss >= EXPLOSION": "no float32 equals a multiple of the logarithm of an integer",
    r"> 1e-9.* -> .*>= 1e-9": "a tolerance of rounding errors",
    r"use_cache=True": "speed of generation",
    r"characters \+= len\(text or \"\"\)": "sizes of chunks",
    r"self\.received = -1\.0 ": "any time before the first signal",
    r"deep=False.* -> .*deep=True": "when the YAML constructor fills nested values",
}
# Including `strict` of `zip`, which asserts lengths that are equal by construction.
ARGUMENTS_WITHOUT_EFFECT = {"metadata", "desc", "unit", "encoding", "num_proc", "progress", "device", "strict"}
REPORTING_CALLS = {"print", "debug", "info", "warning", "error", "update", "set_postfix_str", "close", "compile"}
REPORTING_FUNCTIONS = {
    *("plan_table", "device_name", "trainable_share", "describe_changes", "assumed_power", "_suggestion")
}


# -- mutants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A single change of a file.

    Args:
        file: Path relative to the root.
        line: Line of the change.
        lines: Lines of the changed statement; empty if it is executed on import.
        source: Original content of the file.
        mutated: Content with the change.
    """

    file: str
    line: int
    lines: range
    source: str
    mutated: str

    @property
    def diff(self) -> str:
        before, after = self.source.splitlines(keepends=True), self.mutated.splitlines(keepends=True)
        return "".join(difflib.unified_diff(before, after, self.file, self.file, n=1))


def drop_arguments(node: cst.Call) -> Iterator[cst.Call]:
    """f(a, b) -> f(a), f(b): mutmut's operator without the replacement of arguments by None."""
    for mutant in mutators.operator_arg_removal(node):
        if len(mutant.args) < len(node.args):
            (dropped,) = [arg for arg in node.args if all(arg is not other for other in mutant.args)]
            if not is_without_effect(dropped):
                yield mutant


def is_without_effect(node: cst.Arg) -> bool:
    """Whether an argument only affects the output format or the speed."""
    name = node.keyword or node.value
    return isinstance(name, cst.Name) and name.value in ARGUMENTS_WITHOUT_EFFECT


def increase_number(node: cst.Integer | cst.Float) -> Iterator[cst.BaseNumber]:
    """1 -> 2, but not 100000 -> 100001: tests should not depend on the exact value of a size limit."""
    if node.evaluated_value < 1000:
        yield from mutators.operator_number(node)


def force_condition(node: cst.If) -> Iterator[cst.If]:
    """Make the condition of `if` always false or always true, as mutmut does for conditional expressions."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    for operator, value in ((cst.And(), "False"), (cst.Or(), "True")):
        yield node.with_changes(test=cst.BooleanOperation(test, operator, cst.Name(value)))


def drop_statement(node: cst.SimpleStatementLine) -> Iterator[cst.SimpleStatementLine]:
    """Remove a call whose value is unused, or a `raise`. Calls with only string arguments are messages and are retained."""
    (statement, *more) = node.body
    if isinstance(statement, cst.Expr) and isinstance(statement.value, cst.Call):
        arguments = statement.value.args
        is_dropped = not arguments or not all(isinstance(each.value, cst.BaseString) for each in arguments)
    else:
        is_dropped = isinstance(statement, cst.Raise) or m.matches(statement, m.Expr(m.Yield()))
    if is_dropped and not more:
        yield node.with_changes(body=[cst.Pass()])


LEFT_OUT = {
    mutators.operator_number,
    mutators.operator_string,
    mutators.operator_assignment,
    mutators.operator_lambda,
    mutators.operator_arg_removal,
}
OPERATORS = [(kind, operator) for kind, operator in mutators.mutation_operators if operator not in LEFT_OUT]
OPERATORS += [
    (cst.Integer, increase_number),
    (cst.Float, increase_number),
    (cst.Call, drop_arguments),
    (cst.If, force_condition),
    (cst.SimpleStatementLine, drop_statement),
]


class MutationCollector(cst.CSTVisitor):
    """Collects the nodes that may be mutated, each with its replacement and the lines of its statement."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, source: str):
        self.source_lines = source.splitlines()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, int, range]] = []
        self.statements: list[range] = []
        self.function_bodies: list[cst.BaseSuite] = []
        self.depth = 0  # nesting depth of function bodies

    def on_visit(self, node: cst.CSTNode) -> bool:
        if self._is_left_out(node):
            return False
        if isinstance(node, cst.FunctionDef):
            self.function_bodies.append(node.body)
        self.depth += any(node is body for body in self.function_bodies)
        position = self.get_metadata(PositionProvider, node, None)
        if isinstance(node, cst.SimpleStatementLine):
            self.statements.append(range(position.start.line, position.end.line + 1))
        elif isinstance(node, cst.BaseCompoundStatement):  # its header; the body consists of further statements
            body = self.get_metadata(PositionProvider, node.body).start.line
            self.statements.append(range(position.start.line, max(body, position.start.line + 1)))
        if position and self.statements and not self._is_equivalent(position.start.line):
            for kind, operator in OPERATORS:
                if isinstance(node, kind):
                    for mutated in operator(node):
                        lines = self.statements[-1] if self.depth else range(0)
                        self.found.append((node, mutated, position.start.line, lines))
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        self.depth -= any(node is body for body in self.function_bodies)
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement) and not self._is_left_out(node):
            self.statements.pop()

    def _is_equivalent(self, line: int) -> bool:
        return any(re.search(pattern, self.source_lines[line - 1]) for pattern in EQUIVALENT)

    def _is_left_out(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleStatementLine):
            (statement, *more) = node.body
            if isinstance(statement, cst.Import | cst.ImportFrom):
                return True
            return not more and isinstance(statement, cst.Expr) and self._is_left_out(statement.value)
        if isinstance(node, cst.Call):
            name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
            return isinstance(name, cst.Name) and name.value in REPORTING_CALLS
        if isinstance(node, cst.FunctionDef):
            return node.name.value in REPORTING_FUNCTIONS
        if isinstance(node, cst.Raise):  # its message; the complete statement may be dropped
            return True
        if isinstance(node, cst.Arg):
            return is_without_effect(node)
        return isinstance(node, cst.BaseString | cst.Annotation | cst.Decorator)


def is_equivalent_change(source: str, mutated: str) -> bool:
    """Whether the lines that differ match one of `EQUIVALENT_CHANGES`."""
    diff = [*difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0)][2:]
    before, after = (" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")
    return any(re.search(pattern, f"{before} -> {after}") for pattern in EQUIVALENT_CHANGES)


def sample_mutants(files: list[Path], root: Path, count: int, seed: int) -> tuple[list[Mutant], int]:
    """Return a random sample of `count` mutants that are valid Python (0: all), and the number of candidates."""
    candidates = []
    for file in files:
        source = file.read_text(encoding="utf-8")
        wrapper = MetadataWrapper(cst.parse_module(source))
        collector = MutationCollector(source)
        wrapper.visit(collector)
        candidates += [(file, source, wrapper.module, *found) for found in collector.found]
    mutants: dict[str, Mutant] = {}
    for file, source, module, node, mutated, line, lines in random.Random(seed).sample(candidates, len(candidates)):
        code = module.deep_replace(node, mutated).code
        try:
            compile(code, str(file), "exec")
        except SyntaxError:
            continue
        if code != source and not is_equivalent_change(source, code):
            mutants[code] = Mutant(str(file.relative_to(root)), line, lines, source, code)
        if count and len(mutants) == count:
            break
    return [*mutants.values()], len(candidates)


# -- tests ------------------------------------------------------------------------------------------------------------


class Tests:
    """The lines that each test executes and its duration, recorded by running all tests once."""

    def __init__(self, folder: Path, recorded: list[dict], slowest: float):
        self.seconds = {
            test["id"]: test["seconds"] for test in recorded if test["passed"] and test["seconds"] <= slowest
        }
        self.left_out = [test["id"] for test in recorded if test["passed"] and test["seconds"] > slowest]
        self.failed = [test["id"] for test in recorded if not test["passed"]]
        setup: dict[str, float] = {}
        for test in recorded:
            setup |= test["setup"]
        # Time limit of a test: 30 s plus ten times its recorded duration, including that of its shared fixtures.
        self.limits = {
            test["id"]: 30 + 10 * (test["seconds"] + sum(setup.get(name, 0) for name in test["fixtures"]))
            for test in recorded
        }
        by_fixture: dict[str, set[str]] = defaultdict(set)
        for test in recorded:
            for name in test["fixtures"]:
                by_fixture[f"fixture {name}"].add(test["id"])
        self.by_line: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for data_file in folder.glob("coverage.*"):
            data = CoverageData(data_file)
            data.read()
            for file in data.measured_files():
                name = file[file.rindex("minigpt_hf/") :]
                for line, contexts in data.contexts_by_lineno(file).items():
                    for context in contexts:
                        test = re.sub(r"^\|| \((setup|call|teardown)\).*$", "", context)
                        self.by_line[name][line] |= by_fixture.get(test, {test}) & self.seconds.keys()
        self.of_sources = set().union(*(tests for by_line in self.by_line.values() for tests in by_line.values()))

    def of(self, mutant: Mutant, budget: float) -> list[str]:
        """Tests that execute a mutant and fit into `budget` seconds: first those named after its file, then the fastest.

        Code executed on import, such as a constant, is executed by all tests; those that execute its file come first.
        """
        by_line, name = self.by_line[mutant.file], f"test_{Path(mutant.file).stem}"
        of_file = set().union(*by_line.values())
        found = set().union(*(by_line[line] for line in mutant.lines)) if mutant.lines else self.of_sources
        chosen, total = [], 0.0
        for test in sorted(found, key=lambda test: (name not in test, test not in of_file, self.seconds[test], test)):
            total += self.seconds[test]
            if total > budget and chosen:
                break
            chosen.append(test)
        return chosen


def copy_tree(target: Path) -> Path:
    """Copy the files of the working tree that git does not ignore."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def pytest(tree: Path, *flags: str, **environment: str) -> int:
    """Run pytest on a copy, which its subprocesses import as well. Returns the exit code."""
    path = os.pathsep.join([*filter(None, [environment.pop("FIRST", "")]), str(tree), str(tree / "scripts")])
    settings = {
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "mutants_pytest", *flags]
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary, (tree.parent / "output.txt").open("w") as output:
        settings |= {"TMPDIR": temporary}
        process = subprocess.Popen(
            argv,
            cwd=tree,
            env={**inherited, **settings, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.add(process)
        try:
            return process.wait()
        finally:
            running.discard(process)
            kill(process)


running: set[subprocess.Popen] = set()


def kill(process: subprocess.Popen) -> None:
    """Kill pytest and all processes of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def record(tree: Path, folder: Path, jobs: int, tests: list[str], slowest: float) -> Tests:
    """Run all tests once with coverage."""
    folder.mkdir()
    (folder / "coveragerc").write_text(
        f"[run]\nparallel = true\npatch = _exit\ncontext = ${{PYTEST_CURRENT_TEST-}}\ndata_file = {folder}/coverage\n"
        f"include =\n" + "".join(f"    {tree}/{pattern}\n" for pattern in SOURCES)
    )
    (folder / "sitecustomize.py").write_text("import coverage\n\ncoverage.process_startup()\n")
    flags = ["-n", str(jobs)] if jobs > 1 else []
    environment = {
        "FIRST": str(folder),
        "COVERAGE_PROCESS_START": str(folder / "coveragerc"),
        "MUTANTS_RECORD": str(folder / "tests.json"),
    }
    pytest(tree, *flags, *tests, **environment)
    if not (folder / "tests.json").is_file():
        sys.exit(f"running the tests failed:\n{(tree.parent / 'output.txt').read_text()[-3000:]}")
    return Tests(folder, json.loads((folder / "tests.json").read_text()), slowest)


def outcome(mutant: Mutant, tests: list[str], tree: Path, limits: Path) -> str:
    """Test a mutant: "killed" if a test fails, "timeout" if a test exceeds its limit, otherwise "SURVIVED"."""
    file = tree / mutant.file
    file.write_text(mutant.mutated, encoding="utf-8")
    try:
        code = pytest(tree, "-x", *tests, MUTANTS_LIMITS=str(limits)) if tests else 0
    finally:
        file.write_text(mutant.source, encoding="utf-8")
    return {0: "SURVIVED", -signal.SIGALRM: "timeout"}.get(code, "killed")


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=100, help="number of mutants; 0: all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested in parallel (default: %(default)s)")
    parser.add_argument("--files", default="", help="mutate only files whose path contains this text")
    parser.add_argument("--tests", nargs="+", default=[*TESTS], help="arguments of pytest (default: %(default)s)")
    parser.add_argument(
        "--slowest", type=float, default=15, help="omit tests that take more seconds (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=150, help="seconds of tests per mutant (default: %(default)s)")
    parser.add_argument(
        "--recorded", type=Path, help="folder for the recorded coverage; reused if it exists (for unchanged code only)"
    )
    parser.add_argument("--report", type=Path, help="JSON Lines file for the outcome of every mutant, appended to")
    arguments = parser.parse_args(argv)

    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        return run(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(arguments: argparse.Namespace, folder: Path) -> int:
    trees = [copy_tree(folder / str(number) / "tree") for number in range(arguments.jobs)]
    files = sorted({file for pattern in SOURCES for file in trees[0].glob(pattern)})
    files = [file for file in files if arguments.files in str(file.relative_to(trees[0]))]
    sample, possible = sample_mutants(files, trees[0], arguments.sample, arguments.seed)
    count = len(sample)
    print(f"{count} of {possible:,} mutants, seed {arguments.seed}; recording one run of the tests", flush=True)

    began = time.monotonic()
    recorded = arguments.recorded or folder / "recorded"
    if (recorded / "tests.json").is_file():
        tests = Tests(recorded, json.loads((recorded / "tests.json").read_text()), arguments.slowest)
    else:
        tests = record(trees[0], recorded, arguments.jobs, arguments.tests, arguments.slowest)
    for what, names in (("failed without a mutant and", tests.failed), ("took too long and", tests.left_out)):
        print(*(f"{what} is left out: {name}" for name in names), sep="\n", end="\n" if names else "", flush=True)
    print(f"{len(tests.seconds)} tests, recorded in {time.monotonic() - began:.0f} s", flush=True)

    began, lock, free, outcomes = time.monotonic(), threading.Lock(), [*trees], {}
    limits = folder / "limits.json"
    limits.write_text(json.dumps(tests.limits))

    def examine(mutant: Mutant) -> None:
        with lock:
            tree = free.pop()
        chosen, start = tests.of(mutant, arguments.budget), time.monotonic()
        what = outcome(mutant, chosen, tree, limits)
        with lock:
            free.append(tree)
            outcomes[mutant] = what
            left = (time.monotonic() - began) / len(outcomes) * (count - len(outcomes))
            print(
                f"{len(outcomes):>{len(str(count))}}/{count}  {what:8}  "
                f"{mutant.file}:{mutant.line}  ({len(chosen)} tests, {time.monotonic() - start:.0f} s; about "
                f"{left / 60:.0f} min left)",
                flush=True,
            )
            if arguments.report:
                row = {"outcome": what, "file": mutant.file, "line": mutant.line, "diff": mutant.diff}
                with arguments.report.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            list(pool.map(examine, sample))
        except BaseException:  # interrupted
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                kill(process)
            raise

    survivors = sorted(
        (mutant for mutant, what in outcomes.items() if what == "SURVIVED"),
        key=lambda mutant: (mutant.file, mutant.line),
    )
    print(*("\n" + mutant.diff for mutant in survivors), sep="")
    share = len(survivors) / count if count else 0.0
    print(f"{len(survivors)} of {count} mutants survived ({share:.1%}; at most {THRESHOLD:.0%}); seed {arguments.seed}")
    return int(share > THRESHOLD)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
