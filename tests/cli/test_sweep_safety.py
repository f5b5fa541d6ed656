"""Nothing is lost: models without records, damaged files, diverged cells, full disks."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from clikit import read_json, run, wit, workplace
from support import subprocess_env
from sweepkit import GRID, RECORD, collect, contents, finished, grid, made_up, order, short, study_of, trials

from wit_plugins import WITConfigError
from wit_plugins.cli.sweep.report import report
from wit_plugins.runfiles import write_json


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
    made_up(tmp_path, "sys.exit(1)", prompts="1")
    (tmp_path / "runs" / "p0.4_r1").symlink_to(real)
    made_up(tmp_path, prompts="0.4,1")
    assert contents(real) == {Path("model.safetensors"): b"mine"}
    assert (tmp_path / "runs" / "p0.4_r1.old-1").is_symlink()
    assert not (tmp_path / "runs" / "p1_r1.old-1").exists()  # which is its own


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
    assert trials(tmp_path)["p0.4_r1"].state.name == "PRUNED"  # it has no value, so it cannot be complete
    assert [result.status for result in collect(runs)] == ["finished", "diverged", "finished"]
    assert collect(runs)[1].metrics["lowest_eval_response_loss"] == 1.5
    lines = [line for line in captured.out.splitlines() if line.startswith("(")]
    assert lines[-1].split()[:4] == ["(0.4,", "1)", "0.4", "diverged"]
    written = json.loads((runs / "results.json").read_text(), parse_constant=pytest.fail)  # nan is not JSON
    assert written["best"]["eval_prompt_loss"]["prompt_weight"] == 1.0
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
    """The other lines of the file count; the file of how far the run is may hold the same."""
    data = (damage if isinstance(damage, bytes) else damage.encode()) + b"\n"
    (tmp_path / "damage").write_bytes(data)
    body = """
    if prompt == 0.4:
        data = (folder.parent.parent / "damage").read_bytes()
        for name in ("metrics.jsonl", "progress.json"):
            (folder / name).write_bytes(data)
    """
    assert made_up(tmp_path, body) == 0
    after = collect(tmp_path / "runs")
    assert [result.metrics["eval_response_loss"] for result in after] == pytest.approx([1.26, 1.1, 1.46])
    captured = capsys.readouterr()
    assert "\x1b[2J" not in captured.out + captured.err
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"op_code": 4}', '{"op_code": 99, "worker_id": "x"}', "\0" * 9])
def test_a_damaged_study_is_refused_with_the_way_out(tmp_path, capsys, damage):
    """A line in the middle of the journal; what is lost with it are words, and no models."""
    made_up(tmp_path, "(output / 'model.safetensors').write_text('weights')", prompts="0,1")
    runs = tmp_path / "runs"
    path = runs / "study.journal"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], damage, *lines[9:], ""]))
    before = contents(runs)
    for again in (lambda: report(runs), lambda: made_up(tmp_path, prompts="0,1")):
        with pytest.raises(WITConfigError, match=r"study.journal: is damaged .*Put a copy of that file back; or re"):
            again()
    assert contents(runs) == before
    path.rename(runs / "damaged")  # the second way out
    assert made_up(tmp_path, prompts="0,1") == 0
    assert (runs / "p0_r1.old-1" / "model" / "model.safetensors").read_text() == "weights"


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
from sweepkit import MadeUp, grid
from wit_plugins.cli.sweep.command import sweep
from wit_plugins.cli.sweep.grid import Grid
from wit_plugins.cli.sweep.arguments import SweepOptions
from wit_plugins.cli.sweep.report import report
from wit_plugins.cli.driver import Job
from wit_plugins.errors import WITConfigError
runs = pathlib.Path(sys.argv[1])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))  # every write beyond it fails, as on a full disk
if sys.argv[3] == "report":
    print("code", report(runs))
else:
    try:
        sweep(MadeUp(), Job(None, {"a": 1}), Grid(grid("0,1", "1")), SweepOptions(runs, check=False))
    except WITConfigError as error:
        print("refused:", error)
"""


