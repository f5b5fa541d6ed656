"""Checks that whatever the documentation mentions exists: links, anchors, paths, tests, sessions, commands and names.

`python docs/check.py` prints what is wrong and exits with 1 if anything is. It reads text and imports nothing of this
project, so that it takes a second and runs without torch.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What was measured or decided on a day may name what has gone since.
HISTORY = {"CHANGELOG.md", "docs/dev/decisions.md", "docs/dev/decisions-head.md"}
PACKAGES = {
    "wit_plugins": "",
    "wit_trl": "adapters",
    "wit_axolotl": "adapters",
    "wit_llamafactory": "adapters",
    "wit_swift": "adapters",
}
_FOLDERS = "wit_plugins|adapters|docs|tests|benchmarks|configs"
_FENCE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]*)\)")


def pages(root: Path) -> list[Path]:
    """All pages: of the documentation, at the top of the repository, and beside tests."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("tests/**/*.md")])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        while anchor in found:
            anchor += "-1"
        found.add(anchor)
    return found


def links(page: Path) -> Iterator[str]:
    """Links, and pictures, that lead nowhere."""
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            yield f"link to {target}: there is no such file"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"link to {target}: there is no such heading"


def mentions(page: Path, root: Path) -> Iterator[str]:
    """Paths, tests, sessions, targets of make and names of this project that do not exist."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w/.-])((?:{_FOLDERS})/[\w./-]*[\w/])(?![\w./-]*\*)", text)
    paths += re.findall(r"<!-- tested: (\S+) -->", text)
    for path in sorted(set(paths)):
        if not (root / path).exists() and not (root / f"{path}.py").exists():
            yield f"{path}: there is no such file"
    for name in sorted(set(re.findall(r"\b(test_\w+)\.py\b", text))):
        if name not in _tests(root):
            yield f"{name}.py: there is no such test file"
    tests = re.findall(r"`(test_\w+)`", text) if page.parent.name == "dev" else []  # elsewhere it may be a key
    for name in sorted(set(tests)):
        if not any(f"def {name}(" in source for source in _tests(root).values()):
            yield f"{name}: there is no such test"
    sessions = set(re.findall(r"^def (\w+)\(session", (root / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in sorted(set(re.findall(r"\bnox -s ((?:\w+ ?)+)", text))):
        for session in name.split():
            if session.isidentifier() and session not in sessions and session not in _PROSE:
                yield f"nox -s {session}: there is no such session"
    for target in sorted(set(re.findall(r"(?:`|^    )(?:\w+=\S+ )*make (\w+)", text, flags=re.MULTILINE))):
        if target not in targets:
            yield f"make {target}: there is no such target"
    for name in sorted(set(re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", text))):
        if not _exists(name, root):
            yield f"{name}: there is no such name"


_PROSE = {"and", "or", "the", "with", "to", "runs", "has", "is"}


def strings_in_code(root: Path) -> Iterator[tuple[Path, str]]:
    """Pages that code, configurations and tests name (in messages, too) and that do not exist."""
    files = [root / "noxfile.py", root / "pyproject.toml"]
    for folder in _FOLDERS.split("|"):
        files += [path for kind in ("py", "yaml", "json") for path in (root / folder).rglob(f"*.{kind}")]
    for file in sorted(files):
        if not file.is_file() or file.name == "test_docs_check.py":
            continue
        for path in set(re.findall(r"\bdocs/[\w./-]+\.(?:md|py|png|ipynb)\b", file.read_text(encoding="utf-8"))):
            if not (root / path).exists():
                yield file, f"{path}: there is no such file"


@functools.cache
def _tests(root: Path) -> dict[str, str]:
    files = [*(root / "tests").rglob("*.py"), *(root / "docs").rglob("test_*.py")]
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def _exists(name: str, root: Path) -> bool:
    """Whether a dotted name is a module, or something at the top of one (an attribute of a class included)."""
    first, *rest = name.split(".")
    place = root / PACKAGES[first] / first
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place /= rest.pop(0)
    module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not rest:
        return True
    return module.is_file() and rest[0] in _top_level(module)


@functools.cache
def _top_level(module: Path) -> set[str]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)  # `__all__`, and names that are looked up when they are first used
    return names


def problems(root: Path = ROOT) -> list[str]:
    """All that is wrong, a line each."""
    wrong = []
    for page in pages(root):
        name = page.relative_to(root).as_posix()
        wrong += [f"{name}: {problem}" for problem in links(page)]
        if name not in HISTORY:
            wrong += [f"{name}: {problem}" for problem in mentions(page, root)]
    wrong += [f"{file.relative_to(root).as_posix()}: {problem}" for file, problem in strings_in_code(root)]
    return wrong


if __name__ == "__main__":
    if found := problems():
        sys.exit("\n".join(found))
