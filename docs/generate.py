"""Writes the pages that are made from the code and from records: settings, the reference, what ran where, a token.

`python docs/generate.py` writes them, `--check` only says whether they are up to date (exit code 1 if not).
`docs/check.py` looks whether what pages mention exists.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

import compatibility
from one_token import table
from pydantic_core import PydanticUndefined

import wit_plugins
from wit_plugins import WITConfig
from wit_plugins.contract.plugins import strategy_names

DOCS = Path(__file__).parent

# The public interface: everything else may change without notice.
PUBLIC = {
    "wit_plugins": [
        *["attach", "attached", "detach", "WeightedLoop", "register", "per_token", "entropy_of_top"],
        *["share_kept", "reference_in", "snapshot_every", "anchor_model_in", "WITConfig"],
        *["WITError", "WITConfigError", "WeightsNotAppliedError"],
    ],
    "wit_plugins.linear_cross_entropy": ["weighted_linear_cross_entropy"],
    "wit_plugins.testing": ["weigh", "assert_weights", "registered", "WeighedToken", "WeighedTokens"],
    "wit_plugins.loss.reference": ["reference_loss"],
    "wit_plugins.training.adapter": ["TrainerAdapter"],
    "wit_plugins.cli.driver": ["FrameworkDriver"],
}
# What their `__all__` lists is public, and read from the source: no environment has all three frameworks.
ADAPTERS = ["wit_trl", "wit_axolotl", "wit_llamafactory", "wit_swift"]
_REFERENCE = """# Reference

<!-- Written by docs/generate.py from the docstrings; edit them there. -->

What is on this page is public: it can be imported from where it stands here, and changes are announced in the
changelog. Everything else is private to the project, wherever it lives. `wit_plugins.PROMPT`, `RESPONSE` and `NEITHER`
are the roles 1, 2 and 0; `wit_plugins.hookimpl` marks an implementation of a hook. Settings are in
[configuration.md](../configuration.md), hooks in [strategies.md](strategies.md) and [adapters.md](adapters.md).
"""
_HEAD = """# Configuration reference

<!-- Written by docs/generate.py from wit_plugins.WITConfig; edit the descriptions there. -->

The same settings everywhere: keys of the `wit:` block (Axolotl, LLaMA-Factory), arguments of `WITCallback` and of
`WITConfig`, arguments of `python -m wit_trl sft`.
Unknown keys, wrong types and values out of range are errors that name the key, the value and the way out.

| key | type | default | |
| --- | --- | --- | --- |
"""

_TAIL = """
## Built-in strategies

[spans.md](spans.md) and [methods.md](methods.md) say what they do; [authors/strategies.md](authors/strategies.md) shows
how to register another.

"""


def _type(annotation: Any) -> str:
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join(f"`{choice}`" for choice in choices)
    named = {float: "number", list[str]: "list of names", str | None: "name, or `null`"}
    return named.get(annotation, "names, or name → options")


def page() -> str:
    """The page's text."""
    rows = []
    for name, info in WITConfig.model_fields.items():
        default = "required" if info.is_required() else ""
        if info.default is not PydanticUndefined:
            default = f"`{info.default}`"
        elif info.default_factory is not None:
            default = "none"
        rows.append(f"| `{name}` | {_type(info.annotation)} | {default} | {info.description} |")
    names = ", ".join(f"`{name}`" for name in strategy_names() if name != "wit")
    return _HEAD + "\n".join(rows) + "\n" + _TAIL + f"{names}, and always `wit`.\n"


def reference() -> str:
    """The reference page's text."""
    parts = [_REFERENCE]
    for module_name, names in PUBLIC.items():
        parts.append(f"\n## `{module_name}`\n")
        for name in names:
            value = getattr(importlib.import_module(module_name), name)
            parts.append(f"\n### `{name}{_signature(value)}`\n\n{_markdown(inspect.getdoc(value) or '')}\n")
            if inspect.isclass(value) and name in ("TrainerAdapter", "FrameworkDriver"):
                parts += [_method(method, member) for method, member in vars(value).items() if callable(member)]
    for adapter in ADAPTERS:
        parts.append(f"\n## `{adapter}`\n")
        parts += [f"\n### `{heading}`\n\n{_markdown(doc)}\n" for heading, doc in _written(adapter)]
    return "".join(parts)