@pytest.mark.parametrize("room", [0, 100, 700])
def test_a_full_disk(tmp_path, room):
    """In a process whose files cannot grow: one line that says what to do, and the state before it stays readable."""
    made_up(tmp_path, prompts="0")
    runs = tmp_path / "runs"
    before = contents(runs / "p0_r1")

    def limited(what):
        arguments = [sys.executable, "-c", FULL, str(runs), str(room), what]
        return subprocess.run(arguments, env=subprocess_env(), capture_output=True, text=True)

    done = limited("report")
    assert done.returncode == 0, done.stderr
    assert "1.260 *" in done.stdout  # the table comes first
    assert "code 1" in done.stdout
    assert "nothing could be written there (File too large)" in " ".join(done.stdout.split())
    done = limited("sweep")
    assert "refused: --output = " in done.stdout or (room and "failed: " in done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert contents(runs / "p0_r1") == before
    assert trials(tmp_path)["p0_r1"].state.name == "COMPLETE"
    assert not list(runs.rglob(".*.json.*"))
    assert made_up(tmp_path, prompts="0,1") == 0  # with room again, it goes on
    assert [result.status for result in collect(runs)] == ["finished", "finished"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


ESCAPE = "\x1b[2J"
FOREIGN = [
    {"key": "../victim"}, {"key": "/tmp/victim"}, {"key": ESCAPE}, {"key": 7}, {"key": "p0_r1/../../victim"},
    {"key": "p0_r1\n"}, {"weights": ["0"]}, {"weights": "01"}, {"weights": [0, 1]}, {"weights": ["nan", "1"]},
    {"weights": ["-1", "1"]}, {"weights": ["0", "0"]}, {"weights": ["1/0", "1"]}, {"weights": None},
    {"worker": "../../victim"}, {"seed": "x"}, {"attempt": [1]}, {"repeats": "../victim"}, {"seconds": "long"},
    {"reason": 3}, {"result": 3}, {"result": {"status": ESCAPE, "metrics": {}}}, {"result": {"status": "finished"}},
    {"result": {"status": "finished", "metrics": {"eval_response_loss": "low"}}},
    {"result": {"status": "finished", "metrics": {}, "error": 5}},
    {"result": {"status": "finished", "metrics": {}, "evaluation": {"metrics": [1]}}},
    {"result": {"status": "finished", "metrics": {}, "max_steps": 1e999}},
]  # fmt: skip


@pytest.mark.parametrize("notes", FOREIGN, ids=short)
@pytest.mark.parametrize("state", ["WAITING", "FAIL"])
def test_a_study_from_elsewhere_is_checked_when_it_is_read(tmp_path, capsys, notes, state):
    """What names folders and files, or ends in a traceback: one line, without its escape codes, and nothing is run."""
    import optuna

    runs = tmp_path / "place" / "runs"
    runs.parent.mkdir()
    whole = {"key": "p0_r1", "weights": ["0", "1"], **notes}
    study_of(runs, [{"state": optuna.trial.TrialState[state], "user_attrs": whole}])
    for command in ("report", "best"):
        code, out, err = wit(command, runs, capsys=capsys)
        assert code == 2, out
        assert len(err.splitlines()) == 1
        assert "`wit sweep` did not make it: trial 0 has " in err
        assert ESCAPE not in out + err
    with pytest.raises(WITConfigError, match="trial 0 has "):
        made_up(runs.parent, prompts="0")
    assert list(tmp_path.rglob("victim*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    assert not (runs / "order.txt").exists()


@pytest.mark.parametrize(
    "change", [{"direction": "up"}, {"direction": "max"}, {"settings": []}, {"metric": 3}, {"framework": None}, None]
)
def test_a_record_from_elsewhere_is_checked_when_it_is_read(tmp_path, capsys, change):
    study_of(tmp_path / "runs", [], 3 if change is None else {**RECORD, **change})
    for command in ("report", "best"):
        code, _, err = wit(command, tmp_path / "runs", capsys=capsys)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "`wit sweep` did not make it: it has " in err
    with pytest.raises(WITConfigError, match="it has "):
        made_up(tmp_path)


def test_a_parameter_from_elsewhere_does_nothing_to_the_terminal(tmp_path, capsys):
    import optuna

    choices = optuna.distributions.CategoricalDistribution([ESCAPE, "b"])
    (cell,) = grid("0", "1")
    trial = finished(cell, 1.0) | {"params": {f"a{ESCAPE}": ESCAPE}, "distributions": {f"a{ESCAPE}": choices}}
    study_of(tmp_path / "runs", [trial], {**RECORD, "space": [ESCAPE]})
    assert report(tmp_path / "runs") == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "a␛[2J=␛[2J" in captured.out


def test_two_cells_never_share_a_folder(tmp_path):
    """A link from one cell's folder to another's: the other's model is neither gone on from nor written over."""
    body = "(output / 'model.safetensors').write_text('weights')\n"
    assert made_up(tmp_path, body + "if prompt == 0.4: sys.exit(1)", prompts="0,0.4") == 1
    runs = tmp_path / "runs"
    before = contents(runs / "p0_r1")
    (runs / "p0.4_r1").rename(tmp_path / "elsewhere")
    (runs / "p0.4_r1").symlink_to(runs / "p0_r1")
    with pytest.raises(WITConfigError, match=r"p0.4_r1/model: is a link to .*p0_r1/model, where another cell"):
        made_up(tmp_path, body, prompts="0,0.4")
    assert contents(runs / "p0_r1") == before
    (runs / "p0.4_r1").unlink()
    (runs / "p0.4_r1").symlink_to(tmp_path / "elsewhere")  # on another disk, it is the cell's own
    assert made_up(tmp_path, body, prompts="0,0.4") == 0


def test_a_run_that_would_write_to_another_folder_than_its_cell_s_ends(tmp_path):
    """The framework itself, started as a sweep starts it, with an output_dir that was read as something else."""
    path = workplace(tmp_path, max_steps=2)
    command = [sys.executable, "-m", "wit_trl", "sft", "--config", str(path), f"--output_dir={tmp_path / 'runs'}"]
    env = subprocess_env(WIT_RUN_FOLDER=str(tmp_path / "cell"), WIT_RUN_OUTPUT=str(tmp_path / "runs #1"))
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "two cells could write to one folder" in done.stderr
    assert not (tmp_path / "runs" / "model.safetensors").exists()


def test_an_output_whose_name_is_yaml(tmp_path):
    """Each cell of the framework's own runs has a folder of its own, and `--set` arrives as it was said."""
    workplace(tmp_path, evaluation=True, eval_strategy="epoch", max_steps=2)
    args = ["--output", "runs #1", "--set", "run_name=a #1: {b}"]
    done = run("sweep", "sft.yaml", *GRID, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("p0.2_r1", "p1_r1"):
        assert (tmp_path / "runs #1" / name / "model" / "wit_config.json").is_file()
    assert not (tmp_path / "runs").exists()
