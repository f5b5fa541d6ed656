"""A search whose references are there already, so that a single real run shows how a framework ends what is stopped."""

import json
from pathlib import Path

STEPS, EVERY = 1200, 200  # so many that the run is far from its end, however late the search looks at it


def finished_references(runs: Path) -> None:
    """As workers leave them that die before they could tell the study: unbeatable at every evaluation."""
    for name in ("p0_r1", "p0.2_r0.8", "p1_r1"):
        (runs / name).mkdir(parents=True)
        (runs / name / "cell.json").write_text(json.dumps({"status": "finished"}))
        (runs / name / "progress.json").write_text(json.dumps({"step": STEPS, "max_steps": STEPS}))
        entries = [{"step": step, "eval_response_loss": 0.001} for step in range(EVERY, STEPS + 1, EVERY)]
        (runs / name / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def stopped_run(runs: Path) -> tuple[int, str]:
    """The steps and the log of the one run there was, which the search stopped: it ended as one that is done."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    cells = json.loads((runs / "results.json").read_text())["cells"]
    found = {cell["details"]["trial"]: cell for cell in cells}
    assert [cell["status"] for cell in cells] == ["finished"] * 3 + ["pruned"]
    steps = found["ratio-0.03"]["details"]["steps"]
    storage = JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    (trial,) = optuna.load_study(study_name="wit-sweep", storage=storage).get_trials(
        states=[optuna.trial.TrialState.PRUNED]
    )
    assert trial.user_attrs["key"] == "ratio-0.03"
    judged = trial.last_step
    assert EVERY <= judged <= steps < STEPS
    folder = runs / "ratio-0.03"
    assert (folder / "stop").exists()
    assert steps % (STEPS // 100) == 0  # where all ranks look
    assert json.loads((folder / "progress.json").read_text()) == {"step": steps, "max_steps": STEPS}
    assert json.loads((folder / "cell.json").read_text())["returncode"] == 0
    log = (folder / "log.txt").read_text()
    assert f"WIT done: {steps} steps" in log
    assert "Traceback" not in log
    assert json.loads((folder / "model" / "wit_config.json").read_text())["prompt_weight"] == 0.03
    assert list((folder / "model").glob("*.safetensors"))
    return steps, log
