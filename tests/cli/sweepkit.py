"""Sweeps at a tiny size: made-up runs that take no time, and real ones."""

import sys
import textwrap
import time

from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.command import sweep
from wit_plugins.cli.sweep.grid import cells, parse_weights
from wit_plugins.cli.sweep.options import SweepOptions


def short(value):
    """A test's id; the whole value could be longer than an environment variable may be."""
    return str(value)[:20]


def grid(prompts, responses):
    return cells(parse_weights(prompts, "p"), parse_weights(responses, "r"))


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
    options = {"check": False, **options}  # there is no data to look at
    return sweep(MadeUp(body), job, grid(prompts, responses), SweepOptions(tmp_path / "runs", **options))


def order(tmp_path):
    return [line.split(" ") for line in (tmp_path / "runs" / "order.txt").read_text().splitlines()]


def wait_for(condition, process=None):
    """As long as it takes: a limit of seconds is one that a busy machine breaks. The process must not end before."""
    while not condition():
        assert process is None or process.poll() is None or condition(), "it ended before that"
        time.sleep(0.05)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REAL = {"max_steps": 300, "save_steps": 20, "eval_strategy": "steps", "eval_steps": 100, "logging_steps": 50}


GRID = ["--prompt-weight", "0.2,1", "--response-weight", "1"]
