"""Axolotl's part of the table of hostile inputs (tests/kits/hostile.py).

Nobody between the plugin and the interpreter catches its errors, so the answer is what `sys.excepthook` prints; one
test looks at how the process ends.
"""

import logging
import subprocess
import sys

import pytest
import yaml
from axokit import axolotl
from hostile import MISSING, changed, check, rows
from support import subprocess_env


def write(place, row):
    block = changed({"prompt_weight": 0.2, "response_weight": 0.8}, row.weights) if row.block is None else row.block
    settings = {"plugins": ["wit_axolotl.WITPlugin"], **row.settings}
    path = place.config(**{**settings, "wit": None, "base_model": "/nowhere"})
    if block is not MISSING:
        values = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**values, "wit": block}))
    return path


@pytest.mark.parametrize("row", rows("axolotl"))
def test_row(row, place, monkeypatch, capfd):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # it logs to the first test's stderr, closed
    path = write(place, row)
    capfd.readouterr()
    code = 0
    try:
        axolotl("train", path, "--launcher", "python")
    except Exception:
        code = 1
        sys.excepthook(*sys.exc_info())
    check(row, code, *capfd.readouterr())
    assert not (path.parent / "out").exists()


def test_in_a_process_of_its_own(place):
    """What `accelerate launch` and torchrun start: the answer is the last line."""
    row = next(param.values[0] for param in rows("axolotl") if "letter exchanged" in param.values[0].name)
    command = [sys.executable, "-m", "axolotl.cli.train", str(write(place, row))]
    done = subprocess.run(command, env=subprocess_env(AXOLOTL_DO_NOT_TRACK="1"), capture_output=True, text=True)
    check(row, done.returncode, done.stdout, done.stderr)
