"""A run that is asked to stop ends as one that is done, on all its ranks at once."""

import json
import subprocess
import sys

from clikit import read_json, run, workplace
from support import subprocess_env

SCRIPT = """
import pathlib, sys, time
from transformers import TrainerCallback
from trlkit import dataset, sft_trainer
from wit_trl import WITCallback
folder = pathlib.Path(sys.argv[1])

class Stop(TrainerCallback):  # the other rank has looked long before, and seen nothing
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8 and args.process_index == 1:
            time.sleep(1)
            (folder / "stop").touch()

more = {"max_steps": 400, "per_device_train_batch_size": 2, "save_strategy": "no"}
trainer = sft_trainer(folder / "model", **more)
trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
trainer.add_callback(Stop())
trainer.train()
trainer.save_model(folder / "model")
(folder / f"rank-{trainer.args.process_index}").write_text(str(trainer.state.global_step))
"""


def test_all_ranks_stop_at_the_same_step(tmp_path):
    """They look every fourth of 400 steps: asked in step 8, they end with it, and the run ends as usual."""
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    env = subprocess_env(WIT_RUN_FOLDER=str(tmp_path))
    done = subprocess.run([*command, str(tmp_path)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["8", "8"]
    assert json.loads((tmp_path / "progress.json").read_text()) == {"step": 8, "max_steps": 400}
    assert (tmp_path / "model" / "wit_config.json").is_file()


def test_a_real_search_stops_a_run_that_cannot_win(tmp_path):
    """TRL's own runs. What is searched is the highest loss on prompts, which is that of (0, 1) from the start.

    By halving, which looks at the value of the step: the others look at the best one so far, and this metric falls.
    """
    steps = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 5, "logging_steps": 60, "save_strategy": "no"}
    workplace(tmp_path, evaluation=True, **steps)
    args = ["--trials", "4", "--metric", "eval_prompt_loss:max", "--pruner", "halving", "--no-check"]
    done = run("sweep", "sft.yaml", *args, "--output", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {cell["details"]["trial"]: cell for cell in read_json(tmp_path / "runs" / "results.json")["cells"]}
    states = [(name, cell["status"]) for name, cell in found.items()]
    assert states == [*((name, "finished") for name in ("p0_r1", "p0.2_r0.8", "p1_r1")), ("ratio-0.03", "pruned")]
    assert found["p0_r1"]["details"]["steps"] == 60
    assert found["ratio-0.03"]["details"]["steps"] < 60
    log = (tmp_path / "runs" / "ratio-0.03" / "log.txt").read_text()
    assert f"WIT done: {found['ratio-0.03']['details']['steps']} steps" in log  # as a run that is done says it
    assert (tmp_path / "runs" / "ratio-0.03" / "model" / "wit_config.json").is_file()
    assert max(found.values(), key=lambda cell: cell["metrics"]["eval_prompt_loss"]) is found["p0_r1"]
