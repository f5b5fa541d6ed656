"""`wit sweep` and `wit report`: real runs of TRL, one of them killed; and runs that do what is hard to bring about."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from fractions import Fraction
from pathlib import Path

import pytest
from clikit import processes_of, read_json, run, start, wit, workplace
from support import subprocess_env

from wit_plugins import WITConfigError
from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.command import sweep
from wit_plugins.cli.sweep.evaluation import evaluation_script
from wit_plugins.cli.sweep.folders import last_checkpoint
from wit_plugins.cli.sweep.grid import Cell, cells, one_per_ratio, parse_weights, ratio_note, same_ratio
from wit_plugins.cli.sweep.heatmap import colour_limits
from wit_plugins.cli.sweep.logs import log_reason, log_tail
from wit_plugins.cli.sweep.metrics import Metric, by_name, numbers
from wit_plugins.cli.sweep.options import SweepOptions
from wit_plugins.cli.sweep.report import report
from wit_plugins.cli.sweep.results import choose_metrics, collect, format_value
from wit_plugins.cli.sweep.runner import _Running, show
from wit_plugins.runfiles import MetricsReader, read_metrics, write_json

# --- the grid ---------------------------------------------------------------------------------------------------------


def short(value):
    """A test's id; the whole value could be longer than an environment variable may be."""
    return str(value)[:20]


def grid(prompts, responses):
    return cells(parse_weights(prompts, "p"), parse_weights(responses, "r"))


def test_the_grid_has_no_cell_that_trains_nothing():
    assert [cell.label for cell in grid("0,0.2", "0,1")] == ["(0, 1)", "(0.2, 0)", "(0.2, 1)"]
    with pytest.raises(WITConfigError, match="trains nothing"):
        grid("0", "0")


@pytest.mark.parametrize("text", ["", "a", "0.2,,1", "-1", "inf", "nan", "1e-60", "1/0"])
def test_weights_that_are_none(text):
    with pytest.raises(WITConfigError, match="--prompt-weight"):
        parse_weights(text, "--prompt-weight")


def test_cells_that_differ_only_in_scale():
    """Over the paper's grid against a count of equal quotients in integers."""
    steps = "0,0.2,0.4,0.6,0.8,1.0"
    found = {tuple(sorted(cell.label for cell in group)) for group in same_ratio(grid(steps, steps))}
    pairs = [(p, r) for p in range(6) for r in range(6) if (p, r) != (0, 0)]
    expected = set()
    for p, r in pairs:
        group = [(a, b) for a, b in pairs if a * r == b * p]
        if len(group) > 1:
            expected.add(tuple(sorted(f"({a / 5:g}, {b / 5:g})" for a, b in group)))
    assert found == expected
    assert len(one_per_ratio(grid(steps, steps))) == len({Fraction(p, r) if r else None for p, r in pairs})
    assert "(0.1, 0.3)" in ratio_note(grid("0.1,0.2", "0.3,0.6"))  # 0.1/0.3 and 0.2/0.6 differ as floats
    assert ratio_note(grid("0.1", "0.3,0.6")) is None


def test_no_two_cells_share_a_folder_a_label_or_a_row(tmp_path):
    """Seven and more digits, a third and its decimals; and one number written in several ways is one cell."""
    made = grid("0.1000001,0.1000002,1/3,0.333333,1e-7,1e22,12345678", "1")
    assert len({cell.name for cell in made}) == len({cell.label for cell in made}) == 7
    for cell in made:
        prompt, response = cell.name.removeprefix("p").split("_r")
        assert (float(prompt), float(response)) == cell.weights
    assert [cell.name for cell in grid("0.2,1/5,2e-1,0.20,0.2000000000000000000001", "1.0")] == ["p0.2_r1"]
    made_up(tmp_path, prompts="0.1000001,0.1000002")
    made_up(tmp_path, prompts="0.10000010,1/3,0.3333333333333333")
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["prompt_weight"]) for row in rows] == [0.1000001, 0.1000002, 1 / 3]
    assert [float(row["eval_prompt_loss"]) for row in rows] == [2 - 0.1000001, 2 - 0.1000002, 2 - 1 / 3]
    assert len(order(tmp_path)) == 3


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "9" * 5000, "1e1_000_000_000"], ids=short)
def test_numbers_that_would_take_for_ever(text):
    with pytest.raises(WITConfigError, match="is not a finite number"):
        parse_weights(text, "--prompt-weight")


# --- runs that are made up --------------------------------------------------------------------------------------------

RUN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["WIT_RUN_FOLDER"])
prompt, response = float(sys.argv[1]), float(sys.argv[2])
output = pathlib.Path(sys.argv[3])
resume = sys.argv[4] if len(sys.argv) > 4 else ""
output.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "order.txt", "a") as file:
    print(folder.name, resume, os.environ.get("CUDA_VISIBLE_DEVICES", ""), time.time(), file=file)
def log(**entry):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\\n")
{body}
log(step=4, eval_response_loss=(prompt - 0.4) ** 2 + 1 + 0.1 * response, eval_prompt_loss=2 - prompt,
    eval_loss=0.1, eval_ppl=1.1, eval_runtime=3.0, eval_accuracy=prompt / 2)
