"""Descriptions of Debian packages: translations of their synopses, and summaries.

A package has a synopsis of one line and a long description, in the files `Translation-LANGUAGE` of a Debian mirror. The
volunteers of the Debian Description Translation Project have translated tens of thousands into Italian, Danish, French,
German and other languages. apt-get downloads the files into a temporary folder, because the lists of the system may lack
translations (container images disable them) and are not to be changed.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MiniGPTError
from .task import Task, row, split_by_group

LICENSE = "that of each package's description, see https://www.debian.org/legal/licenses/"
SPLIT = "by source package, without its version: the packages built from one source are in one split"
MAX_CHARACTERS = 600  # length of a shortened description: complete paragraphs, or the first one cut at a sentence
# The defaults of the system, except for the folders and the languages. Hooks after an update would change the system.
CONFIGURATION = """\
#clear Acquire::Languages;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages {{ {languages} }};
Acquire::GzipIndexes "false";
Dir::State "{folder}/state";
Dir::Cache "{folder}/cache";
"""

Key = tuple[str, str]  # name of a package, MD5 of its English description


def translation(source: Path | None, seed: int, language: str) -> Task:
    """English synopses and their translations.

    Args:
        source: Folder with files Packages, Translation-en and Translation-`language`. Default: downloaded by apt-get.

    Raises:
        MiniGPTError: if they are missing.
    """
    if not re.fullmatch(r"[a-z]{2,3}(_[A-Z]{2})?", language) or language == "en":
        raise MiniGPTError(
            f"--language {language}: give the code of another language than English, e.g. it, da, fr, de"
        )
    with _indexes(source, "en", language) as folder:
        groups = _groups(folder)
        english, translated = (_descriptions(folder, each) for each in ("en", language))
    rows = (
        (groups[key[0]], row(english[key][0], translated[key][0]))
        for key in sorted(english.keys() & translated.keys())
        if key[0] in groups and english[key][0] != translated[key][0]
    )
    return Task(
        name="translation",
        description=f"Synopses of Debian packages in English, and their translations into the language `{language}`.",
        source=f"Translation-en and Translation-{language} of {_origin(source)}",
        license=LICENSE,
        split=SPLIT,
        rows=split_by_group(rows, seed),
        seed=seed,
        metric="chrf",
    )


def synopsis(source: Path | None, seed: int) -> Task:
    """Long descriptions and their synopses.

    Raises:
        MiniGPTError: if the files are missing.
    """
    with _indexes(source, "en") as folder:
        groups, descriptions = _groups(folder), _descriptions(folder, "en")
    rows = (
        (groups[key[0]], row(_shortened(text), short))
        for key, (short, text) in sorted(descriptions.items())
        if key[0] in groups and text
    )
    return Task(
        name="synopsis",
        description="Long descriptions of Debian packages, and their synopses of one line.",
        source=f"Translation-en of {_origin(source)}",
        license=LICENSE,
        split=SPLIT,
        rows=split_by_group(rows, seed),
        seed=seed,
        metric="rouge",
    )


@contextmanager
def _indexes(source: Path | None, *languages: str) -> Iterator[Path]:
    """Provide a folder with the files of the source."""
    if source is not None:
        yield source
        return
    if shutil.which("apt-get") is None:
        raise MiniGPTError(
            "the descriptions of Debian packages are read by apt-get, which this system lacks: run the command on Debian, or "
            "give a folder with the files Packages and Translation-* of a Debian mirror with --source"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt-get downloads as another user
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        named = " ".join(f'"{each}";' for each in languages)
        (folder / "apt.conf").write_text(CONFIGURATION.format(languages=named, folder=folder), encoding="utf-8")
        done = subprocess.run(
            ["apt-get", "--config-file", str(folder / "apt.conf"), "--quiet=2", "update"],
            capture_output=True,
            text=True,
            check=False,
        )
        lists = folder / "state" / "lists"
        if done.returncode or not any(lists.glob("*Translation-en")):
            reason = (done.stderr.strip() or "the sources of this system have no descriptions").splitlines()[-1]
            raise MiniGPTError(
                f"apt-get update has not downloaded the descriptions of packages: {reason}; check the sources of apt and the "
                "network, or give a folder with the files Packages and Translation-* of a Debian mirror with --source"
            )
        yield lists


def _origin(source: Path | None) -> str:
    return "the package archives that apt reads on this system" if source is None else str(source)


def _files(folder: Path, name: str) -> list[Path]:
    files = sorted(file for file in folder.glob(f"*{name}") if file.is_file()) if folder.is_dir() else []
    if not files:
        raise MiniGPTError(
            f"{folder}: there is no uncompressed file {name}: give a language that Debian has translations for, or a folder "
            "with this file of a Debian mirror"
        )
    return files


def _groups(folder: Path) -> dict[str, str]:
    """Return {package: its source package without version}: gcc-12 and gcc-13 have nearly the same descriptions."""
    result = {}
    for fields in _stanzas(_files(folder, "Packages"), "Package", "Source"):
        source = fields.get("Source", fields["Package"]).split(" ")[0]
        result[fields["Package"]] = re.sub(r"[-.]?\d[\d.]*", "", source)
    return result


def _descriptions(folder: Path, language: str) -> dict[Key, tuple[str, str]]:
    """Return {key: (synopsis, long description)} in a language."""
    field = f"Description-{language}"
    result = {}
    for fields in _stanzas(_files(folder, f"Translation-{language}"), "Package", "Description-md5", field):
        short, _, text = fields[field].partition("\n")
        if short.strip():
            result[fields["Package"], fields["Description-md5"]] = (short.strip(), text)
    return result


def _stanzas(files: Iterable[Path], *names: str) -> Iterator[dict[str, str]]:
    """Yield the named fields of each stanza; lines of one field are separated by line feeds."""
    for file in files:
        fields: dict[str, str] = {}
        name = ""
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line == "\n":
                    if names[0] in fields:
                        yield fields
                    fields = {}
                elif line[0] == " ":
                    if name in fields:
                        fields[name] += "\n" + line.strip()
                else:
                    name, _, value = line.partition(":")
                    if name in names:
                        fields[name] = value.strip()
        if names[0] in fields:
            yield fields


def _shortened(text: str) -> str:
    """Return the first paragraphs of a long description, at most `MAX_CHARACTERS`."""
    result = ""
    for paragraph in re.split(r"\n\.\n", text):
        joined = f"{result}\n{' '.join(paragraph.split())}".strip()
        if len(joined) > MAX_CHARACTERS:
            break
        result = joined
    if not result:
        result = " ".join(text.split())[:MAX_CHARACTERS]
        result = result[: result.rfind(". ") + 1] or result
    return result
