"""Makes links out of `docs/` work on the website: pictures come along, all else leads to the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_PICTURES = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the benchmarks' pictures to the site."""
    for picture in sorted((ROOT / _PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{_PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that lead out of the folder of the documentation."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        if target.startswith("docs/") and not target.startswith("docs/examples"):
            return match[0]
        if target.startswith(f"{_PICTURES}/") and target.endswith(".png"):
            return f"]({posixpath.relpath(target, folder or '.')}{match[2] or ''})"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target}{match[2] or ''})"

    # GitHub needs a backslash before a bar within code in a table, the site shows it.
    markdown = re.sub(
        r"^\|.*$",
        lambda row: re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0]),
        markdown,
        flags=re.MULTILINE,
    )
    return re.sub(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", rewritten, markdown)