"""


class MadeUp(FrameworkDriver):
    """A framework whose runs are a few lines of Python."""

    name = title = "madeup"
    distribution, oldest, below = "pluggy", "0", "99"

    def __init__(self, body=""):
        self.script = RUN.replace("{body}", textwrap.dedent(body))

    def command(self, job, output, resume, port=None):
        more = [str(resume)] if resume else []
        weights = [str(job.weights[name]) for name in ("prompt_weight", "response_weight")]
        return [sys.executable, "-c", self.script, *weights, str(output), *more]


def made_up(tmp_path, body="", prompts="0,0.4,1", responses="1", values=None, **options):
    job = Job(None, {"a": 1, **(values or {})})
    options = {"check": False, **options}  # there is no data to look at
    return sweep(MadeUp(body), job, grid(prompts, responses), SweepOptions(tmp_path / "runs", **options))


def order(tmp_path):
    return [line.split(" ") for line in (tmp_path / "runs" / "order.txt").read_text().splitlines()]


def test_results_in_every_form(tmp_path, capsys):
    assert made_up(tmp_path, prompts="0,0.4,1", responses="0.5,1") == 0
    out = capsys.readouterr().out
    runs = tmp_path / "runs"
    with open(runs / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        prompt, response = float(row["prompt_weight"]), float(row["response_weight"])
        assert float(row["eval_response_loss"]) == (prompt - 0.4) ** 2 + 1 + 0.1 * response
        assert float(row["ratio"]) == pytest.approx(prompt / response)
        assert not {"eval_loss", "eval_ppl"} & set(row)  # weighted: not to be compared
        assert "eval_runtime" not in row
    result = read_json(runs / "results.json")
    assert result["best"]["eval_response_loss"] == {
        "direction": "min", "prompt_weight": 0.4, "response_weight": 0.5, "value": 1.05,
    }  # fmt: skip
    assert result["best"]["eval_accuracy"]["direction"] == "max"
    assert result["best"]["eval_accuracy"]["prompt_weight"] == 1.0
    lines = [line for line in out.splitlines() if line.startswith("(")]
    assert lines[0].startswith("(0.4, 0.5)")
    assert "1.050 *" in lines[0]
    assert "lower is better" in out
    assert "These cells differ only in scale: (0, 0.5) (0, 1)" in " ".join(out.split())
    assert "No heat map" not in out
    header = (runs / "heatmap.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:24])) > 300


def test_without_matplotlib_there_is_everything_but_the_picture(tmp_path, capsys, monkeypatch):
    for module in ("command", "report"):
        monkeypatch.setattr(f"wit_plugins.cli.sweep.{module}.can_draw", lambda: False)
    assert made_up(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.index("No heat map: matplotlib is missing") < out.index("(0.4, 1)")
    assert (tmp_path / "runs" / "results.csv").is_file()
    assert not (tmp_path / "runs" / "heatmap.png").exists()


def test_the_heat_map_says_what_it_shows(tmp_path, monkeypatch):
    """Titles, marks and outlines, read off matplotlib's own objects."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    made_up(tmp_path, prompts="0,0.4,1", responses="0.5,1")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    report(tmp_path / "runs", ["eval_response_loss", "eval_accuracy"])
    (figure,) = figures
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == [
        "eval_response_loss\nnats per token, lower is better; best (0.4, 0.5): 1.050",
        "eval_accuracy\nhigher is better; best (1, 0.5): 0.5000",
    ]
    for axis, best in zip(panels, ((1, 0), (2, 0)), strict=True):
        starred = [text.get_position() for text in axis.texts if "★" in text.get_text()]
        assert starred == [best]
        outlined = {
            (round(patch.get_x() + patch.get_width() / 2), round(patch.get_y() + patch.get_height() / 2))
            for patch in axis.patches
            if isinstance(patch, Rectangle) and patch.get_edgecolor()[:2] == pytest.approx((0.835, 0.369), abs=0.01)
        }
        assert outlined == {(0, 1), (2, 1)}  # (0, 1) and (1, 1) in weights
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.4", "1"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["best cell", "(0, 1) instruction tuning", "(1, 1) language modelling"]


def test_a_failing_cell_is_recorded_and_the_rest_go_on(tmp_path, capsys):
    body = """
    for i in range(50):
        print("line", i)
    if prompt == 0.4:
        print("boom: \\x1b[2J no memory", file=sys.stderr)
        sys.exit(3)
    """
    assert made_up(tmp_path, body) == 1
    captured = capsys.readouterr()
    state = read_json(tmp_path / "runs" / "p0.4_r1" / "cell.json")
    assert (state["status"], state["returncode"], len(state["error"])) == ("failed", 3, 20)
    assert state["error"][-1] == "boom: \x1b[2J no memory"
    assert "failed: exit code 3: boom: ␛[2J no memory" in captured.err
    assert "(0.4, 1) failed: exit code 3: boom: ␛[2J no memory" in captured.out
    assert "line 49" not in captured.out  # the log has it
    assert "\x1b[2J" not in captured.out + captured.err
    assert [r.status for r in collect(tmp_path / "runs")] == ["finished", "failed", "finished"]
    # Started again, the failed one is tried again, and only that one.
    assert made_up(tmp_path) == 0
    assert [name for name, *_ in order(tmp_path)] == ["p0_r1", "p0.4_r1", "p1_r1", "p0.4_r1"]
    assert "2 of 3 cells are finished already" in capsys.readouterr().err


def test_a_run_that_a_signal_ended(tmp_path, capsys):
    assert made_up(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)", prompts="0") == 1
    assert "stopped by SIGSEGV" in capsys.readouterr().err


def test_side_by_side_on_their_devices(tmp_path):
    body = """
    (folder.parent / f"here-{folder.name}").touch()
    until = time.time() + 3600
    while len(list(folder.parent.glob("here-*"))) < 2 and time.time() < until:
        time.sleep(0.05)
    assert time.time() < until, "alone"
    """
    assert made_up(tmp_path, body, prompts="0,0.4,0.6,1", jobs=2, devices=["0,1", "2,3"]) == 0
    assert {device for _, _, device, _ in order(tmp_path)} == {"0,1", "2,3"}
    assert {device for _, _, device, _ in order(tmp_path)[:2]} == {"0,1", "2,3"}


def test_more_jobs_than_devices(tmp_path, capsys):
    args = ["--prompt-weight", "0", "--response-weight", "1", "--output", tmp_path, "--jobs", "3", "--devices", "0,1"]
    code, _, err = wit("sweep", workplace(tmp_path, eval_strategy="epoch"), *args, capsys=capsys)
    assert code == 2
    assert "--jobs = 3 is more than the 2 in --devices" in err


