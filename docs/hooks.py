"""A hook of mkdocs: links that leave docs/ work in the site as they do on GitHub.

`[text](../recipes/digits.py)` in a page becomes a link to the repository; `![](../assets/x.png)` shows the picture,
which is copied into the site. A link to a file that does not exist is left alone: mkdocs warns of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<=\]\()(?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of assets/ to the site, as pictures/NAME."""
    for picture in sorted((ROOT / "assets").iterdir()):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Point links to files of the repository outside docs/ to where the site has them."""
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def rewritten(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists() or target.is_relative_to(config.docs_dir):
            return link[0]
        if target.parent == ROOT / "assets":
            return os.path.relpath(Path(config.docs_dir, "pictures", target.name), folder)
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(ROOT).as_posix()
        return f"{config.repo_url}/{kind}/main/{path}{link['anchor'] or ''}"

    return _LINK.sub(rewritten, markdown)
