"""A search: what it trains, what it stops, what it says; over made-up runs whose best ratio is known."""

import csv
import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import yaml
from clikit import read_json, wit, workplace
from support import subprocess_env
from sweepkit import MadeUp, curve, lowest, made_up, order, searched, trials, worker

from wit_plugins import WITConfigError
from wit_plugins.cli.driver import Job
from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.sweep.metrics import Metric
from wit_plugins.cli.sweep.results import Outcome, candidates, spread, verdict
from wit_plugins.cli.sweep.runner import Runner
from wit_plugins.cli.sweep.space import POSITION, Space, position, ratio_at

FIRST = ["p0_r1", "p0.2_r0.8", "p1_r1", "ratio-0.03", "ratio-0.09", "ratio-0.5"]
LOSS = Metric("eval_response_loss", "min")


def test_a_search_finds_what_was_planted_and_stops_what_cannot_win(tmp_path, capsys):
    assert searched(tmp_path, trials=8) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = trials(tmp_path)
    assert list(found) == [*FIRST, "trial-0006", "trial-0007"]
    assert [name for name, *_ in order(tmp_path)] == list(found)  # each once
    assert [found[name].state.name for name in FIRST] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert found["ratio-0.5"].last_step < 10
    for name, ratio in zip(FIRST, (0, 0.25, 1, 0.03, 0.09), strict=False):  # the worst of all among them: references
        assert found[name].value == pytest.approx(lowest(ratio))
        assert found[name].params[POSITION] == pytest.approx(math.log10(1 + 100 * ratio))
    best = min((t for t in found.values() if t.state.name == "COMPLETE"), key=lambda t: t.value)
    assert f"Best: {best.user_attrs.get('key', f'trial-{best.number:04d}')} (" in out
    written = read_json(tmp_path / "runs" / "results.json")
    assert written["best"]["eval_response_loss"]["value"] == best.value
    assert "add --seeds 3" in written["verdict"]
    trained = sum(t.user_attrs["result"]["step"] for t in found.values())
    pruned = sum(t.state.name == "PRUNED" for t in found.values())
    assert f"8 cells, {pruned} of them stopped early: {trained} steps; a grid like the paper's, 35 cells trained" in out
    assert f"to the end, takes 350 steps, so this is {trained / 350:.0%} of it." in out
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert float(rows["ratio-0.09"]["eval_response_loss"]) == pytest.approx(lowest(0.09))
    assert (rows["p0.2_r0.8"]["prompt_weight"], rows["ratio-0.5"]["status"]) == ("0.2", "pruned")
    # Started again it is done; with another number it goes on.
    assert searched(tmp_path, trials=8) == 0
    assert searched(tmp_path, trials=9) == 0
    assert len(order(tmp_path)) == len(trials(tmp_path)) == 9


@pytest.mark.parametrize("pruner", ["percentile", "halving", "median"])
def test_a_reference_is_never_stopped(tmp_path, pruner):
    """(1, 1), the worst of the three, waits at each step until its value has been judged; the next cell is stopped."""
    reported = """f'"trial_id":2,"step":{step},' in (folder.parent / 'study.journal').read_text()"""
    waits = f"while prompt == 1 and not {reported}: time.sleep(0.02)"
    assert searched(tmp_path, curve(waits), trials=3, pruner=pruner) == 0
    reference = trials(tmp_path)["p1_r1"]
    assert (reference.state.name, reference.last_step) == ("COMPLETE", 10)


def is_word(entry):
    """Whether a line of a journal is a value of a step (7), or the end of a trial (6, and not its beginning)."""
    return entry["op_code"] == 7 or (entry["op_code"] == 6 and entry["state"] != 0)