def test_two_configurations_do_not_share_a_folder(tmp_path):
    made_up(tmp_path, prompts="0")
    with pytest.raises(WITConfigError, match=r"differing: a: 1 → 2.*another --output"):
        made_up(tmp_path, prompts="0", values={"a": 2})
    made_up(tmp_path, prompts="0.4")  # a grid that grows is fine
    assert [r.cell.label for r in collect(tmp_path / "runs")] == ["(0, 1)", "(0.4, 1)"]


def test_one_sweep_a_folder_at_a_time(tmp_path):
    import fcntl

    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(WITConfigError, match="another `wit sweep` is running there"):
            made_up(tmp_path)


def test_unique_ratios_runs_one_of_those_alike(tmp_path):
    made_up(tmp_path, prompts="0,0.5,1", responses="0.5,1", unique_ratios=True)
    assert sorted(name for name, *_ in order(tmp_path)) == ["p0.5_r1", "p0_r1", "p1_r0.5", "p1_r1"]


def test_interrupted_it_stops_its_runs_and_goes_on_later(tmp_path, monkeypatch):
    """SIGTERM while a cell is at its checkpoint; the second time it is given that checkpoint."""
    script = tmp_path / "sweep.py"
    body = """
    checkpoint = output / "checkpoint-2"
    log(step=2, eval_response_loss=0.01); log(step=3, eval_response_loss=0.001)
    if not resume:
        checkpoint.mkdir()
        (checkpoint / "scheduler.pt").touch()
        (checkpoint / "trainer_state.json").write_text("{}")
        (folder / "progress.json").write_text(json.dumps({"step": 3, "max_steps": 4}))
        time.sleep(3600)
    """
    script.write_text(
        f"import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r}); import conftest\n"
        f"from test_cli_sweep import made_up; import pathlib\nmade_up(pathlib.Path({str(tmp_path)!r}), {body!r}, '0')\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env=subprocess_env())
    folder = tmp_path / "runs" / "p0_r1"
    wait_for((folder / "progress.json").exists, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert processes_of(folder) == []
    assert read_json(folder / "cell.json")["status"] == "interrupted"
    assert made_up(tmp_path, body, "0") == 0
    assert order(tmp_path)[-1][1].endswith("checkpoint-2")
    # What was logged after the checkpoint is logged again, and not counted twice.
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2, 3, 4]


def wait_for(condition, process=None):
    """As long as it takes: a limit of seconds is one that a busy machine breaks. The process must not end before."""
    while not condition():
        assert process is None or process.poll() is None or condition(), "it ended before that"
        time.sleep(0.05)


def test_an_incomplete_checkpoint_is_not_gone_on_from(tmp_path):
    for number, state in ((5, "{}"), (10, "{}"), (15, '{"unfinished'), (20, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "scheduler.pt").touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "scheduler.pt").unlink()  # save_only_model
    assert last_checkpoint(tmp_path).name == "checkpoint-5"


def test_a_log_s_progress_bar_is_one_line(tmp_path):
    (tmp_path / "log").write_bytes(b"start\n 1%\r 2%\r 99%\nError: \xff bad\n\n")
    assert log_tail(tmp_path / "log") == ["start", " 99%", "Error: \ufffd bad"]


# --- nothing is lost --------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "damage", ["", "{", "null", "[]", '{"status": "made up"}', '{"status": ["finished"]}', "[" * 9999, None], ids=short
)
def test_a_model_without_its_cell_json_is_kept(tmp_path, capsys, damage):
    """Empty after a power cut, cut off, of another kind, lost: the folder is moved and named, and the cell trained."""
    made_up(tmp_path, "(output / 'model.safetensors').write_text('weights')", prompts="0,1")
    runs = tmp_path / "runs"
    path = runs / "p0_r1" / "cell.json"
    path.unlink()
    if damage is not None:
        path.write_text(damage)
    before = contents(runs / "p0_r1")
    capsys.readouterr()
    assert report(runs) == (damage is not None)
    assert ("cell.json is damaged; start the sweep again" in capsys.readouterr().out) == (damage is not None)
    assert made_up(tmp_path, prompts="0,1") == 0
    assert contents(runs / "p0_r1.old-1") == before
    assert "kept as p0_r1.old-1" in capsys.readouterr().err
    assert [result.status for result in collect(runs)] == ["finished", "finished"]
    assert [name for name, *_ in order(tmp_path)] == ["p0_r1", "p1_r1", "p0_r1"]


