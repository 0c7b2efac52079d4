"""Build wheel and sdist, check them, and install each alone in a new environment of every supported Python on this machine.

    python scripts/release.py                        # every python3.11 and later on PATH, and those of pyenv
    python scripts/release.py --python python3.12    # this one

In each environment, `minigpt` trains two steps and generates text, in a folder without the sources. pip downloads the
dependencies as for a user, with the versions of constraints.txt; nothing is uploaded.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = (3, 11)


def interpreters() -> list[Path]:
    """Return an executable for each supported minor version, oldest first."""
    candidates = [Path(name) for minor in range(OLDEST[1], 20) if (name := shutil.which(f"python3.{minor}"))]
    candidates += sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python3"))
    found: dict[tuple[int, int], Path] = {}
    for path in candidates:
        # Shims of pyenv are on PATH for versions that are not selected, and fail.
        done = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
        if done.returncode == 0 and (version := tuple(map(int, done.stdout.split()))) >= OLDEST:
            found.setdefault(version, path)
    return [found[version] for version in sorted(found)]


def build(out: Path) -> list[Path]:
    """Build the sdist, and the wheel from it, and check the rendering of their description."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", out], cwd=ROOT, check=True)
    files = sorted(out.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    return files


def install_alone(python: Path, distribution: Path, folder: Path) -> None:
    """Install a distribution in a new environment, and train and generate with it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}

    def run(*argv: object) -> str:
        return subprocess.check_output(list(map(str, argv)), cwd=folder, env=environment, text=True)

    run(python, "-m", "venv", folder / "venv")
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    constraints = ROOT / "constraints.txt"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, distribution)
    (folder / "notes.txt").write_text("To be, or not to be, that is the question.\n" * 300, encoding="utf-8")
    train = ["train", "--data", "notes.txt", "--output_dir", "run", "--max_steps", 2, "--sample_tokens", 5, "--use_cpu"]
    run(programs / "minigpt", *train)
    text = run(programs / "minigpt", "generate", "run/model", "--prompt", "To", "--max_new_tokens", 5, "--seed", 0)
    assert text.startswith("To"), text
    version = run(programs / "minigpt", "--version").split()[1]
    assert re.search(rf"-{re.escape(version)}[-.]", distribution.name), (version, distribution)


def main() -> None:
    """Build, check and install."""
    parser = argparse.ArgumentParser(description="Build the distributions and install each alone.")
    parser.add_argument("--python", type=Path, action="append", help="interpreter (default: each supported one)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the distributions (default: dist)")
    args = parser.parse_args()
    files = build(args.out)
    for python in args.python or interpreters():
        for file in files:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                install_alone(python, file.resolve(), Path(folder))
            print(
                f"{python} {file.name}: installed, trained, generated in {time.perf_counter() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