@pytest.mark.parametrize("pruner", ["percentile", "halving", "median"])
def test_evaluations_that_come_late_are_judged_at_their_own_step(tmp_path, pruner):
    """All at once, and those of references that another worker trained: the cell is judged at the first look.

    With its later values it would be the best of all: these belong to steps that it does not reach in time.
    """
    shape = "bottom = 1 + (place - 1.0) ** 2 + (2 if prompt == 0.03 and step < 4 else 0)"
    body = curve("pass").replace("    log(step", f"    {shape}\n    log(step")
    assert searched(tmp_path, body, trials=3, pruner=pruner) == 0
    journal = tmp_path / "runs" / "study.journal"  # as if their worker had died before it could say a word of them
    lines = [line for line in journal.read_text().splitlines(True) if not is_word(json.loads(line))]
    journal.write_text("".join(lines))
    assert searched(tmp_path, "raise SystemExit('run again')", trials=3, pruner=pruner) == 0
    assert searched(tmp_path, body, trials=4, pruner=pruner) == 0
    assert len(order(tmp_path)) == 4
    assert (tmp_path / "runs" / "ratio-0.03" / "stop").exists()


def test_seeds_and_what_they_say(tmp_path, capsys):
    """The seed reaches the run; its noise is much smaller than what the weights change, or larger."""
    noisy = "import random\nnoise = random.Random(f'{prompt} {changes.get(\"seed\")}').gauss(0, 1) * SIZE\n"
    body = curve().replace("bottom = 1", "bottom = noise + 1")
    assert searched(tmp_path, noisy.replace("SIZE", "0.001") + body, trials=5, seeds=3, values={"seed": 7}) == 0
    found = trials(tmp_path)
    repeated = {key: t for key, t in found.items() if "repeats" in t.user_attrs}
    best = min(FIRST[3:5], key=lambda key: found[key].value)
    assert set(repeated) == {f"{key}_seed-{seed}" for key in FIRST[:5] for seed in (8, 9)}
    assert all(t.state.name == "COMPLETE" for t in repeated.values())  # never stopped early
    said = read_json(tmp_path / "runs" / "results.json")
    values = [found[key].value for key in (best, f"{best}_seed-8", f"{best}_seed-9")]
    assert said["seeds"][best]["mean"] == pytest.approx(sum(values) / 3)
    assert "The best is distinguishable from (0, 1)" in said["verdict"]
    assert "± " in capsys.readouterr().out
    (tmp_path / "loud").mkdir()
    assert searched(tmp_path / "loud", noisy.replace("SIZE", "9") + body, trials=3, seeds=2, pruner="none") == 0
    assert "distinguishable" not in read_json(tmp_path / "loud" / "runs" / "results.json")["verdict"].replace(
        "not distinguishable", ""
    )


def candidate(name, *values):
    weights = Cell(Fraction(0), Fraction(1)) if name == "p0_r1" else Cell(Fraction(1, 2), Fraction(1))
    cell = Cell(weights.prompt, weights.response, name)
    made = [Outcome(cell, "finished", {"eval_response_loss": values[0]})]
    for seed, value in enumerate(values[1:], 1):
        again = Cell(cell.prompt, cell.response, f"{name}_seed-{seed}")
        made.append(Outcome(again, "finished", {"eval_response_loss": value}, repeats=name, seed=seed))
    return made


@pytest.mark.parametrize(
    ("best", "base", "words"),
    [
        ((1.0, 1.1, 1.2), (1.3, 1.4, 1.5), "is distinguishable from (0, 1): it gains 0.3000 ± "),
        # Gains of 0.2, -0.1 and 0.3: 0.1333 on average, deviation 0.2082, so ± 4.303 · 0.2082 / √3 = 0.5171.
        ((1.0, 1.1, 1.0), (1.2, 1.0, 1.3), "is not distinguishable from (0, 1): it gains 0.1333 ± 0.5172"),
        (
            (1.0,),
            (1.2,),
            "One seed cannot say whether that is more than chance; differences of this size may be: add --seeds 3",
        ),
        ((1.4, 1.5), (1.2, 1.2), "conventional instruction tuning: no other cell was better"),
        ((1.4, 1.5), None, "(0, 1) is not trained yet"),
    ],
)
def test_the_verdict(best, base, words):
    outcomes = candidate("trial-0007", *best) + (candidate("p0_r1", *base) if base else [])
    assert words in verdict(candidates(outcomes, LOSS), LOSS)


