"""Several workers on one sweep: nothing is lost, and nothing is run twice."""

import json
import multiprocessing
import os
import signal
from collections import Counter

import optuna
import pytest
from clikit import processes_of, read_json
from sweepkit import curve, lowest, order, searched, trials, wait_for, worker

from wit_plugins.cli.sweep import storage, study, workers
from wit_plugins.cli.sweep.storage import open_storage
from wit_plugins.cli.sweep.study import read_study
from wit_plugins.cli.sweep.workers import Workers

# One cell saves a checkpoint half-way, says so, and stays there until it is gone on with.
CHECKPOINT = """
if prompt == 0.2 and not resume:
    (output / "checkpoint-5").mkdir()
    (output / "checkpoint-5" / "scheduler.pt").touch()
    (output / "checkpoint-5" / "trainer_state.json").write_text("{}")
    log(step=5, eval_response_loss=9.0)
    (folder / "progress.json").write_text(json.dumps({"step": 5, "max_steps": 10}))
    time.sleep(3600)
"""
BODY = curve(before=CHECKPOINT, between="pass")


def ended(process):
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"])
def test_each_trial_is_taken_by_one_worker(tmp_path, url):
    """Three of them, started at the same moment on nothing: on a journal and on a database."""
    url = url and url.format(tmp_path)
    body = curve(between="time.sleep(0.05)")
    seeds = 1 if url else 2
    started = [worker(tmp_path, body, trials=7, pruner="none", seeds=seeds, storage=url) for _ in range(3)]
    for process in started:
        ended(process)
    runs = Counter(name for name, *_ in order(tmp_path))
    found = trials(tmp_path, url)
    assert set(runs) == set(found)
    assert set(runs.values()) == {1}
    assert sum("repeats" not in trial.user_attrs for trial in found.values()) == 7
    assert sum("repeats" in trial.user_attrs for trial in found.values()) == 5 * (seeds - 1)
    assert {trial.state.name for trial in found.values()} == {"COMPLETE"}
    assert len({trial.user_attrs["worker"] for trial in found.values()}) > 1
    assert "7 cells" in read_json(tmp_path / "runs" / "results.json")["cost"]


def take_all(output, url, together, taken):
    mine = optuna.load_study(study_name="s", storage=open_storage(output, url))
    together.wait()
    numbers = []
    while any(trial.state.name == "WAITING" for trial in mine.get_trials(deepcopy=False)):
        numbers.append(mine.ask().number)
    taken.put(numbers)


def test_a_trial_in_sqlite_is_taken_once(tmp_path):
    """Four processes ask for forty trials as fast as they can. As Optuna opens the file, some are taken twice."""
    url, processes = f"sqlite:///{tmp_path}/study.db", multiprocessing.get_context("spawn")
    queued = optuna.create_study(study_name="s", storage=open_storage(tmp_path, url))
    for value in range(40):
        queued.enqueue_trial({"x": value})
    together, taken = processes.Barrier(4), processes.Queue()
    started = [processes.Process(target=take_all, args=(tmp_path, url, together, taken)) for _ in range(4)]
    for process in started:
        process.start()
    numbers = [number for _ in started for number in taken.get()]
    for process in started:
        process.join()
    # Who asks when none is left gets a new one: what counts is that each of the forty is taken, and none twice.
    assert len(numbers) == len(set(numbers))
    assert set(range(40)) <= set(numbers)


# A database's worker is dead after two minutes of silence; here after fifteen seconds.
IMPATIENT = """
from wit_plugins.cli.sweep import runner, storage
storage.BEAT = runner.BEAT = 1
storage.GRACE = 15
"""


