"""The TRL command in a process of its own."""

import json
import subprocess
import sys

from trlkit import LEARNING_RATE

ARGS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": LEARNING_RATE,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "max_length": 64,
}
# `--multi_gpu` is accelerate's name for torchrun; on a machine without a GPU the two processes use gloo.
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2"]


def run(workplace, *args):
    return subprocess.run(
        [sys.executable, "-m", "wit_trl", *args], capture_output=True, text=True, cwd=workplace, timeout=600
    )


def first_loss(workplace):
    state = json.loads((workplace / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    return state["log_history"][0]["loss"]