def test_a_foreign_folder_in_a_cell_s_place_is_kept(tmp_path, capsys):
    """Somebody's checkpoints: neither deleted nor gone on from. A second one gets a second name; a link stays one."""
    foreign, real = tmp_path / "runs" / "p0_r1", tmp_path / "elsewhere"
    (foreign / "model" / "checkpoint-5").mkdir(parents=True)
    (foreign / "model" / "checkpoint-5" / "scheduler.pt").touch()
    (foreign / "model" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (foreign / "metrics.jsonl").write_text('{"step": 1, "eval_response_loss": 0.0}\n')
    before = contents(foreign)
    made_up(tmp_path, prompts="0")
    assert contents(tmp_path / "runs" / "p0_r1.old-1") == before
    assert order(tmp_path)[0][1] == ""
    assert collect(tmp_path / "runs")[0].metrics["lowest_eval_response_loss"] > 1
    real.mkdir()
    (real / "model.safetensors").write_text("mine")
    foreign.rename(tmp_path / "runs" / "gone")
    foreign.symlink_to(real)
    made_up(tmp_path, prompts="0")
    assert contents(real) == {Path("model.safetensors"): b"mine"}
    assert (tmp_path / "runs" / "p0_r1.old-2").is_symlink()


def test_what_an_attempt_without_a_checkpoint_left_is_kept(tmp_path, capsys):
    """It may be the whole model, of a run that was killed right behind its last step."""
    body = "(output / 'model.safetensors').write_text(str(len(list(folder.glob('model*')))))\n"
    assert made_up(tmp_path, body + "sys.exit(1)", prompts="0") == 1
    assert made_up(tmp_path, body + "sys.exit(1)", prompts="0") == 1
    assert made_up(tmp_path, body, prompts="0") == 0
    folder = tmp_path / "runs" / "p0_r1"
    kept = [(folder / name / "model.safetensors").read_text() for name in ("model.old-1", "model.old-2", "model")]
    assert kept == ["1", "2", "3"]
    assert f"kept as {folder / 'model.old-2'}" in capsys.readouterr().err


def test_a_cell_that_diverges_is_recorded_and_the_sweep_goes_on(tmp_path, capsys):
    body = """
    if prompt == 0.4:
        log(step=2, eval_response_loss=1.5)
        nan, inf = float("nan"), float("inf")
        log(step=4, loss=nan, eval_response_loss=nan, eval_prompt_loss=inf, eval_accuracy=9.0)
        sys.exit(0)
    """
    assert made_up(tmp_path, body) == 0
    captured = capsys.readouterr()
    assert "(0.4, 1): diverged in" in captured.err
    runs = tmp_path / "runs"
    assert read_json(runs / "p0.4_r1" / "cell.json")["status"] == "diverged"
    assert [result.status for result in collect(runs)] == ["finished", "diverged", "finished"]
    assert collect(runs)[1].metrics["lowest_eval_response_loss"] == 1.5
    lines = [line for line in captured.out.splitlines() if line.startswith("(")]
    assert lines[-1].split()[:4] == ["(0.4,", "1)", "0.4", "diverged"]
    written = json.loads((runs / "results.json").read_text(), parse_constant=pytest.fail)  # nan is not JSON
    assert written["best"]["eval_accuracy"]["prompt_weight"] == 1.0
    assert (runs / "heatmap.png").is_file()
    # It is done: neither trained again nor evaluated.
    assert made_up(tmp_path, eval_command="echo '{\"n\": 1}'") == 0
    assert len(order(tmp_path)) == 3
    assert [result.metrics.get("n") for result in collect(runs)] == [1.0, None, 1.0]
    assert report(runs) == 0


@pytest.mark.parametrize(
    "damage",
    [
        "", "\0" * 100, "{", '{"step"', "[1]\nnull\n7\n", '{"step": "x", "eval_response_loss": "low"}\n',
        '{"eval_response_loss": 1.0}\n', '{"step": NaN, "eval_response_loss": 1e999}\n', "[" * 100_000 + "\n",
        '{"step": ' + "9" * 400 + ', "eval_response_loss": ' + "9" * 400 + "}\n",
        '{"step": ' + "9" * 5000 + "}\n", '{"step": {"a": []}, "eval_response_loss": [1]}\n', b"\xff\xfe{}\n",
        '{"\\ud800": 1.0, "eval_\\ud800": 1.0, "eval_$x^$ \\u001b[2J": 1e308}\n',
    ], ids=short)  # fmt: skip
def test_damaged_metrics_cost_what_stood_in_them(tmp_path, capsys, damage):
    made_up(tmp_path)
    runs = tmp_path / "runs"
    for name in ("metrics.jsonl", "progress.json"):
        path = runs / "p0.4_r1" / name
        whole = path.read_bytes() if path.exists() else b""
        path.write_bytes((damage if isinstance(damage, bytes) else damage.encode()) + b"\n" + whole)
    assert report(runs) == 0
    after = collect(runs)
    assert [result.metrics["eval_response_loss"] for result in after] == pytest.approx([1.26, 1.1, 1.46])
    assert "\x1b[2J" not in capsys.readouterr().out
    with open(runs / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"framework": "madeup", "settings": {"a": 1}, "cells": [["x", 1]]}']
)
def test_a_damaged_sweep_json_is_refused_with_the_way_out(tmp_path, damage):
    made_up(tmp_path)
    path = tmp_path / "runs" / "sweep.json"
    whole = path.read_text()
    path.write_text(damage)
    for again in (lambda: report(tmp_path / "runs"), lambda: made_up(tmp_path)):
        with pytest.raises(WITConfigError, match=r"damaged.*delete that file and start the same `wit sweep` again"):
            again()
    path.unlink()  # the way out
    assert made_up(tmp_path) == 0
    assert path.read_text() == whole
    assert len(order(tmp_path)) == 3


def test_a_state_with_damaged_parts_is_read_as_far_as_it_goes(tmp_path):
    made_up(tmp_path)
    path = tmp_path / "runs" / "p0.4_r1" / "cell.json"
    state = {**read_json(path), "seconds": "long", "attempts": None, "error": 3, "evaluation": {"metrics": [1]}}
    path.write_text(json.dumps(state))
    assert made_up(tmp_path) == 0
    assert len(order(tmp_path)) == 3


# --- files that cannot be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/runs", "n" * 300], ids=short)
def test_an_output_that_cannot_be_one(tmp_path, place, capsys):
    (tmp_path / "file").write_text("a report")
    path = workplace(tmp_path, evaluation=True, eval_strategy="epoch")
    for more in ([], ["--dry-run"]) if place == "file" else ([],):
        code, _, err = wit("sweep", path, *GRID, "--output", tmp_path / place, *more, capsys=capsys)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "--output = " in err
    assert (tmp_path / "file").read_text() == "a report"
    code, _, err = wit("report", tmp_path / place, capsys=capsys)
    assert code == 2
    assert len(err.splitlines()) == 1


FULL = """
import resource, sys, pathlib
from test_cli_sweep import MadeUp, SweepOptions, grid, report, sweep
from wit_plugins.cli.driver import Job
from wit_plugins.errors import WITConfigError
runs = pathlib.Path(sys.argv[1])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))  # every write beyond it fails, as on a full disk
if sys.argv[3] == "report":
    print("code", report(runs))
else:
    try:
        sweep(MadeUp(), Job(None, {"a": 1}), grid("0,1", "1"), SweepOptions(runs, check=False))
    except WITConfigError as error:
        print("refused:", error)
"""