def killed_and_finished(tmp_path, url, body, killed, meanwhile, **options):
    """SIGKILL in the middle of a run: another worker goes on from its checkpoint, and runs the rest once.

    Args:
        killed: the key of the trial in which the first worker is killed.
        meanwhile: the key of one that the other worker is about by then.

    Returns:
        What the other worker said, and the trials.
    """
    url = url and url.format(tmp_path)
    options = {"storage": url, "before": IMPATIENT, **options}
    stopped = tmp_path / "runs" / killed
    first = worker(tmp_path, body, **options)
    wait_for((stopped / "progress.json").exists, first)
    second = worker(tmp_path, body, **options)
    wait_for(lambda: any(name == meanwhile for name, *_ in order(tmp_path)), second)
    first.kill()
    first.communicate()
    said = ended(second)
    found = trials(tmp_path, url)
    assert Counter(name for name, *_ in order(tmp_path)) == {**dict.fromkeys(found, 1), killed: 2}
    assert [resume for name, resume, *_ in order(tmp_path) if name == killed][1].endswith("checkpoint-5")
    assert {trial.state.name for trial in found.values()} == {"COMPLETE"}
    assert processes_of(stopped) == []  # what the killed worker had left running
    return said, found


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"])
def test_a_killed_worker_s_trial_is_finished_by_another_one(tmp_path, url):
    search = {"trials": 7, "pruner": "none"}
    said, found = killed_and_finished(tmp_path, url, BODY, "p0.2_r0.8", "p1_r1", **search)
    assert "p0.2_r0.8 (0.2, 0.8): goes on from checkpoint-5" in said
    assert len(found) == 7
    assert found["p0.2_r0.8"].value == pytest.approx(lowest(0.25))
    assert found["p0.2_r0.8"].user_attrs["attempt"] == 2


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"])
def test_two_workers_share_a_grid_and_one_of_them_is_killed(tmp_path, url):
    grid = {"prompts": "0,0.2,0.4,0.6,1", "responses": "1", "call": "made_up"}
    said, found = killed_and_finished(tmp_path, url, CHECKPOINT, "p0.2_r1", "p0.4_r1", **grid)
    assert "1 of 5 cells are finished already" in said
    assert "(0.2, 1): goes on from checkpoint-5" in said
    assert list(found) == ["p0_r1", "p0.2_r1", "p0.4_r1", "p0.6_r1", "p1_r1"]
    for trial in found.values():
        assert trial.value == pytest.approx((trial.params["prompt_weight"] - 0.4) ** 2 + 1.1)
    assert "1.100 *" in said


def test_an_interrupted_search_goes_on(tmp_path):
    """SIGTERM; its run is stopped, and the same command goes on from the checkpoint."""
    folder = tmp_path / "runs" / "p0.2_r0.8"
    process = worker(tmp_path, BODY, trials=4)
    wait_for((folder / "progress.json").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert processes_of(folder) == []
    assert trials(tmp_path)["p0.2_r0.8"].state.name == "FAIL"  # given up, without a reason of its own
    assert searched(tmp_path, BODY, trials=4) == 0
    assert [resume for name, resume, *_ in order(tmp_path) if name == "p0.2_r0.8"][1].endswith("checkpoint-5")
    assert Counter(name for name, *_ in order(tmp_path))["p0_r1"] == 1
    assert {trial.state.name for trial in trials(tmp_path).values()} == {"COMPLETE"}


def test_a_worker_that_died_between_its_run_and_its_word(tmp_path):
    """The run is finished, the study does not know it: it is told, and nothing is run again."""
    assert searched(tmp_path, BODY.replace("prompt == 0.2", "False"), trials=3) == 0
    journal = tmp_path / "runs" / "study.journal"
    lines = journal.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["op_code"] == 6)  # the last trial's end
    journal.write_text("".join(lines[:last]))
    assert trials(tmp_path)["p1_r1"].state.name == "RUNNING"
    assert searched(tmp_path, "raise SystemExit('run again')", trials=3) == 0
    assert len(order(tmp_path)) == 3
    assert trials(tmp_path)["p1_r1"].value == pytest.approx(lowest(1))


