"""What `make gpu` does when something goes wrong on a machine that nobody can look at: nothing measured is lost."""

from __future__ import annotations

import json
import math
import sys
import zipfile

import gpu
import gpu_parts
import gpu_report
import head_methods
import linear_cross_entropy as head
import pytest
import torch
import training_step
from command_line import command_line

MORE = ["--device", "cpu", "--tiny"]


def python(name, code, **settings):
    return gpu.Part(name, "trl", ("-c", code), **settings)


def run(monkeypatch, out, parts, *arguments, path=("--path", "trl=")):
    """`gpu.py` with these parts; exit status and summary."""
    monkeypatch.setattr(gpu, "PARTS", parts)
    code = gpu.main([*MORE, "--out", str(out), *map(str, arguments), *path])
    return code, json.loads((out / "gpu-summary.json").read_text())


def outcomes(summary):
    return {part["name"]: part["status"] for part in summary["parts"]}


def test_what_fails_says_why_and_the_rest_runs(monkeypatch, tmp_path, capfd):
    parts = [python("broken", "raise SystemExit('the reason')"), python("next", "print('was here', flush=True)")]
    code, summary = run(monkeypatch, tmp_path, parts)
    assert code == 1
    assert outcomes(summary) == {"broken": "failed", "next": "passed"}
    assert "the reason" in summary["parts"][0]["failures"]["broken"]
    assert "was here" in capfd.readouterr().out
    assert "- broken failed: broken." in (tmp_path / "gpu-tables.md").read_text()


def test_a_second_call_goes_on_where_the_first_ended(monkeypatch, tmp_path):
    """What time cut off runs again, what is done does not; the summary is of both."""
    seen = tmp_path / "seen"
    parts = [python(name, f"open({str(seen)!r}, 'a').write('{name} ')") for name in ("one", "two")]
    code, summary = run(monkeypatch, tmp_path, parts, "--only", "one")
    assert (code, outcomes(summary), summary["left_out"]) == (0, {"one": "passed"}, ["two"])
    code, summary = run(monkeypatch, tmp_path, parts, "--resume", "--seconds", 0)
    assert (code, outcomes(summary)) == (0, {"one": "passed", "two": "skipped"})
    assert "no time left" in summary["parts"][1]["reason"]
    code, summary = run(monkeypatch, tmp_path, parts, "--resume")
    assert (code, outcomes(summary)) == (0, {"one": "passed", "two": "passed"})
    assert seen.read_text() == "one two "
    run(monkeypatch, tmp_path, parts, "--resume", "--only", "one")
    run(monkeypatch, tmp_path, parts)
    assert seen.read_text() == "one two one one two "


def test_of_another_machine_nothing_stands(monkeypatch, tmp_path):
    parts = [python("one", "")]
    run(monkeypatch, tmp_path, parts)
    summary = json.loads((tmp_path / "gpu-summary.json").read_text())
    summary["hardware"]["gpus"] = ["One GPU, driver 1"]
    (tmp_path / "gpu-summary.json").write_text(json.dumps(summary))
    assert gpu.earlier(tmp_path, {"hardware": {"gpus": ["One GPU, driver 2"]}}, None).keys() == {"one"}
    assert gpu.earlier(tmp_path, {"hardware": {"gpus": ["Another GPU, driver 1"]}}, None) == {}
    assert gpu.earlier(tmp_path, {"hardware": {}}, None) == {}


def test_tests_that_are_interrupted_report_those_that_ran(tmp_path):
    """As when their time is over. A failure is in the outcome in words."""
    (tmp_path / "test_some.py").write_text(
        "import os, signal\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'these differ'\n"
        "def test_is_cut(): os.kill(os.getpid(), signal.SIGINT)\n"
        "def test_never_runs(): pass\n"
    )
    place = gpu.Place({"trl": sys.executable}, {"trl": ""}, tmp_path, "cpu", "full")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_some.py"))
    outcome = place.run(gpu.Part("cut", "trl", arguments), math.inf)
    assert (outcome.status, outcome.counts["passed"], outcome.counts["failed"]) == ("failed", 1, 1)
    assert "these differ" in outcome.failures["test_fails"]
    assert list(tmp_path.glob("*.xml")) == []


def test_a_crash_without_a_report_keeps_its_last_words(tmp_path):
    place = gpu.Place({"trl": sys.executable}, {"trl": ""}, tmp_path, "cpu", "full")
    code = "import os, sys; print('last words', flush=True); os.abort()"
    outcome = place.run(gpu.Part("dead", "trl", ("-c", code, "pytest")), math.inf)
    assert outcome.status == "failed"
    assert "last words" in outcome.failures["dead"]


