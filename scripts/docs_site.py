"""Hooks of the documentation site: pages from the root of the repository, and links to files outside of docs/.

README.md and CONTRIBUTING.md become the pages index.md and contributing.md. A file of the repository that a page links, for
example the source of the model, is copied into the site under `source/`; a link to a folder becomes its text.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\[(?P<text>(?:!\[[^]]*\]\([^)]*\)|[^]])*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def resolved(text: str, folder: str) -> tuple[str, set[str]]:
    """Return a page with the links that the site needs, and the files that it links outside of docs/.

    Args:
        folder: Folder of the page in the repository: `docs`, or an empty string.
    """
    outside = set()

    def replace(match: re.Match) -> str:
        target = match["target"]
        if "://" in target:
            return match[0]
        path = normpath(str(PurePosixPath(folder) / target))
        if path in PAGES:
            new = PAGES[path]
        elif path.startswith("docs/"):
            new = relpath(path, "docs")
        elif (ROOT / path).is_file():
            outside.add(path)
            new = f"source/{path}.txt"
        else:
            return match["text"]
        return f"[{match['text']}]({new}{match['anchor'] or ''})"

    return LINK.sub(replace, text).replace('src="docs/', 'src="'), outside


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the files that a page links."""
    linked = set()
    for name, page in PAGES.items():
        text, outside = resolved((ROOT / name).read_text(encoding="utf-8"), "")
        files.append(File.generated(config, page, content=text))
        linked |= outside
    for file in files.documentation_pages():
        if file.src_uri not in PAGES.values():
            linked |= resolved(file.content_string, "docs")[1]
    for path in sorted(linked):  # as text, which every browser displays
        content = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, f"source/{path}.txt", content=content))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Replace the links of a page in docs/."""
    return markdown if page.file.src_uri in PAGES.values() else resolved(markdown, "docs")[0]
