"""Configurations as users have them, and the command run on them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from support import llama, subprocess_env
from trlkit import dataset, tokenizer

from wit_plugins.cli import main

CONFIG: dict[str, Any] = {
    "prompt_weight": 0.2,
    "response_weight": 0.8,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_length": 64,
}


def workplace(folder: Path, data: Dataset | str = "conversational", evaluation: bool = False, **changes: Any) -> Path:
    """A model, a dataset and a configuration in a folder; returns the configuration's path. `None` takes a key out."""
    llama(vocab_size=64).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = dataset(data) if isinstance(data, str) else data
    rows.to_json(str(folder / "data" / "train.jsonl"))
    if evaluation:
        rows.to_json(str(folder / "data" / "test.jsonl"))
    config = {**CONFIG, "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def wit(*args: Any, capsys: Any) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(*args: Any, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "wit_plugins.cli", *map(str, args)],
        cwd=cwd,
        env=subprocess_env(COLUMNS="100"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*args: Any, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, until it ends, however busy the machine is."""
    process = start(*args, cwd=cwd)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def table_row(text: str, name: str) -> list[str]:
    """The cells of a printed table's row."""
    split = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith(name)]
    (row,) = [cells for cells in split if cells[0] == name and len(cells) == 5]
    return row


def count(text: str) -> int:
    return int(text.replace(",", "").split()[0])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def processes_of(folder: Path) -> list[int]:
    """The processes that were started for a run's folder."""
    mark = f"WIT_RUN_FOLDER={folder.resolve()}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
