"""`wit sweep` and `wit report`: real runs of TRL, one of them killed; and runs that do what is hard to bring about."""

import csv
import json
import os
import signal
import struct
import sys
import textwrap
import time
from fractions import Fraction

import pytest
from clikit import processes_of, read_json, run, start, wit, workplace

from wit_plugins import WITConfigError
from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.command import SweepOptions, last_checkpoint, log_tail, report, sweep
from wit_plugins.cli.sweep.grid import Cell, cells, one_per_ratio, parse_weights, ratio_note, same_ratio
from wit_plugins.cli.sweep.results import choose_metrics, collect, format_value, numbers

# --- the grid ---------------------------------------------------------------------------------------------------------


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
    from wit_plugins.cli import sweep as module

    monkeypatch.setattr(module, "can_draw", lambda: False)
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
    assert "failed (exit code 3): boom: ␛[2J no memory" in captured.err
    assert "boom: ␛[2J no memory" in captured.out
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
    until = time.time() + 20
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
        time.sleep(60)
    """
    script.write_text(
        f"import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r}); import conftest\n"
        f"from test_cli_sweep import made_up; import pathlib\nmade_up(pathlib.Path({str(tmp_path)!r}), {body!r}, '0')\n"
    )
    import subprocess

    from support import subprocess_env

    process = subprocess.Popen([sys.executable, str(script)], env=subprocess_env())
    folder = tmp_path / "runs" / "p0_r1"
    wait_for(lambda: (folder / "progress.json").exists())
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert processes_of(folder) == []
    assert read_json(folder / "cell.json")["status"] == "interrupted"
    assert made_up(tmp_path, body, "0") == 0
    assert order(tmp_path)[-1][1].endswith("checkpoint-2")
    # What was logged after the checkpoint is logged again, and not counted twice.
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2, 3, 4]


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
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
    chosen = dict(choose_metrics(collect(tmp_path / "runs"), []))
    assert (chosen["arc_easy/acc"], chosen["wikitext/word_perplexity"]) == ("max", "min")


def test_the_evaluation_knows_model_and_weights_and_is_run_again_if_it_failed(tmp_path, capsys):
    failing = "echo no luck >&2; exit 4"
    assert made_up(tmp_path, prompts="0.4", eval_command=failing) == 1
    assert "its evaluation failed" in capsys.readouterr().out
    assert collect(tmp_path / "runs")[0].error[-1] == "no luck"
    good = """python3 -c 'import json, sys; print(json.dumps({"n": len(sys.argv[1]), "p": float(sys.argv[2])}))' """
    good = good.replace("python3", sys.executable) + "{model} {prompt_weight}"
    assert made_up(tmp_path, prompts="0.4", eval_command=good) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert (metrics["n"], metrics["p"]) == (len(str(tmp_path / "runs" / "p0.4_r1" / "model")), 0.4)
    assert len(order(tmp_path)) == 1  # the training was not run again


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
        wait_for(lambda: (second / "model" / "checkpoint-40" / "trainer_state.json").exists())
    finally:
        process.kill()
        process.communicate(timeout=30)
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
    wait_for(lambda: (folder / "progress.json").exists())
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: processes_of(folder) == [], 60)
    assert "the sweep that started this run is gone" in (folder / "log.txt").read_text()
