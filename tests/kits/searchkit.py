"""A search whose references are there already, so that a single real run shows how a framework ends what is stopped."""

import json
from pathlib import Path

STEPS, EVERY = 1200, 200  # so many that the run is far from its end, however late the search looks at it


def storage(runs: Path):
    """The study's, as Optuna itself opens it."""
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    return JournalStorage(JournalFileBackend(str(runs / "study.journal")))


def finished_references(runs: Path) -> None:
    """As another worker has told of them: unbeatable at every evaluation."""
    import optuna

    runs.mkdir()
    study = optuna.create_study(study_name="wit-sweep", storage=storage(runs))
    for name, weights in (("p0_r1", ["0", "1"]), ("p0.2_r0.8", ["0.2", "0.8"]), ("p1_r1", ["1", "1"])):
        values = dict.fromkeys(range(EVERY, STEPS + 1, EVERY), 0.001)
        told = {"status": "finished", "metrics": {"eval_response_loss": 0.001}, "step": STEPS, "max_steps": STEPS}
        notes = {"key": name, "reference": True, "weights": weights, "result": told}
        study.add_trial(optuna.create_trial(value=0.001, intermediate_values=values, user_attrs=notes))


def stopped_run(runs: Path) -> tuple[int, str]:
    """The steps and the log of the one run there was, which the search stopped: it ended as one that is done."""
    import optuna

    cells = json.loads((runs / "results.json").read_text())["cells"]
    found = {cell["details"]["trial"]: cell for cell in cells}
    assert [cell["status"] for cell in cells] == ["finished"] * 3 + ["pruned"]
    steps = found["ratio-0.03"]["details"]["steps"]
    study = optuna.load_study(study_name="wit-sweep", storage=storage(runs))
    (trial,) = study.get_trials(states=[optuna.trial.TrialState.PRUNED])
    assert trial.user_attrs["key"] == "ratio-0.03"
    judged = trial.last_step
    assert EVERY <= judged <= steps < STEPS
    folder = runs / "ratio-0.03"
    assert (folder / "stop").exists()
    assert steps % (STEPS // 100) == 0  # where all ranks look
    assert json.loads((folder / "progress.json").read_text()) == {"step": steps, "max_steps": STEPS}
    log = (folder / "log.txt").read_text()
    assert f"WIT done: {steps} steps" in log
    assert "Traceback" not in log
    assert json.loads((folder / "model" / "wit_config.json").read_text())["prompt_weight"] == 0.03
    assert list((folder / "model").glob("*.safetensors"))
    return steps, log