@pytest.mark.parametrize("room", [0, 100, 700])
def test_a_full_disk(tmp_path, room):
    """In a process whose files cannot grow: one line that says what to do, and the state before it stays readable."""
    made_up(tmp_path, prompts="0")
    runs = tmp_path / "runs"
    before = (runs / "sweep.json").read_bytes(), (runs / "p0_r1" / "cell.json").read_bytes()

    def limited(what):
        arguments = [sys.executable, "-c", FULL, str(runs), str(room), what]
        paths = os.pathsep.join([os.path.dirname(__file__), subprocess_env()["PYTHONPATH"]])
        return subprocess.run(arguments, env=subprocess_env(PYTHONPATH=paths), capture_output=True, text=True)

    done = limited("report")
    assert done.returncode == 0, done.stderr
    assert "1.260 *" in done.stdout  # the table comes first
    assert "code 1" in done.stdout
    assert "nothing could be written there (File too large)" in " ".join(done.stdout.split())
    done = limited("sweep")
    assert "refused: --output = " in done.stdout or (room and "failed: " in done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert (runs / "p0_r1" / "cell.json").read_bytes() == before[1]
    assert read_json(runs / "sweep.json")["framework"] == "madeup"
    assert not list(runs.rglob(".*.json.*"))
    assert made_up(tmp_path, prompts="0,1") == 0  # with room again, it goes on
    assert [result.status for result in collect(runs)] == ["finished", "finished"]


@pytest.mark.parametrize("devices", ["gpu", ",,", "", "0,0", "0,1+0", "0+", "-1", "0;1", "99999", "0 1"])
def test_devices_that_are_none(tmp_path, capsys, devices):
    args = [f"--devices={devices}", "--output", tmp_path / "runs"]
    code, _, err = wit("sweep", workplace(tmp_path, eval_strategy="epoch"), *GRID, *args, capsys=capsys)
    assert code == 2
    assert f"--devices = {devices!r}" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", "9" * 5000], ids=short)
def test_jobs_that_are_none(capsys, jobs):
    with pytest.raises(SystemExit):
        wit("sweep", "x.yaml", *GRID, "--output", "runs", f"--jobs={jobs}", capsys=capsys)
    err = capsys.readouterr().err
    assert "is not a whole number from 1 on" in err
    assert "_positive" not in err


# --- the parent's work ------------------------------------------------------------------------------------------------


def bytes_read():
    """By this process so far, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_parent_reads_only_what_is_new(tmp_path):
    from rich.progress import Progress

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "eval_response_loss": i / 7}) + "\n" for i in range(20_000)))
    (tmp_path / "progress.json").write_text('{"step": 3, "max_steps": 9}')
    size = path.stat().st_size
    with Progress(disable=True) as bars:
        run = _Running(grid("0", "1")[0], 0, None, None, bars.add_task("cell"), 0.0, MetricsReader(path))
        before = bytes_read()
        for step in range(50):
            show(bars, tmp_path, run)
            with open(path, "a") as file:
                file.write(f'{{"step": {20_000 + step}, "eval_response_loss": 1.0}}\n')
        assert bytes_read() - before < 1.5 * size  # and not 50 times that
        assert bars.tasks[0].completed == 3
    assert run.note == "steps, eval_response_loss 1.000"


def test_what_grows_is_read_once_and_whole(tmp_path):
    """Byte by byte, and written anew: no entry is missed, none comes twice."""
    path = tmp_path / "metrics.jsonl"
    reader, text, seen = MetricsReader(path), "".join(f'{{"step": {i}}}\n' for i in range(12)), []
    assert reader.new() == []
    for end in range(len(text) + 1):
        path.write_text(text[:end])
        seen += [entry["step"] for entry in reader.new()]
    assert seen == list(range(12))
    path.write_text('{"step": 99}\n')
    assert [entry["step"] for entry in reader.new()] == [99]
    assert len(read_metrics(path)) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_report_needs_no_torch(tmp_path):
    """Neither torch nor transformers nor a framework can be imported there. (What `import wit_plugins` itself brings is
    another matter, so the package stands there empty.)"""
    made_up(tmp_path)
    code = f"""
import sys
for name in ("torch", "transformers", "accelerate", "datasets", "trl"):
    sys.modules[name] = None  # importing it is an ImportError
from wit_plugins.cli.main import main
import wit_plugins.cli.sweep.command, wit_plugins.runfiles
assert not [name for name in sys.modules if name.split(".")[0] in ("rich", "matplotlib", "numpy", "pydantic")]
sys.exit(main(["report", {str(tmp_path / "runs")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.100 *" in done.stdout


# --- before it starts -------------------------------------------------------------------------------------------------


def test_a_sweep_checks_once_before_it_starts(tmp_path, capfd):
    """Evaluation without a test split: every cell would fail."""
    path = workplace(tmp_path, **REAL)
    runs = tmp_path / "runs"
    code, out, err = wit("sweep", path, *GRID, "--output", runs, capsys=capfd)
    assert code == 2, out + err
    assert "nothing was started" in out
    assert "problem" in out.split("nothing was started")[0]
    assert [path.name for path in runs.iterdir()] == [".lock"]  # so that the mended configuration may have the folder


LAUNCHER = """
for i in range(40):
    print("  File \\"launcher.py\\", line", i)
print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
for i in range(30):
    print("    at", i)
print("subprocess.CalledProcessError: Command '['python']' returned non-zero exit status 1.")
sys.exit(1)
"""


def test_a_failed_cell_is_summed_up_by_the_line_that_matters(tmp_path, capsys):
    assert made_up(tmp_path, LAUNCHER) == 1
    out = capsys.readouterr().out
    said = (
        "(0, 1) and 2 more failed: exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert said in out
    assert "CalledProcessError" not in out
    assert out.count("OutOfMemory") == 1
    assert str(tmp_path / "runs" / "p0_r1" / "log.txt") in out
    # And an old attempt's error is not taken for the new one's.
    assert made_up(tmp_path, "os._exit(7)", prompts="0") == 1
    assert "exit code 7: no output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nValueError: x\n", "ValueError: x"),
        ("[rank1]: a.b.MyError: x\n[rank1]: more\n", "a.b.MyError: x"),
        ("wit: prompt_wieght: unknown\nsubprocess.CalledProcessError: Command\n", "wit: prompt_wieght: unknown"),
        ("usage: x\ncmd: error: no such option\n", "cmd: error: no such option"),
        ("KeyboardInterrupt\nbye\n", "KeyboardInterrupt"),
        ("Exception ignored in: <x>\nall is lost\n", "all is lost"),
        ("", ""),
    ],
)
def test_the_line_that_matters(tmp_path, log, line):
    (tmp_path / "log").write_text(log)
    assert log_reason(tmp_path / "log") == line


# --- the user's own evaluation ----------------------------------------------------------------------------------------

LM_EVAL = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.6},
        "wikitext": {"word_perplexity,none": 12.5},
    },
    "config": {"limit": 100},
}