def test_the_spread_is_that_of_all_repeated_cells():
    """Squares of 0.02 over (2 - 1) + (3 - 1) degrees of freedom."""
    outcomes = candidate("a", 1.0, 1.2) + candidate("p0_r1", 2.0, 2.1, 1.9) + candidate("b", 9.0)
    assert spread(candidates(outcomes, LOSS)) == pytest.approx(math.sqrt((0.02 + 0.02) / 3))


def test_a_failing_trial_is_recorded_and_tried_again(tmp_path, capsys):
    assert searched(tmp_path, curve(before="if prompt == 0.2: sys.exit('boom')\n"), trials=5) == 1
    captured = capsys.readouterr()
    assert "p0.2_r0.8 (0.2, 0.8) failed: exit code 1: boom" in captured.out
    assert trials(tmp_path)["p0.2_r0.8"].state.name == "FAIL"
    assert len(order(tmp_path)) == 5
    assert searched(tmp_path, trials=5) == 0
    assert [name for name, *_ in order(tmp_path)][5:] == ["p0.2_r0.8"]


def test_a_trial_that_diverges_is_never_the_best(tmp_path):
    body = curve(before="if prompt == 0.03:\n    log(step=1, eval_response_loss=float('nan'))\n    sys.exit(0)\n")
    assert searched(tmp_path, body, trials=5) == 0
    assert trials(tmp_path)["ratio-0.03"].user_attrs["result"]["status"] == "diverged"
    assert "ratio-0.09" in read_json(tmp_path / "runs" / "results.json")["verdict"]


def test_the_user_s_own_evaluation_is_what_is_searched(tmp_path):
    command = 'echo "{\\"score\\": $WIT_PROMPT_WEIGHT}"'
    assert searched(tmp_path, trials=4, eval_command=command, metrics=["score:max"]) == 0
    found = trials(tmp_path)
    assert [found[name].value for name in FIRST[:4]] == [0.0, 0.2, 1.0, 0.03]
    assert "Best: p1_r1 (1, 1), score 1.000" in read_json(tmp_path / "runs" / "results.json")["verdict"]


def test_parameters_beside_the_ratio(tmp_path):
    """They reach the run; the references have the configuration's own values."""
    params = ["learning_rate=1e-6:1e-4:log", "layers=1:4", "strategies.dft=on,off", "kind=a,b"]
    body = curve(before="(folder / 'changes.json').write_text(json.dumps(changes))\n", between="pass")
    values = {"learning_rate": "2e-5", "kind": "b", "wit": {"strategies": ["other"]}}
    assert searched(tmp_path, body, "0.5:1", params, values, trials=8, pruner="none") == 0
    found = trials(tmp_path)
    for key, trial in found.items():
        changes = read_json(tmp_path / "runs" / key / "changes.json")
        expected = {"other": {}, "dft": {}} if trial.params["strategies.dft"] == "on" else {"other": {}}
        assert changes.pop("wit.strategies") == expected
        assert changes == {name: trial.params[name] for name in ("learning_rate", "layers", "kind")}
        assert 1e-6 <= changes["learning_rate"] <= 1e-4
        assert changes["layers"] in (1, 2, 3, 4)
        if key in FIRST:
            assert changes == {"learning_rate": 2e-5, "layers": 2, "kind": "b"}
        else:
            prompt, response = map(float, trial.user_attrs["weights"])
            assert 0.5 <= response <= 1
            assert prompt == pytest.approx(response * (10 ** trial.params[POSITION] - 1) / 100, rel=1e-3, abs=1e-4)
    assert found["p0.2_r0.8"].params["response_weight"] == 0.8