def test_a_part_that_asks_for_another_process_gets_it(tmp_path):
    place = gpu.Place({"trl": sys.executable}, {"trl": ""}, tmp_path, "cpu", "full")
    been = tmp_path / "been"
    code = f"import os, sys; sys.exit(0 if os.path.exists({str(been)!r}) else open({str(been)!r}, 'w').close() or 75)"
    assert place.run(python("head", code), math.inf).status == "passed"
    assert been.exists()


def test_what_is_stopped_runs_again(tmp_path):
    place = gpu.Place({"trl": sys.executable}, {"trl": ""}, tmp_path, "cpu", "full")
    outcome = place.run(python("slow", "import time; time.sleep(600)", limit=1), math.inf)
    assert (outcome.status, outcome.final) == ("stopped", False)


def test_one_gpu_is_seen_except_where_several_are_the_point(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    every = dict.fromkeys(gpu.FRAMEWORKS, sys.executable)
    place = gpu.Place(every, every, tmp_path, "cuda", "full")
    seen = {part.name: place.env(part)["CUDA_VISIBLE_DEVICES"] for part in gpu_parts.PARTS}
    several = {"tests-ranks", "tests-context", *(f"table-{framework}" for framework in gpu.FRAMEWORKS)}
    assert {name for name, devices in seen.items() if devices == "2,3"} == several
    assert set(seen.values()) == {"2", "2,3"}


def test_what_a_framework_needs_is_asked_before_a_model_is_built(tmp_path):
    place = gpu.Place({"trl": sys.executable}, {"trl": ""}, tmp_path, "cuda", "full")
    part = gpu.Part("step", "trl", ("-c", "raise SystemExit('was started')"), needs="no_such_framework")
    assert place.run(part, math.inf).reason == "no_such_framework is not installed in the environment of trl"


def wheel(folder, name):
    """The least that pip installs."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "here = True\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_this_python_with_wheels_and_the_path_it_has(monkeypatch, tmp_path):
    """Where a machine has torch and no index: the checkout, a folder of wheels, and the PYTHONPATH of the caller."""
    wheel(tmp_path, "carried")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    monkeypatch.setattr(gpu, "this_checkout", lambda folder: str(gpu.ROOT))
    parts = [python("imports", "import carried, own, wit_plugins; assert carried.here")]
    code, summary = run(monkeypatch, tmp_path, parts, "--wheels", tmp_path, path=())
    assert code == 0, summary


def problem():
    return head_methods.Problem.make("16x8x32", None, torch.float32, "cpu")


class Raises:
    """A method that does so a number of times."""

    def __init__(self, error, times=10**6):
        self.error, self.times = error, times

    def __call__(self, p):
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return head_methods.full(p)


class CompilationError(Exception):
    """Triton's is a class of its own, too."""


def test_methods_that_fail_are_noted_and_the_others_measured():
    methods = [
        head.Method("full", head_methods.full),
        head.Method("large", Raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB"))),
        head.Method("large beside the reference", Raises(torch.OutOfMemoryError("CUDA out of memory"), times=1)),
        head.Method("broken", Raises(CompilationError("at 1:2:\nmore"))),
        head.Method("wit", head_methods.wit("torch")),
    ]
    results = {r.method: r for r in head.measure(problem(), methods, 2, "cpu")}
    assert [len(r.times) for r in results.values()] == [2, 0, 2, 0, 2]
    assert results["large"].note == results["large"].failed == head.OUT_OF_MEMORY
    assert results["broken"].note == "CompilationError: at 1:2:"
    assert results["broken"].failed == "CompilationError"
    assert results["wit"].error < 1e-5
    assert math.isnan(results["large beside the reference"].error)
    assert not any(r.broken for r in results.values())
    assert head.Result("wit", "CompilationError: x").broken


def test_a_kernel_that_takes_the_gpu_away_is_left_out_by_the_next_process(monkeypatch, tmp_path):
    """Found by a GPU that answers no more; the shapes before it are not measured again."""
    cce = head.Method("cce", Raises(RuntimeError("an illegal memory access was encountered")))
    monkeypatch.setattr(
        head, "METHODS", [head.Method("full", head_methods.full), cce, head.Method("wit", head_methods.wit("torch"))]
    )
    arguments = ["--device", "cpu", "--rounds", "1", "--out", str(tmp_path / "head"), "--resume"]
    head.main([*arguments, "--shapes", "16x8x32", "--methods", "full,wit"])
    lost = []

    def tidy(device):
        if cce.loss.times < 10**6 and not lost:
            lost.append(device)
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(head, "tidy", tidy)
    with pytest.raises(SystemExit) as left:
        head.main([*arguments, "--shapes", "16x8x32", "24x8x32"])
    assert left.value.code == gpu_parts.AGAIN
    assert lost
    results = json.loads((tmp_path / "head.json").read_text())
    assert results["crashed"] == {"24x8x32": {"cce": "RuntimeError: an illegal memory access was encountered"}}
    assert list(results["results"]) == ["16x8x32"]
    calls = cce.loss.times
    head.main([*arguments, "--shapes", "16x8x32", "24x8x32"])
    assert cce.loss.times == calls
    rows = json.loads((tmp_path / "head.json").read_text())["results"]
    assert [len(r["times"]) for r in rows["24x8x32"]] == [1, 0, 1]
    assert [r["method"] for r in rows["16x8x32"]] == ["full", "wit"]
    assert (tmp_path / "head.png").stat().st_size > 1000


def test_this_projects_own_failure_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(head, "METHODS", [head.Method("wit", Raises(RuntimeError("wrong")))])
    with pytest.raises(SystemExit, match="wit at 16x8x32: RuntimeError: wrong"):
        head.main(["--device", "cpu", "--rounds", "1", "--out", str(tmp_path / "head"), "--shapes", "16x8x32"])
    assert (tmp_path / "head.json").is_file()


@pytest.mark.slow
def test_a_training_that_fails_is_noted_and_the_other_one_goes_on(monkeypatch, tmp_path, capfd):
    """In the real script, in an environment without the framework."""
    written = []
    seen = training_step.measure("axolotl", training_step.QUICK, 2, 1, lambda seen: written.append(json.dumps(seen)))
    assert len(written) == 2  # one turn each
    assert "No module named 'axolotl" in seen["own"]["note"]
    assert "No module named 'axolotl" in seen["wit"]["note"]
    assert "No module named 'axolotl" in training_step.table("axolotl", seen)


def test_a_step_that_does_not_fit_is_in_the_table():
    fits = {"steps": [0.5], "memory": [1.0], "collator": [0.0], "note": ""}
    large = {"steps": [], "memory": [], "collator": [], "note": "out of memory"}
    facts = {"versions": {"trl": "1.16.0"}, "command": "x", "date": "2026-01-01", "hardware": "y", "dtype": "z"}
    run = {**facts, "sizes": {"batch": 8}, "results": {"own": large, "wit": fits}}
    assert "| TRL 1.16.0 | out of memory | 500 ms | – | – | – |" in gpu_report.steps({"trl": run})
    run = {**facts, "sizes": {"batch": 8}, "results": {"own": fits, "wit": {**fits, "steps": [0.52]}}}
    table = gpu_report.steps({"trl": run})
    assert "| 500 ms | 520 ms | 1.040 | 1.040 | 1.000 |" in table
    assert "in time and in memory: TRL 1.16.0 no." in table


def test_results_from_elsewhere_become_tables(tmp_path, capsys):
    """In the folder that they are in; in the page only those that stay, whose picture it can show."""
    page = (gpu.ROOT / "docs" / "performance.md").read_bytes()
    result = {"steps": [0.5], "memory": [1.0], "collator": [0.0], "note": ""}
    facts = {"versions": {"trl": "1.16.0"}, "command": "x", "date": "2026-01-01", "hardware": "y", "dtype": "z"}
    run = {**facts, "sizes": {"batch": 8}, "results": {"own": result, "wit": result}}
    (tmp_path / "gpu-step-trl.json").write_text(json.dumps(run))
    assert gpu.main(["--report", "--out", str(tmp_path)]) == 0
    assert "| TRL 1.16.0 | 500 ms | 500 ms | 1.000 |" in (tmp_path / "gpu-tables.md").read_text()
    assert f"copy {tmp_path}/gpu-*" in capsys.readouterr().out
    assert (gpu.ROOT / "docs" / "performance.md").read_bytes() == page


def test_the_bar_is_also_asked_of_the_method_that_is_as_exact():
    rows = [{"method": name, "times": [t], "peak": 1e6} for name, t in (("wit", 1.0), ("liger mean float32", 1.1))]
    assert gpu_report.verdict({"8x8x100": rows}).startswith("Within 1.02 × Liger that sums its gradient in float32")
    rows[0]["times"] = [1.2]
    assert "at 0 of 1 shapes, not at 8x8x100 (1.091)" in gpu_report.verdict({"8x8x100": rows})


def test_the_command_of_the_results_is_not_one_machines():
    assert command_line(["a.py", "--out", "/x/y", "--resume", "--rounds", "3"]) == "python a.py --rounds 3"