def test_lm_eval_harness_json():
    assert numbers(LM_EVAL) == {"arc_easy/acc": 0.5, "arc_easy/acc_norm": 0.6, "wikitext/word_perplexity": 12.5}
    assert numbers({"a": {"b": 1, "c": True, "d": float("nan"), "e": "1"}}) == {"a/b": 1.0}


@pytest.mark.parametrize(
    "command",
    [
        "mkdir -p {output}/model && cp ../lm_eval.json {output}/model/results_2026.json",
        "cp ../lm_eval.json {output}",
        "echo noise {} [1]; cat ../lm_eval.json; echo done",
    ],
)
def test_the_evaluation_s_json_is_found(tmp_path, monkeypatch, command, capsys):
    (tmp_path / "lm_eval.json").write_text(json.dumps(LM_EVAL, indent=2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert made_up(tmp_path, prompts="0,1", eval_command=command) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert metrics["arc_easy/acc"] == 0.5
    assert metrics["eval_response_loss"] == pytest.approx(1.26)
    chosen = {metric.name: metric.direction for metric in choose_metrics(collect(tmp_path / "runs"), [])}
    assert (chosen["arc_easy/acc"], chosen["wikitext/word_perplexity"]) == ("max", "min")


def test_the_evaluation_knows_model_and_weights_and_is_run_again_if_it_failed(tmp_path, capsys):
    failing = "echo no luck >&2; exit 4"
    assert made_up(tmp_path, prompts="0.4", eval_command=failing) == 1
    assert "evaluation failed: exit code 4: no luck" in capsys.readouterr().out
    assert collect(tmp_path / "runs")[0].error[-1] == "no luck"
    good = """python3 -c 'import json, sys; print(json.dumps({"n": len(sys.argv[1]), "p": float(sys.argv[2])}))' """
    good = good.replace("python3", sys.executable) + "{model} {prompt_weight}"
    assert made_up(tmp_path, prompts="0.4", eval_command=good) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert (metrics["n"], metrics["p"]) == (len(str(tmp_path / "runs" / "p0.4_r1" / "model")), 0.4)
    assert len(order(tmp_path)) == 1  # the training was not run again


def test_an_old_result_is_never_a_new_one(tmp_path):
    """A file, a folder and a link at {output}, then a command that writes nothing; what was there is kept."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere.json"
    elsewhere.write_text('{"n": 3}')
    first = ["echo '{\"n\": 1}' > {output}", "mkdir {output} && echo '{\"n\": 2}' > {output}/a.json"]
    for kept, command in enumerate([*first, f"ln -s {elsewhere} {{output}}"], 1):
        assert made_up(tmp_path, prompts="0", eval_command=command) == 0
        assert collect(runs)[0].metrics["n"] == kept
        assert made_up(tmp_path, prompts="0", eval_command=f"true {kept}") == 1
        (result,) = collect(runs)
        assert "n" not in result.metrics
        assert "it wrote no JSON with numbers" in result.reason
    assert len(list((runs / "p0_r1").glob("evaluation.old-*"))) == 3
    assert elsewhere.exists()


def test_an_evaluation_that_is_cut_short_leaves_no_older_number(tmp_path):
    assert made_up(tmp_path, prompts="0", eval_command="echo '{\"n\": 1}'") == 0
    with pytest.raises(KeyboardInterrupt):
        made_up(tmp_path, prompts="0", eval_command="kill -TERM $PPID; sleep 3600")
    assert "n" not in collect(tmp_path / "runs")[0].metrics
    assert collect(tmp_path / "runs")[0].status == "finished"


@pytest.mark.parametrize(
    "name", ["with space", "$(touch pwned)", "`touch pwned`", "a'b\"c", "; touch pwned", "-n", "*"]
)
def test_a_path_is_never_part_of_the_command(tmp_path, monkeypatch, name):
    """Whatever the folder is called, unquoted as {model} or quoted as the shell's own variable."""
    here = tmp_path / "here"
    (tmp_path / name).mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "compare.py").write_text(
        "import json, sys\nprint(json.dumps({n: float(a == sys.argv[1]) for n, a in enumerate(sys.argv[2:])}))"
    )
    expected = (tmp_path / name / "runs" / "p0_r1" / "model").resolve()
    monkeypatch.setenv("EXPECTED", str(expected))
    command = f'{sys.executable} compare.py "$EXPECTED" {{model}} "$WIT_MODEL" "${{WIT_OUTPUT%/evaluation}}/model"'
    assert made_up(tmp_path / name, prompts="0", eval_command=command) == 0
    metrics = collect(tmp_path / name / "runs")[0].metrics
    assert [metrics[n] for n in "012"] == [1.0, 1.0, 1.0]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    "command", ['x "{model}"', "x '{output}'", 'x "a\\"{model}"', "x 'a\\'\"{model}\"", "bash -c 'x {model}'"]
)
def test_a_placeholder_inside_quotes_is_refused(tmp_path, command):
    with pytest.raises(WITConfigError, match=r"stands inside .*write it without quotes.*\$WIT_(MODEL|OUTPUT)"):
        made_up(tmp_path, eval_command=command)
    assert not (tmp_path / "runs").exists()