def test_the_axis():
    assert [ratio_at(position(ratio)) for ratio in (0, 0.03, 0.25, 1)] == [0, 0.03, 0.25, 1]
    # Above 0.01, even steps are nearly even factors.
    steps = [position(0.1 * 2**i) for i in range(4)]
    assert [b - a for a, b in itertools.pairwise(steps)] == pytest.approx([math.log10(2)] * 3, abs=0.05)


SEARCH = ["--output", "runs", "--trials", "4"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--output", "runs"], "--prompt-weight is missing; give the weights of a grid, or search with --trials 8"),
        ([*SEARCH[:2], "--prompt-weight", "0", "--response-weight", "1", "--seeds", "3"], "--seeds is for a search"),
        ([*SEARCH, "--prompt-weight", "0,1"], "--prompt-weight is a grid's"),
        ([*SEARCH, "--response-weight", "1:0.5"], "--response-weight = '1:0.5': a search takes one above 0, or a"),
        ([*SEARCH, "--response-weight", "0"], "a search takes one above 0"),
        ([*SEARCH, "--param", "lr"], "write name=low:high"),
        ([*SEARCH, "--param", "lr=1:x"], "is no range; write lr=1e-6:1e-4:log"),
        ([*SEARCH, "--param", "lr=0:1:log"], "a log scale begins above 0"),
        ([*SEARCH, "--param", "lr=2:1"], "the smaller end comes first"),
        ([*SEARCH, "--param", "lr=1"], "write at least two values"),
        ([*SEARCH, "--param", "seed=1:3"], "--param seed: say --seeds"),
        ([*SEARCH, "--param", "wit.prompt_weight=0:1"], "it is searched by itself"),
        ([*SEARCH, "--param", "lr=1:2", "--param", "lr=1:3"], "--param lr is given twice"),
        ([*SEARCH, "--param", "lr=1:2", "--set", "lr=3"], "--param lr: is given by --set too"),
        ([*SEARCH, "--param", "strategies.dft=a,b"], "a strategy is switched: strategies.dft=on,off"),
        ([*SEARCH, "--param", "strategies.dft=on,off", "--set", "strategies=dft"], "take it out there"),
        (["--output", "runs", "--trials", "2"], "--trials = 2: the three cells to compare with come first"),
        (["--output", "runs", "--hours", "1", "--seeds", "2"], "say how many with --trials"),
        ([*SEARCH, "--storage", "nothing://x", "--no-check"], "--storage = nothing://x"),
        ([*SEARCH, "--metric", "x:max", "--pruner", "none", "--unique-ratios"], "--unique-ratios is a grid's"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys, args, said):
    workplace(tmp_path, evaluation=True, eval_strategy="epoch")
    monkeypatch.chdir(tmp_path)
    code, out, err = wit("sweep", "sft.yaml", *args, capsys=capsys)
    assert code == 2, out
    assert len(err.splitlines()) == 1
    assert said in err
    assert not list(tmp_path.glob("runs/*-*"))


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "a"])
def test_hours_that_are_none(capsys, text):
    with pytest.raises(SystemExit):
        wit("sweep", "x.yaml", "--output", "runs", f"--hours={text}", capsys=capsys)
    assert "is not a number of hours above 0" in capsys.readouterr().err


def test_when_the_time_is_up_nothing_more_is_started(tmp_path, monkeypatch):
    assert searched(tmp_path, trials=None, hours=1e-9) == 0
    assert not (tmp_path / "runs" / "order.txt").exists()
    # What runs goes on to its end.
    monkeypatch.setattr(Runner, "_observe", lambda self, *_: setattr(self, "deadline", 0.0))
    assert searched(tmp_path, trials=None, hours=9) == 0
    assert [name for name, *_ in order(tmp_path)] == ["p0_r1"]
    assert trials(tmp_path)["p0_r1"].user_attrs["result"]["status"] == "finished"


