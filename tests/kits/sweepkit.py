"""Sweeps at a tiny size: made-up runs that take no time, and real ones."""

import json
import math
import subprocess
import sys
import textwrap
import time

from packaging.version import Version

from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.arguments import SweepOptions
from wit_plugins.cli.sweep.command import sweep
from wit_plugins.cli.sweep.grid import Grid, cells, parse_weights
from wit_plugins.cli.sweep.results import read_outcomes
from wit_plugins.foreign import Framework


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
resume, changes = sys.argv[4], json.loads(sys.argv[5])
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

    name = "madeup"
    framework = Framework("madeup", "pluggy", Version("0"), Version("99"))

    def __init__(self, body=""):
        self.script = RUN.replace("{body}", textwrap.dedent(body))

    def command(self, job, output, resume, port=None):
        more = [str(resume or ""), json.dumps(job.overrides)]
        weights = [str(job.weights[name]) for name in ("prompt_weight", "response_weight")]
        return [sys.executable, "-c", self.script, *weights, str(output), *more]


def made_up(tmp_path, body="", prompts="0,0.4,1", responses="1", values=None, driver=None, path=None, **options):
    job = Job(path, {"a": 1, **(values or {})})
    options = {"check": False, **options}  # there is no data to look at
    return sweep(
        driver or MadeUp(body), job, Grid(grid(prompts, responses)), SweepOptions(tmp_path / "runs", **options)
    )


def collect(runs):
    """The cells of a sweep's folder, as its report sees them."""
    return read_outcomes(runs)[1]


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


# Evaluated ten times on the way to a loss that is lowest at a ratio of 0.09; it ends when it is asked to.
CURVE = """
import math
place = math.log10(1 + 100 * prompt / response)
bottom = 1 + (place - 1.0) ** 2
for step in range(1, 11):
    if (folder / "stop").exists():
        break
    (folder / "progress.json").write_text(json.dumps({"step": step, "max_steps": 10}))
    log(step=step, eval_response_loss=bottom + (10 - step) / 10)
    {between}
sys.exit(0)
"""
# A cell that must lose is not faster than its sweep: from the first look on, it goes on when it was told to stop.
WAITS = "while prompt == 0.5 and step > 1 and not (folder / 'stop').exists(): time.sleep(0.02)"


def curve(between=WAITS, before=""):
    return textwrap.dedent(before) + CURVE.replace("{between}", between)


def lowest(ratio):
    """The last value of such a run."""
    return 1 + (math.log10(1 + 100 * ratio) - 1.0) ** 2


def searched(tmp_path, body=None, response=None, params=(), values=None, driver=None, **options):
    """A search over made-up runs."""
    from wit_plugins.cli.sweep.space import Space

    job = Job(None, {"a": 1, **(values or {})})
    options = {"check": False, "trials": 6, **options}
    made = driver or MadeUp(curve() if body is None else body)
    return sweep(made, job, Space.parse(response, params), SweepOptions(tmp_path / "runs", **options))


def worker(tmp_path, body, before="", call="searched", **options):
    """A process that takes part in such a search, or by `made_up` in a grid."""
    from support import subprocess_env  # with torch, which the worker itself does without

    code = f"sys.exit({call}(pathlib.Path({str(tmp_path)!r}), {body!r}, **{options!r}))"
    code = f"import pathlib, sys\nfrom sweepkit import made_up, searched\n{before}{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=subprocess_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


RECORD = {"framework": "madeup", "settings": {"a": 1}, "metric": "eval_response_loss", "direction": "min"}


def study_of(runs, trials, record=RECORD):
    """A study that was made without `wit sweep`: of each trial, the arguments of Optuna's `create_trial`."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    runs.mkdir()
    storage = JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    study = optuna.create_study(study_name="wit-sweep", storage=storage)
    study.set_user_attr("wit", record)
    study.add_trials([optuna.create_trial(**arguments) for arguments in trials])


def finished(cell, loss, **more):
    """The arguments of a trial that is done."""
    result = {"status": "finished", "metrics": {"eval_response_loss": loss}, "step": 4, "max_steps": 4}
    return {"value": loss, "user_attrs": {"key": cell.name, "weights": list(cell.texts), "result": result, **more}}


def finished_grid(runs, losses):
    """A grid's study without its runs: the loss by cell."""
    study_of(runs, [finished(cell, loss) for cell, loss in losses.items()])


def trials(tmp_path, url=None):
    """What Optuna itself says of the study: by key, the last trial that was about it."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = url or JournalStorage(JournalFileBackend(str(tmp_path / "runs" / "study.journal")))
    (name,) = optuna.get_all_study_names(storage)
    found = optuna.load_study(study_name=name, storage=storage).get_trials()
    counted = [trial for trial in found if "surplus" not in trial.user_attrs]
    return {trial.user_attrs.get("key", f"trial-{trial.number:04d}"): trial for trial in counted}
