"""`benchmarks/gpu.py` where there is no GPU: every part imports, builds its cases and says why it does not run."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import gpu
import gpu_report
import pytest
from support import subprocess_env

ROOT = gpu.ROOT
ALL = {part.name for part in gpu.PARTS}


def run(*arguments, **env):
    """The command, with whatever environment the tests have; its result and its summary."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    path = subprocess_env()["PYTHONPATH"]
    command += ["--path", *(f"{framework}={path}" for framework in gpu.FRAMEWORKS)]
    return subprocess.run(command, env={**subprocess_env(), **env}, capture_output=True, text=True)


def summary(out):
    return {part["name"]: part for part in json.loads((out / "gpu-summary.json").read_text())["parts"]}


def test_every_part_is_there():
    """Every file of tests/gpu is run, in the environment of its framework, and every script exists."""
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    named = [argument for part in gpu.PARTS for argument in part.arguments if argument.startswith("tests/gpu/")]
    assert sorted(named) == sorted(f"tests/gpu/{name}" for name in files)
    scripts = {part.arguments[0] for part in gpu.PARTS if not part.is_test}
    assert all((ROOT / script).is_file() for script in scripts)
    assert {part.framework for part in gpu.PARTS} == set(gpu.FRAMEWORKS)
    assert len(ALL) == len(gpu.PARTS)
    listed = run("--list", "--quick")
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[0] for line in listed.stdout.splitlines()} == ALL


@pytest.mark.slow
def test_without_a_gpu_every_part_is_skipped_with_its_reason(tmp_path):
    page = (ROOT / "docs" / "performance.md").read_bytes()
    done = run("--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = summary(tmp_path)
    assert parts.keys() == ALL
    for name, part in parts.items():
        assert part["status"] == "skipped", part
        assert part["reason"], part
        if name.startswith("tests-") and name not in ("tests-axolotl", "tests-llamafactory"):
            assert "needs an NVIDIA GPU" in part["reason"]
            assert part["counts"]["skipped"] > 2
            assert part["counts"]["failed"] == 0
    assert "torch sees no GPU" in parts["head"]["reason"]
    assert json.loads((tmp_path / "gpu-summary.json").read_text())["command"].endswith(f"--out {tmp_path}")
    assert "Axolotl is not installed" in parts["tests-axolotl"]["reason"]
    assert all(name in done.stdout for name in ALL)
    assert (ROOT / "docs" / "performance.md").read_bytes() == page


@pytest.mark.slow
def test_the_benchmarks_at_a_tiny_size(tmp_path):
    """Every script that runs on a GPU runs here, end to end, and its numbers become tables."""
    done = run("--device", "cpu", "--tiny", "--only", "head", "head_gradient", "step-trl", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["status"] for part in summary(tmp_path).values()} == {"passed"}
    tables = (tmp_path / "gpu-tables.md").read_text()
    for row in ("| wit | ", "| liger mean | needs a GPU |", "| float32 | ", "| TRL 1."):
        assert row in tables, tables
    assert (tmp_path / "gpu-head.png").stat().st_size > 1000
    assert (tmp_path / "gpu-tables.md").read_text() in done.stdout


def test_what_fails_fails(tmp_path):
    """A part that exits with an error, and one that takes too long, are said to, and counted."""
    place = gpu.Place({"trl": sys.executable}, {"trl": ""}, tmp_path, "cpu", "full")
    broken = gpu.Part("broken", "trl", ("-c", "raise SystemExit(3)"))
    slow = gpu.Part("slow", "trl", ("-c", "import time; time.sleep(600)"), limit=1)
    assert place.run(broken, math.inf).status == "failed"
    assert place.run(slow, math.inf).status == "stopped"
    assert "no time left" in place.run(slow, 5).reason
    assert "no environment for axolotl" in place.run(gpu.Part("other", "axolotl", ("-c", "")), math.inf).reason


def head_results(**seconds):
    return [
        {"method": name.replace("_", " "), "times": [time], "peak": 1e6, "error": 1e-3, "note": ""}
        for name, time in seconds.items()
    ]


def test_the_bar():
    near, far = head_results(wit=1.01, liger_mean=1.0), head_results(wit=1.03, liger_mean=1.0)
    assert "in time at 1 of 1 shapes;" in gpu_report.verdict({"8x8x100": near})
    assert "at 1 of 2 shapes, not at 8x8x101 (1.030)" in gpu_report.verdict({"8x8x100": near, "8x8x101": far})
    far[0]["peak"] = 2e6
    assert "in memory (inputs and gradients included) at 0 of 1, not at" in gpu_report.verdict({"8x8x101": far})
    assert "did not run" in gpu_report.verdict({"8x8x100": head_results(wit=1.0)})


def test_the_tables_go_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    for _ in range(2):
        gpu_report.write(page, "new")
    assert page.read_text() == f"before\n{gpu_report.BEGIN}\n\nnew\n\n{gpu_report.END}\nafter\n"
    gpu_report.write(page, (ROOT / "docs" / "performance.md").read_text().split(gpu_report.BEGIN)[1][:10])
    page.write_text("nothing")
    with pytest.raises(ValueError, match="the tables go between them"):
        gpu_report.write(page, "new")