def test_folders_of_another_kind_are_refused_with_the_way_out(tmp_path):
    made_up(tmp_path, prompts="0")
    with pytest.raises(WITConfigError, match="holds a grid; go on with it without --trials"):
        searched(tmp_path)
    (tmp_path / "other").mkdir()
    searched(tmp_path / "other", trials=3)
    with pytest.raises(WITConfigError, match="holds a search; go on with it by --trials"):
        made_up(tmp_path / "other")
    for changed, said in (({"values": {"a": 2}}, "a: 1 → 2"), ({"response": "0.5:1"}, "space: .*0.5")):
        with pytest.raises(WITConfigError, match=f"another search's .differing: {said}.*give another --output"):
            searched(tmp_path / "other", **changed)
    assert len(order(tmp_path / "other")) == 3


def test_without_optuna_a_sweep_says_what_to_install(tmp_path):
    workplace(tmp_path, evaluation=True, eval_strategy="epoch")
    code = """
import sys
sys.modules["optuna"] = None  # importing it is an ImportError
from wit_plugins.cli.main import main
grid = main(["sweep", "sft.yaml", "--prompt-weight", "0", "--response-weight", "1", "--output", "runs"])
sys.exit(10 * grid + main(["sweep", "sft.yaml", "--trials", "4", "--output", "runs"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=subprocess_env(), capture_output=True, text=True
    )
    assert done.returncode == 22, done.stderr
    assert done.stderr.count('wit: a sweep needs Optuna; pip install "wit-plugins[cli]"') == 2
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_search(tmp_path, monkeypatch, capsys):
    workplace(tmp_path, evaluation=True, eval_strategy="epoch")
    monkeypatch.chdir(tmp_path)
    code, out, err = wit("sweep", "sft.yaml", *SEARCH, "--seeds", "2", "--dry-run", capsys=capsys)
    assert code == 0, err
    for folder in ("p0_r1", "p0.2_r0.8"):
        assert f"-m wit_trl sft --config {tmp_path / 'runs' / folder / 'config.yaml'}" in out
    lines = [line.removeprefix("#   ") for line in out.splitlines() if line.startswith("#   ")]
    read = yaml.safe_load("\n".join(lines))
    assert (read["prompt_weight"], read["response_weight"]) == (0, 1)  # the first cell's alone
    assert read["output_dir"] == str(tmp_path / "runs" / "p0_r1" / "model")
    assert "# and 1 more, the ratios 0.03 first" in out
    assert "then what the search chooses" not in out
    assert not (tmp_path / "runs").exists()
    _, out, _ = wit("sweep", "sft.yaml", *SEARCH[:3], "3", "--dry-run", capsys=capsys)
    assert " more" not in out
    _, out, _ = wit("sweep", "sft.yaml", *SEARCH[:3], "8", "--dry-run", capsys=capsys)
    assert "# and 5 more, the ratios 0.03, 0.09, 0.5 first\n# then what the search chooses\n" in out


CHATTY = """
import sweepkit, warnings
command = sweepkit.MadeUp.command
def chatty(*args):
    print("outlandish words")
    warnings.warn("outlandish warning")
    return command(*args)