def test_placeholders_outside_quotes():
    (cell,) = grid("0.1000001", "1")
    text = """a 'x' "y \\" z" \\" {model} p={output},d {prompt_weight} '{response_weight}'"""
    made = """a 'x' "y \\" z" \\" "$WIT_MODEL" p="$WIT_OUTPUT",d 0.1000001 '1'"""
    assert evaluation_script(text, cell) == made


@pytest.mark.parametrize(
    ("name", "direction", "guessed"),
    [
        ("answer_accuracy", "max", False),  # contains wer
        ("cerebral_acc", "max", False),  # contains cer
        ("supplement_f1", "max", False),  # contains ppl
        ("glossary_recall", "max", False),  # contains loss
        ("eval_response_loss", "min", False),
        ("wikitext/word_perplexity", "min", False),
        ("wikitext/bits_per_byte", "min", False),
        ("asr/WER", "min", False),
        ("arc_easy/acc_norm", "max", False),
        ("gsm8k/exact_match,strict-match", "max", False),
        ("humaneval/pass@1", "max", False),
        ("toxicity_score", "min", False),
        ("error_recall", "max", False),
        ("rougeLsum", "max", False),
        ("exactMatch", "max", False),
        ("MSELoss", "min", False),
        ("loss_improvement", "min", True),
        ("helpfulness", "max", True),
        ("точность", "max", True),
    ],
)
def test_the_direction_of_a_metric(name, direction, guessed):
    assert by_name(name) == Metric(name, direction, guessed)


def test_a_guessed_direction_is_said_to_be_one(tmp_path, capsys):
    command = 'echo \'{"answer_accuracy": {prompt_weight}, "niceness": {prompt_weight}}\''
    assert made_up(tmp_path, eval_command=command, metrics=["answer_accuracy", "niceness"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "answer_accuracy: higher is better, niceness: higher is better (a guess)." in out
    assert "--metric 'niceness:min'" in out
    found = read_json(tmp_path / "runs" / "results.json")["best"]
    assert found["answer_accuracy"]["prompt_weight"] == 1.0
    assert "direction_guessed" not in found["answer_accuracy"]
    assert found["niceness"]["direction_guessed"] is True
    assert report(tmp_path / "runs", ["niceness:min"]) == 0
    out = capsys.readouterr().out
    assert "niceness: lower is better." in out
    assert "(a guess)" not in out
    assert read_json(tmp_path / "runs" / "results.json")["best"]["niceness"]["prompt_weight"] == 0.0


def test_numbers_are_left_out_by_whole_words(tmp_path):
    body = (
        "log(step=3, eval_multistep_accuracy=1.0, eval_stepwise=2.0, eval_samples_per_second=3.0, eval_num_tokens=4.0)"
    )
    made_up(tmp_path, body, prompts="0")
    found = set(collect(tmp_path / "runs")[0].metrics)
    assert {"eval_multistep_accuracy", "eval_stepwise"} <= found
    assert not {"eval_samples_per_second", "eval_num_tokens", "eval_runtime"} & found


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_draws_again_what_is_there(tmp_path, capsys):
    made_up(tmp_path)
    runs = tmp_path / "runs"
    for name in ("results.csv", "results.json", "heatmap.png"):
        (runs / name).unlink()
    code, _, _ = wit("report", runs, "--metric", "eval_accuracy:min", capsys=capsys)
    assert code == 0
    assert read_json(runs / "results.json")["best"]["eval_accuracy"]["prompt_weight"] == 0.0
    assert (runs / "heatmap.png").is_file()
    code, _, err = wit("report", runs, "--metric", "acuracy", capsys=capsys)
    assert code == 2
    assert "they have: eval_response_loss" in err
    code, _, err = wit("report", tmp_path, capsys=capsys)
    assert code == 2
    assert "holds no sweep" in err


def test_a_metric_s_name_does_nothing_to_the_terminal(tmp_path, capsys):
    """Escape sequences, line breaks and markup, in a name that the run or the evaluation made up."""
    body = 'log(step=1, **{"eval_\\x1b[2J\\n$x^$ [red]loss": 1.0})'
    command = """printf '{"a\\u001b]0;owned\\u0007\\u202e": 1}'"""
    metrics = ["eval_\x1b[2J\n$x^$ [red]loss", "a\x1b]0;owned\x07\u202e"]
    assert made_up(tmp_path, body, prompts="0", eval_command=command, metrics=metrics) == 0
    captured = capsys.readouterr()
    assert not set("\x1b\x07\u202e") & set(captured.out + captured.err)
    assert "␛[2J⏎$x^$ [red]loss: lower is better" in " ".join(captured.out.split())
    code, out, err = wit("report", tmp_path / "runs", "--metric", "x\x1b[2J", capsys=capsys)
    assert code == 2
    assert "\x1b" not in out + err


def test_a_large_grid_prints_what_matters(tmp_path, capsys):
    cells_ = grid(",".join(f"{i / 10}" for i in range(12)), ",".join(f"{i / 10}" for i in range(1, 11)))
    runs = tmp_path / "runs"
    for cell in cells_:
        write_json(cell.folder(runs) / "cell.json", {"status": "finished", "seconds": 1.0})
        prompt, response = cell.weights
        loss = (prompt - 0.35) ** 2 + (response - 0.82) ** 2
        (cell.folder(runs) / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval_response_loss": loss}) + "\n")
    listed = [[str(cell.prompt), str(cell.response)] for cell in cells_]
    write_json(runs / "sweep.json", {"framework": "madeup", "settings": {}, "cells": listed})
    assert report(runs) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 40
    rows = [line.split(")")[0] + ")" for line in out.splitlines() if " finished " in line]
    expected = sorted(cells_, key=lambda c: (c.weights[0] - 0.35) ** 2 + (c.weights[1] - 0.82) ** 2)
    assert set(rows) == {cell.label for cell in expected[:10]} | {"(0, 1)", "(1, 1)"}
    assert rows[0] == expected[0].label
    assert "12 of 120 cells are shown (120 finished); all of them are in results.csv" in " ".join(out.split())
    with open(runs / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 120


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([4.1, 4.2, 4.3, 900.0], (4.1, 4.3)),
        ([-900.0, 4.1, 4.2, 4.3], (4.1, 4.3)),
        ([4.1, 4.15, 4.2, 4.2, 4.3, 90.0, 9e5], (4.1, 4.3)),  # two, and each alone hides the rest
        ([2.0, 2.0, 2.0, 2.0, 2.1, 900.0], (2.0, 2.1)),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], (0.0, 5.0)),
        ([1.0, 1.0, 5.0, 5.0], (1.0, 5.0)),  # two kinds are no outliers
        ([2.0, 2.0, 2.0, 900.0], (2.0, 900.0)),  # the rest is one colour because it is one value
        ([4.3, 4.4, 900.0], (4.3, 900.0)),
        ([7.0], (7.0, 7.0)),
        ([], (0.0, 1.0)),
    ],
)
def test_outliers_do_not_take_all_colours(values, limits):
    assert colour_limits(values) == limits