def _written(adapter: str) -> list[tuple[str, str]]:
    """Signature and docstring of everything that an adapter makes public, as they are written."""
    folder = DOCS.parent / "adapters"
    imports = [node for node in ast.walk(_parsed(folder / adapter)) if isinstance(node, ast.ImportFrom)]
    made = []
    for node in imports:
        if node.module is None or not node.module.startswith(f"{adapter}."):
            continue
        for alias in node.names:
            tree = _parsed(folder / node.module.replace(".", "/"))
            kinds = (ast.ClassDef, ast.FunctionDef)
            (found,) = [item for item in tree.body if isinstance(item, kinds) and item.name == alias.name]
            entry = (f"{alias.name}{_arguments(found)}", ast.get_docstring(found) or "")
            if entry not in made:  # some are imported for type checkers, and again when they are asked for
                made.append(entry)
    return made


def _parsed(module: Path) -> ast.Module:
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _arguments(definition: ast.ClassDef | ast.FunctionDef) -> str:
    """The arguments of a function, or of a class's constructor, without types."""
    if isinstance(definition, ast.ClassDef):
        constructors = [item for item in definition.body if isinstance(item, ast.FunctionDef)]
        definition = next(item for item in constructors if item.name == "__init__")
    arguments = definition.args
    arguments.args = [argument for argument in arguments.args if argument.arg != "self"]
    for argument in [*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def unlisted() -> list[str]:
    """Names that a package makes public and the reference does not list."""
    text = reference()
    return [name for name in wit_plugins.__all__ if not re.search(rf"`(?:wit_plugins\.)?{name}\b", text)]


def _method(name: str, member: Any) -> str:
    if name.startswith("_"):
        return ""
    return f"\n#### `{name}{_signature(member)}`\n\n{_markdown(inspect.getdoc(member) or '')}\n"


def _signature(value: Any) -> str:
    if (inspect.isclass(value) and issubclass(value, (WITConfig, Exception, list))) or not callable(value):
        return ""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name != "self"]
    return re.sub(r"<.*?>", "…", str(signature.replace(parameters=plain, return_annotation=signature.empty)))


def _markdown(doc: str) -> str:
    """A docstring with its sections as lists."""
    doc = re.sub(r"\[`([\w.]+)`\]", r"`\1`", doc)
    out: list[str] = []
    section = False
    for line in doc.split("\n"):
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Example):", line):
            section = line != "Example:"
            out += [f"**{line[:-1]}**", ""]
        elif section and re.match(r"    \S", line):
            returns = out[-2] == "**Returns**"
            out.append((line if returns else re.sub(r"^    ([\w, ]+(?: \([^)]*\))?): ", r"- **\1**: ", line)).strip())
        elif section and line.startswith("        "):
            out.append("  " + line.strip())
        else:
            out.append(line if line.startswith("        ") or not section else line.strip())
    return "\n".join(line.rstrip() for line in out).strip()


def architecture() -> str:
    """The page as it stands, with the token's table written anew."""
    text = (DOCS / "dev" / "architecture.md").read_text(encoding="utf-8")
    marks = re.escape("<!-- one token: written by docs/generate.py -->"), re.escape("<!-- end of the token -->")
    return re.sub(
        f"({marks[0]}\n).*?({marks[1]})", lambda m: f"{m[1]}\n{table()}\n{m[2]}", text, count=1, flags=re.DOTALL
    )


def readme() -> str:
    """The README as it stands, with the versions that the records of test runs have."""
    return compatibility.readme((DOCS.parent / "README.md").read_text(encoding="utf-8"))


PAGES = {
    "configuration.md": page,
    "authors/reference.md": reference,
    "dev/architecture.md": architecture,
    "compatibility.md": compatibility.page,
    "../README.md": readme,
}

if __name__ == "__main__":
    wrong = [f"docs/authors/reference.md does not list wit_plugins.{name}" for name in unlisted()]
    for file_name, make in PAGES.items():
        path, text = DOCS / file_name, make()
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(f"docs/{file_name} is out of date; run `make docs`")
    if wrong:
        sys.exit("\n".join(wrong))
