"""Running the cells: side by side, interrupted, failing, killed, gone on with."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from clikit import processes_of, read_json, run, start, wit, workplace
from support import subprocess_env
from sweepkit import GRID, REAL, collect, contents, grid, made_up, order, short, trials, wait_for

from wit_plugins import WITConfigError
from wit_plugins.cli.sweep.folders import last_checkpoint, log_reason, log_tail
from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.runs import CellProcess
from wit_plugins.runfiles import MetricsReader, is_running, read_metrics


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
    trial = trials(tmp_path)["p0.4_r1"]
    error = trial.user_attrs["result"]["error"]
    assert (trial.state.name, len(error), error[-1]) == ("FAIL", 20, "boom: \x1b[2J no memory")
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
        f"from sweepkit import made_up; import pathlib\nmade_up(pathlib.Path({str(tmp_path)!r}), {body!r}, '0')\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env=subprocess_env())
    folder = tmp_path / "runs" / "p0_r1"
    wait_for((folder / "progress.json").exists, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert processes_of(folder) == []
    assert [result.status for result in collect(tmp_path / "runs")] == ["interrupted"]
    assert made_up(tmp_path, body, "0") == 0
    assert order(tmp_path)[-1][1].endswith("checkpoint-2")
    # What was logged after the checkpoint is logged again, and not counted twice.
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2, 3, 4]


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


@pytest.mark.parametrize("devices", ["gpu", ",,", "", "0,0", "0,1+0", "0+", "-1", "0;1", "99999", "0 1"])
def test_devices_that_are_none(tmp_path, capsys, devices):
    args = [f"--devices={devices}", "--output", tmp_path / "runs"]
    code, _, err = wit("sweep", workplace(tmp_path, eval_strategy="epoch"), *GRID, *args, capsys=capsys)
    assert code == 2
    assert f"--devices = {devices!r}" in err
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there(tmp_path, monkeypatch, capsys):
    """On a machine of two GPUs, whatever this process may see of them."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: H (UUID: GPU-1)'; echo 'GPU 1: H (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path = workplace(tmp_path, evaluation=True, eval_strategy="epoch")
    for devices, code in (("99", 2), ("0,2", 2), ("0+2", 2), ("0,1", 0), ("GPU-2", 0)):
        args = [f"--devices={devices}", "--output", tmp_path / "runs", "--dry-run"]
        got, out, err = wit("sweep", path, *GRID, *args, capsys=capsys)
        assert got == code, out + err
        assert ("which is not there; this machine has 2, with the numbers 0 to 1" in err) == bool(code)


def test_a_process_that_has_ended_and_waits_for_its_parent_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: " Z " in Path(f"/proc/{process.pid}/stat").read_text())
    assert not is_running(process.pid)
    process.wait()
    assert not is_running(process.pid)
    assert is_running(os.getpid())
    assert is_running(1)


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", "9" * 5000], ids=short)
def test_jobs_that_are_none(capsys, jobs):
    with pytest.raises(SystemExit):
        wit("sweep", "x.yaml", *GRID, "--output", "runs", f"--jobs={jobs}", capsys=capsys)
    err = capsys.readouterr().err
    assert "is not a whole number from 1 on" in err
    assert "_positive" not in err


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
        run = CellProcess(grid("0", "1")[0], None, 0, None, None, bars.add_task("cell"), 0.0, MetricsReader(path))
        before = bytes_read()
        for step in range(50):
            run.show(bars, tmp_path)
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


def test_a_sweep_checks_once_before_it_starts(tmp_path, capfd):
    """Evaluation without a test split: every cell would fail."""
    path = workplace(tmp_path, **REAL)
    runs = tmp_path / "runs"
    code, out, err = wit("sweep", path, *GRID, "--output", runs, capsys=capfd)
    assert code == 2, out + err
    assert "nothing was started" in out
    assert "problem" in out.split("nothing was started")[0]
    assert list(runs.iterdir()) == []  # so that the mended configuration may have the folder


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


def test_a_dry_run_runs_nothing(tmp_path):
    workplace(tmp_path, evaluation=True, **REAL)
    done = run("sweep", "sft.yaml", *GRID, "--output", "runs", "--set", "seed=3", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")  # nor does what frameworks say when they are imported stand there
    assert not (tmp_path / "runs").exists()
    assert f"-m wit_trl sft --config {tmp_path}/runs/p0.2_r1/config.yaml\n" in done.stdout
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
    assert [trial.state.name for trial in trials(tmp_path).values()] == ["COMPLETE", "RUNNING"]
    finished = contents(first)

    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + (second / "log.txt").read_text()[-3000:]
    assert "1 of 2 cells are finished already" in done.stderr
    assert "(1, 1): goes on from checkpoint-" in done.stderr
    assert contents(first) == finished
    trial = trials(tmp_path)["p1_r1"]
    assert (trial.state.name, trial.user_attrs["attempt"]) == ("COMPLETE", 2)

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