def test_a_clipped_heat_map_says_so(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    body = """
    if prompt == 1:
        log(step=9, eval_response_loss=900.0)
        sys.exit()
    """
    made_up(tmp_path, body, prompts="0,0.2,0.4,0.6,0.8,1")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    report(tmp_path / "runs", ["eval_response_loss"])
    (axis,) = [axis for axis in figures[0].axes if axis.get_title()]
    assert axis.get_title().endswith("\ncolours clipped to 1.100 … 1.260; 1 cell lies beyond")
    (image,) = axis.images
    assert image.get_clim() == pytest.approx((1.1, 1.26))
    assert image.colorbar.extend == "max"
    assert "900.0" in [text.get_text() for text in axis.texts]


@pytest.mark.parametrize(
    ("value", "text"), [(4.3154, "4.315"), (0.05, "0.05000"), (123.456, "123.5"), (1e-5, "1e-05"), (0.0, "0")]
)
def test_values_have_four_digits(value, text):
    assert format_value(value) == text


# --- real runs --------------------------------------------------------------------------------------------------------

REAL = {"max_steps": 300, "save_steps": 20, "eval_strategy": "steps", "eval_steps": 100, "logging_steps": 50}
GRID = ["--prompt-weight", "0.2,1", "--response-weight", "1"]


def test_a_dry_run_runs_nothing(tmp_path):
    workplace(tmp_path, evaluation=True, **REAL)
    done = run("sweep", "sft.yaml", *GRID, "--output", "runs", "--set", "seed=3", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()
    assert "-m wit_trl sft --config sft.yaml --seed=3 --prompt_weight=0.2 --response_weight=1.0" in done.stdout
    assert "# 2 of 2 cells would be run" in done.stdout


def test_a_run_that_is_not_evaluated_is_refused_early(tmp_path, capsys):
    path = workplace(tmp_path)
    code, out, _ = wit("sweep", path, *GRID, "--output", tmp_path / "runs", capsys=capsys)
    assert code == 2
    assert "eval_strategy is not set" in out
    assert not (tmp_path / "runs").exists()


def test_a_sweep_that_is_killed_goes_on(tmp_path):
    """kill -9 in the middle of the second cell; what comes out is what an undisturbed run gives."""
    workplace(tmp_path, evaluation=True, **REAL)
    args = ["sweep", "sft.yaml", *GRID, "--output", "runs"]
    first, second = tmp_path / "runs" / "p0.2_r1", tmp_path / "runs" / "p1_r1"
    process = start(*args, cwd=tmp_path)
    try:
        wait_for((second / "model" / "checkpoint-40" / "trainer_state.json").exists, process)
    finally:
        process.kill()
        process.communicate()
    assert read_json(first / "cell.json")["status"] == "finished"
    assert read_json(second / "cell.json")["status"] == "running"
    finished = (first / "cell.json").read_text()

    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + (second / "log.txt").read_text()[-3000:]
    assert "1 of 2 cells are finished already" in done.stderr
    assert "(1, 1): goes on from checkpoint-" in done.stderr
    assert (first / "cell.json").read_text() == finished
    state = read_json(second / "cell.json")
    assert (state["status"], state["attempts"]) == ("finished", 2)

    undisturbed = run("sweep", "sft.yaml", "--prompt-weight", "1", *GRID[2:], "--output", "alone", cwd=tmp_path)
    assert undisturbed.returncode == 0
    expected = read_json(tmp_path / "alone" / "results.json")["cells"][0]["metrics"]
    (result,) = [cell for cell in read_json(tmp_path / "runs" / "results.json")["cells"] if cell["prompt_weight"] == 1]
    for name in ("eval_response_loss", "eval_prompt_loss", "lowest_eval_response_loss"):
        assert result["metrics"][name] == pytest.approx(expected[name], rel=1e-6)
    # And it is what the run itself says, in the framework's own file.
    history = read_json(second / "model" / "checkpoint-300" / "trainer_state.json")["log_history"]
    assert result["metrics"]["eval_response_loss"] == history[-1]["eval_response_loss"]
    assert history[-1]["step"] == 300
    assert Cell(Fraction(1), Fraction(1)).folder(tmp_path / "runs") == second


def test_a_run_whose_sweep_is_gone_ends(tmp_path):
    """Nobody waits for it, so it must not keep the device."""
    workplace(tmp_path, evaluation=True, **{**REAL, "max_steps": 100_000, "eval_steps": 100_000})
    process = start("sweep", "sft.yaml", *GRID, "--output", "runs", cwd=tmp_path)
    folder = tmp_path / "runs" / "p0.2_r1"
    wait_for((folder / "progress.json").exists, process)
    process.kill()
    process.communicate()
    wait_for(lambda: processes_of(folder) == [])  # it ends after 100,000 steps at the latest
    assert "the sweep that started this run is gone" in (folder / "log.txt").read_text()