def test_a_database_s_trial_comes_back_when_its_worker_is_silent(tmp_path, monkeypatch):
    """By Optuna's heartbeats; the one that was silent may not speak of it any more."""
    from optuna.exceptions import UpdateFinishedTrialError

    monkeypatch.setattr(storage, "BEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 1)
    (tmp_path / "runs").mkdir()
    record = {"framework": "x", "settings": {}, "space": [], "metric": "loss", "direction": "min"}
    arguments = tmp_path / "runs", f"sqlite:///{tmp_path}/study.db", record, [({}, {"key": "p0_r1"})], 1
    silent, other = study.SharedStudy(*arguments), study.SharedStudy(*arguments)
    taken, came_back = silent.take(), []
    assert study.key_of(taken) == "p0_r1"
    wait_for(lambda: came_back.append(other.take()) or came_back[-1])
    assert study.key_of(came_back[-1]) == "p0_r1"
    assert not silent.is_mine(taken)
    with pytest.raises(UpdateFinishedTrialError):
        taken.report(1.0, 1)
    assert other.take() is None


def test_a_worker_on_another_machine_is_dead_when_it_stood_still(tmp_path, monkeypatch):
    """By the observer's own clock; on this machine the lock says it at once."""
    now = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    here, beside = Workers(tmp_path), Workers(tmp_path)
    assert not here.is_dead(here.name)
    assert not here.is_dead(beside.name)
    monkeypatch.setattr(workers, "_boot", lambda: "another-kernel")
    there = Workers(tmp_path)
    for _ in range(5):
        now[0] += 100
        os.utime(there._path, (now[0], now[0]))
        assert not here.is_dead(there.name)
    now[0] += 100
    assert not here.is_dead(there.name)
    now[0] += 100
    assert here.is_dead(there.name)
    beside._file.close()  # as the system does when a process is killed
    assert here.is_dead(beside.name)
    there.close()
    assert here.is_dead(there.name)


def test_a_line_that_was_cut_off_costs_itself(tmp_path):
    """A full disk, a writer killed in the middle: the next one that writes takes the half line away."""
    assert searched(tmp_path, trials=3) == 0
    journal = tmp_path / "runs" / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker_')
    assert len(read_study(tmp_path / "runs", None)[1]) == 3
    assert searched(tmp_path, trials=4) == 0
    assert journal.read_bytes().startswith(whole)
    assert [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(trials(tmp_path)) == 4


def test_a_full_disk_stops_a_search_and_loses_nothing(tmp_path):
    """In a process whose files cannot grow beyond what the journal has: one line, and it goes on with room again."""
    assert searched(tmp_path, trials=3) == 0
    size = (tmp_path / "runs" / "study.journal").stat().st_size + 700
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
    process = worker(tmp_path, curve(between="pass"), before=limit, trials=6)
    output = process.communicate()[0].decode()
    assert process.returncode == 1
    assert "make room and start the same command again" in output.splitlines()[-1]
    before = Counter(name for name, *_ in order(tmp_path))
    assert searched(tmp_path, curve(between="pass"), trials=6, pruner="none") == 0
    found = trials(tmp_path)
    assert len(found) == 6
    assert {trial.state.name for trial in found.values()} == {"COMPLETE"}
    after = Counter(name for name, *_ in order(tmp_path))
    assert all(after[name] == count for name, count in before.items() if name in ("p0_r1", "p0.2_r0.8", "p1_r1"))


def test_a_database_is_named_without_its_password(tmp_path):
    from wit_plugins import WITConfigError

    with pytest.raises(WITConfigError, match=r"--storage = postgresql\+nodriver://me:…@host/x") as error:
        open_storage(tmp_path, "postgresql+nodriver://me:secret@host/x")
    assert "secret" not in str(error.value)


def test_a_worker_that_joins_does_not_run_failed_cells_again(tmp_path):
    """The first one's sweep is still going on; started again when nobody is at it, the failed cell is run again."""
    body = """
    if prompt == 0:
        sys.exit("boom")
    while not (folder.parent / "go").exists():
        time.sleep(0.02)
    """
    arguments = {"prompts": "0,0.4", "responses": "1", "call": "made_up"}
    first = worker(tmp_path, body, **arguments)
    wait_for((tmp_path / "runs" / "p0.4_r1" / "log.txt").exists, first)
    joined = [worker(tmp_path, body, **arguments) for _ in range(2)]
    for process in joined:
        while b"cells are finished already" not in (line := process.stdout.readline()):
            assert line, process.communicate()
    (tmp_path / "runs" / "go").touch()
    for process in (first, *joined):
        process.communicate()
        assert process.returncode == 1
    assert Counter(name for name, *_ in order(tmp_path)) == {"p0_r1": 1, "p0.4_r1": 1}
    assert ended(worker(tmp_path, "", **arguments))
    assert Counter(name for name, *_ in order(tmp_path)) == {"p0_r1": 2, "p0.4_r1": 1}


def test_of_workers_that_start_together_the_first_runs_failed_cells_again(tmp_path, monkeypatch):
    """A worker that died, here or elsewhere, is none that is joined."""
    first, second = Workers(tmp_path), Workers(tmp_path)
    assert (first.joined(), second.joined()) == (False, True)
    first._file.close()  # killed: its file stays, without its lock
    assert not second.joined()
    monkeypatch.setattr(workers, "_boot", lambda: "another-kernel")
    third = Workers(tmp_path)
    assert third.joined()
    old = third._path.stat().st_mtime - workers.GRACE - 1
    for other in (first, second):
        os.utime(other._path, (old, old))
    assert not third.joined()
