"""What the packages import is declared: by pyproject.toml, and in the README's line."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").is_file())
# Names that are imported, where the distribution has another.
DISTRIBUTIONS = {"yaml": "pyyaml", "swift": "ms-swift"}
# Imported where they are found and not needed anywhere: kernels, and what a trainer that uses it brings.
OPTIONAL = {
    "wit_plugins/linear_cross_entropy": {"triton", "liger-kernel"},
    "wit_plugins/verify": {"peft"},
    "wit_plugins": {"deepspeed"},
}
# What of the packages may use what an extra brings.
EXTRAS = {
    "wit_plugins/cli": {"cli"},
    "adapters/wit_trl": {"trl"},
    "adapters/wit_axolotl": {"axolotl"},
    "adapters/wit_llamafactory": {"llamafactory"},
    "adapters/wit_swift": {"swift"},
}
FILES = sorted(path.relative_to(ROOT) for top in ("wit_plugins", "adapters") for path in (ROOT / top).rglob("*.py"))


def declared(extra=None):
    """Names of distributions that are required, by everybody or for an extra."""
    requirements = map(Requirement, importlib.metadata.requires("wit-plugins"))
    if extra is None:
        return {each.name for each in requirements if each.marker is None}
    return {each.name for each in requirements if each.marker is not None and each.marker.evaluate({"extra": extra})}


def imported(path):
    """Names of distributions that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    tops = {name.split(".")[0] for name in names}
    own = {"wit_plugins", "wit_trl", "wit_axolotl", "wit_llamafactory", "wit_swift"}
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in tops - own - sys.stdlib_module_names}


def test_everything_imported_is_declared():
    undeclared = []
    for path in FILES:
        allowed = declared()
        for folder in map(str, path.parents):
            allowed |= OPTIONAL.get(folder, set())
            allowed |= {name for extra in EXTRAS.get(folder, ()) for name in declared(extra)}
        undeclared += [f"{path}: {name}" for name in sorted(imported(path) - allowed)]
    assert not undeclared


@pytest.mark.parametrize("extra", [None, "cli", "trl", "axolotl", "llamafactory", "swift"])
def test_everything_declared_is_imported(extra):
    assert declared(extra) <= {name for path in FILES for name in imported(path)}


def test_every_package_is_installed():
    """A folder that pyproject.toml does not list is in the checkout, and missing wherever the package is installed."""
    installed = {path.parent for path in importlib.metadata.files("wit-plugins") if path.name == "__init__.py"}
    here = {path.parent.relative_to("adapters") if path.parts[0] == "adapters" else path.parent for path in FILES}
    assert {str(path) for path in here} == {str(path) for path in installed}


def test_the_readme_names_what_is_installed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"pip install \. +# brings ([^;]+); no framework", readme)
    assert set(line.split(", ")) == declared()


def test_tests_share_by_the_kits_alone():
    """No test imports another, and the path is made in one place: pytest's setting, `support.subprocess_env`."""
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) test_", text, flags=re.MULTILINE), path
        assert not re.search(r"sys\.path(\.insert|\.append|\.extend|\[:0\] =| \+=)", text), path