sweepkit.MadeUp.command = chatty
"""


def test_a_dry_run_keeps_foreign_words_from_the_screen(tmp_path):
    """A framework that talks when it is imported for the command line."""
    out = worker(tmp_path, "", before=CHATTY, call="made_up", dry_run=True).communicate()[0].decode()
    assert "# 3 of 3 cells would be run" in out
    assert "outlandish" not in out


class Named(MadeUp):
    """Runs that take no time, under the name of a framework."""

    def __init__(self, name, body=None):
        super().__init__(curve(between="pass") if body is None else body)
        self.name, self.block = name, "" if name == "trl" else "wit"


@pytest.mark.parametrize("name", ["trl", "axolotl", "llamafactory"])
def test_the_best_cell_as_it_stands_in_a_configuration(tmp_path, capsys, name):
    """It is YAML, and it means what was trained."""
    params = ["learning_rate=1e-5:1e-4", "strategies.dft=on,off"]
    searched(tmp_path, params=params, driver=Named(name), trials=7, pruner="none")
    code, out, err = wit("best", tmp_path / "runs", capsys=capsys)
    assert code == 0, err
    read = yaml.safe_load(out)
    winner = read_json(tmp_path / "runs" / "results.json")["best"]["eval_response_loss"]
    best = min(trials(tmp_path).values(), key=lambda trial: trial.value)
    expected = {"prompt_weight": winner["prompt_weight"], "response_weight": 1.0}
    expected["strategies"] = {"dft": {}} if best.params["strategies.dft"] == "on" else {}
    assert read.pop("learning_rate") == best.params["learning_rate"]
    assert read == (expected if name == "trl" else {"wit": expected})
    assert list(map(float, best.user_attrs["weights"])) == [winner["prompt_weight"], 1.0]
    train = {"trl": "python -m wit_trl sft --config", "axolotl": "axolotl train"}
    assert f"#   {train.get(name, 'llamafactory-wit train')} " in out


def test_the_best_cell_of_a_grid(tmp_path, capsys):
    (tmp_path / "c.yaml").touch()
    made_up(tmp_path, prompts="0,0.4,1", driver=Named("axolotl", ""), path=tmp_path / "c.yaml")
    code, out, _ = wit("best", tmp_path / "runs", capsys=capsys)
    assert code == 0
    assert yaml.safe_load(out) == {"wit": {"prompt_weight": 0.4, "response_weight": 1.0}}
    assert f"axolotl train {tmp_path / 'c.yaml'}" in out
    code, _, err = wit("best", tmp_path, capsys=capsys)
    assert code == 2
    assert "holds no sweep" in err


def test_the_curve_says_what_it_shows(tmp_path, monkeypatch):
    """Hollow where it was stopped, marked where it is compared, read off matplotlib's own objects."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    searched(tmp_path, trials=6, seeds=2)
    (figure,) = figures
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    stopped = lines["stopped early, beyond the edge"]
    assert list(stopped.get_xdata()) == pytest.approx([position(0.5)])
    assert stopped.get_markerfacecolor() == "none"
    assert lines["trained to the end"].get_markerfacecolor() != "none"
    assert sorted(lines["to compare with"].get_xdata()) == pytest.approx([0, position(0.25), position(1)])
    assert list(lines["best"].get_xdata()) == pytest.approx([position(0.09)])
    assert {text.get_text() for text in axis.texts} == {"(0, 1)", "(0.2, 0.8)", "(1, 1)"}
    assert [band.get_label() for band in axis.collections] == ["± the seeds' standard deviation"]
    assert "6 cells, 1 of them stopped early" in axis.get_title()
    assert "chance" not in axis.get_ylabel()  # the band says it
    assert (tmp_path / "runs" / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_seeds_the_curve_s_axis_says_that_differences_may_be_chance(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    searched(tmp_path, curve("pass"), trials=3)
    (axis,) = figures[0].axes
    within = lowest(1) - lowest(0.25)
    assert f"one seed, so differences may be chance; all cells are within {within:.4f} (" in axis.get_ylabel()


def test_what_is_searched_is_read_from_text():
    space = Space.parse("0.5:1", ["lr=1e-6:1e-4:log", "rank=4:64", "x=0.5:2"])
    assert space.response == (0.5, 1.0)
    log, whole, real = space.parameters
    assert (log.low, log.high, log.log, log.whole) == (1e-6, 1e-4, True, False)
    assert (whole.whole, real.whole) == (True, False)
    assert log.usual(Job(None, {}), MadeUp()) == pytest.approx(1e-5)  # the middle, on its scale
