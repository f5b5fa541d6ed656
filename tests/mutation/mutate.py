"""Changes the code on which a weight depends, one thing at a time, and sees whether a test notices.

    python tests/mutation/mutate.py core [--files roles.py codes.py] [--minutes 20] [--seed 0]

A mutant is one changed comparison, arithmetic, condition or number. Tests of the mutant's file run against it, in a
process that is forked after torch and transformers are imported: so a mutant costs what its tests cost, and not their
imports. A mutant that no test notices has survived. It is printed, and needs a test or a reason in `survivors.json`.

This is a script and no library because the known ones start a process, and import torch, for each mutant.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REASONS = Path(__file__).parent / "survivors.json"
SECONDS = 60  # of a mutant's tests; one that takes longer has changed something
# Of each environment, what is changed and which tests are about it.
TARGETS: dict[str, dict[str, list[str]]] = {
    "core": {
        "wit_plugins/tokens/roles.py": [
            *["tests/core/tokens/test_roles.py", "tests/core/tokens/test_transport.py"],
        ],
        "wit_plugins/tokens/codes.py": [
            *["tests/core/tokens/test_transport.py", "tests/core/tokens/test_documents.py"],
            "tests/core/tokens/test_data_weights.py",
        ],
        "wit_plugins/loss/normalization.py": ["tests/core/loss/test_normalization.py"],
        "wit_plugins/loss/micro_batch.py": [
            *["tests/core/loss/test_patch.py", "tests/core/training/test_evaluation.py"],
            *["tests/core/training/test_groups_of_samples.py", "tests/core/loss/test_normalization.py"],
        ],
        "wit_plugins/data_weights/message_tokens.py": [
            *["tests/core/tokens/test_messages.py", "tests/core/tokens/test_data_weights.py"],
        ],
        "wit_plugins/data_weights/reader.py": [
            *["tests/core/tokens/test_data_weights.py", "tests/core/tokens/test_messages.py"],
        ],
        "wit_plugins/strategies/spans.py": [
            *["tests/core/strategies/test_verify_spans.py", "tests/core/strategies/test_spans.py"],
        ],
    },
    "trl": {"adapters/wit_trl/label_weights.py": ["tests/trl/test_trl_data_weights.py"]},
    "axolotl": {"adapters/wit_axolotl/label_weights.py": ["tests/axolotl/test_axolotl_data_weights.py"]},
    "llamafactory": {"adapters/wit_llamafactory/label_weights.py": ["tests/llamafactory/test_lf_data_weights.py"]},
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


class _Sites(ast.NodeVisitor):
    """Where something can be changed, and how: a function of the node that is there in a copy of the tree."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str, Callable[[Any], None]]] = []

    def _add(self, node: ast.AST, what: str, change: Callable[[Any], None]) -> None:
        self.found.append((node, what, change))

    def visit_Raise(self, node: ast.Raise) -> None:
        """What an error says is no result."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Annotations and defaults of a signature are left alone."""
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A text."""

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING" and not all(isinstance(s, ast.Raise) for s in node.body):
            for value in (True, False):
                self._add(node, f"if → {value}", lambda n, v=value: setattr(n, "test", ast.Constant(v)))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, operator in enumerate(node.ops):
            other = _COMPARISONS[type(operator)]

            def change(n: Any, i: int = index, o: Any = other) -> None:
                n.ops[i] = o()

            self._add(node, f"{type(operator).__name__} → {other.__name__}", change)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = _OPERATORS.get(type(node.op))
        if other is not None and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            change = lambda n, o=other: setattr(n, "op", o())  # noqa: E731
            self._add(node, f"{type(node.op).__name__} → {other.__name__}", change)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        other = _OPERATORS.get(type(node.op))
        if other is not None:
            change = lambda n, o=other: setattr(n, "op", o())  # noqa: E731
            self._add(node, f"{type(node.op).__name__}= → {other.__name__}=", change)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        self._add(node, f"{type(node.op).__name__} → {other.__name__}", lambda n: setattr(n, "op", other()))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.Invert)):
            self._add(node, f"without {type(node.op).__name__}", lambda n: setattr(n, "op", ast.UAdd()))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node, f"{node.value} → {not node.value}", lambda n: setattr(n, "value", not n.value))
        elif isinstance(node.value, (int, float)):
            self._add(node, f"{node.value} → {node.value + 1}", lambda n: setattr(n, "value", n.value + 1))


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Each mutant's name, which stays when lines move, and its source.

    `not x` loses its `not` by becoming `+x`, which for a bool is 0 or 1.
    """
    tree = ast.parse(source)
    owners = _owners(tree)
    sites = _Sites()
    sites.visit(tree)
    index_of = {id(node): index for index, node in enumerate(ast.walk(tree))}
    seen: dict[str, int] = {}
    for node, what, change in sites.found:
        mutated = copy.deepcopy(tree)
        change(next(n for index, n in enumerate(ast.walk(mutated)) if index == index_of[id(node)]))
        shown = ast.unparse(node.test if isinstance(node, ast.If) else node).replace("\n", " ")[:70]
        name = f"{owners.get(id(node), '')}: {shown}: {what}"
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", ast.unparse(ast.fix_missing_locations(mutated))


def _owners(tree: ast.AST, name: str = "") -> dict[int, str]:
    """The function that each node stands in."""
    found: dict[int, str] = {}
    for child in ast.iter_child_nodes(tree):
        inner = name
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{name}.{child.name}".lstrip(".")
        found[id(child)] = inner
        found.update(_owners(child, inner))
    return found


class _Exchanged(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def survives(path: str, source: str, tests: list[str]) -> bool:
    """Whether all tests pass with another source of a file."""
    pid = os.fork()
    if not pid:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        name = path.removeprefix("adapters/").removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, _Exchanged(name, ROOT / path, source))
        import pytest

        code = 1
        try:
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not ranks", *tests]))
        finally:
            os._exit(code)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> int:
    """Print what survived; 1 if anything did that has no reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", choices=TARGETS)
    parser.add_argument("--files", nargs="*", help="ends of paths, such as roles.py (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="a random sample of each file, in its share of these"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    import numpy  # noqa: F401 (imported before the processes are forked)
    import pytest  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    reasons: dict[str, dict[str, str]] = json.loads(REASONS.read_text(encoding="utf-8"))
    targets = {
        path: tests
        for path, tests in TARGETS[options.environment].items()
        if not options.files or path.endswith(tuple(options.files))
    }
    unexplained = 0
    for path, tests in targets.items():
        source, begun = (ROOT / path).read_text(encoding="utf-8"), time.monotonic()
        if not survives(path, ast.unparse(ast.parse(source)), tests):
            print(f"{path}: its tests fail as it is, or take more than {SECONDS} s")
            return 1
        every = list(mutants(source))
        random.Random(options.seed).shuffle(every)
        tried, killed, explained = 0, 0, 0
        for name, mutated in every:
            if time.monotonic() - begun > 60 * options.minutes / len(targets):
                break
            tried += 1
            if not survives(path, mutated, tests):
                killed += 1
            elif name in reasons.get(path, {}):
                explained += 1
            else:
                unexplained += 1
                print(f"  survived: {name}", flush=True)
        rest = tried - killed - explained
        seconds = time.monotonic() - begun
        print(
            f"{path}: {tried} of {len(every)} mutants in {seconds:.0f} s: {killed} killed, {explained} survive with a "
            f"reason, {rest} without",
            flush=True,
        )
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
