"""The user's own evaluation of each model."""

import json
import sys

import pytest
from sweepkit import collect, made_up, order

from wit_plugins import WITConfigError
from wit_plugins.cli.sweep.metrics import Metric, numbers
from wit_plugins.cli.sweep.results import choose_metrics, read_outcomes

LM_EVAL = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.6},
        "wikitext": {"word_perplexity,none": 12.5},
    },
    "config": {"limit": 100},
}


def test_lm_eval_harness_json():
    assert numbers(LM_EVAL) == {"arc_easy/acc": 0.5, "arc_easy/acc_norm": 0.6, "wikitext/word_perplexity": 12.5}
    assert numbers({"a": {"b": 1, "c": True, "d": float("nan"), "e": "1"}}) == {"a/b": 1.0}


@pytest.mark.parametrize(
    "command",
    [
        'mkdir -p "$WIT_OUTPUT"/model && cp ../lm_eval.json "$WIT_OUTPUT"/model/results_2026.json',
        'cp ../lm_eval.json "$WIT_OUTPUT"',
        "echo noise {} [1]; cat ../lm_eval.json; echo done",
    ],
)
def test_the_evaluation_s_json_is_found(tmp_path, monkeypatch, command, capsys):
    (tmp_path / "lm_eval.json").write_text(json.dumps(LM_EVAL, indent=2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert made_up(tmp_path, prompts="0,1", eval_command=command, metrics=["arc_easy/acc:max"]) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert metrics["arc_easy/acc"] == 0.5
    assert metrics["eval_response_loss"] == pytest.approx(1.26)
    record, outcomes = read_outcomes(tmp_path / "runs")  # the sweep's own metric is remembered
    assert choose_metrics(record, outcomes)[0] == Metric("arc_easy/acc", "max")
    out = capsys.readouterr().out
    assert "arc_easy/acc: higher is better" in out
    assert "--metric 'NAME:max' or 'NAME:min' draws one of them" in " ".join(out.split())


def test_the_evaluation_knows_model_and_weights_and_is_run_again_if_it_failed(tmp_path, capsys):
    failing = "echo no luck >&2; exit 4"
    assert made_up(tmp_path, prompts="0.4", eval_command=failing) == 1
    assert "evaluation failed: exit code 4: no luck" in capsys.readouterr().out
    assert collect(tmp_path / "runs")[0].error[-1] == "no luck"
    good = """python3 -c 'import json, sys; print(json.dumps({"n": len(sys.argv[1]), "p": float(sys.argv[2])}))' """
    good = good.replace("python3", sys.executable) + '"$WIT_MODEL" "$WIT_PROMPT_WEIGHT"'
    assert made_up(tmp_path, prompts="0.4", eval_command=good) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert (metrics["n"], metrics["p"]) == (len(str(tmp_path / "runs" / "p0.4_r1" / "model")), 0.4)
    assert len(order(tmp_path)) == 1  # the training was not run again


def test_an_old_result_is_never_a_new_one(tmp_path):
    """A file, a folder and a link at $WIT_OUTPUT, then a command that writes nothing; what was there is kept."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere.json"
    elsewhere.write_text('{"n": 3}')
    first = ["echo '{\"n\": 1}' > $WIT_OUTPUT", "mkdir $WIT_OUTPUT && echo '{\"n\": 2}' > $WIT_OUTPUT/a.json"]
    for kept, command in enumerate([*first, f"ln -s {elsewhere} $WIT_OUTPUT"], 1):
        assert made_up(tmp_path, prompts="0", eval_command=command) == 0
        assert collect(runs)[0].metrics["n"] == kept
        assert made_up(tmp_path, prompts="0", eval_command=f"true {kept}") == 1
        (result,) = collect(runs)
        assert "n" not in result.metrics
        assert "it wrote no JSON with numbers" in result.reason
    assert len(list((runs / "p0_r1").glob("evaluation.old-*"))) == 3
    assert elsewhere.exists()


def test_an_evaluation_that_is_cut_short_leaves_no_older_number(tmp_path):
    assert made_up(tmp_path, prompts="0", eval_command="echo '{\"n\": 1}'") == 0
    with pytest.raises(KeyboardInterrupt):
        made_up(tmp_path, prompts="0", eval_command="kill -TERM $PPID; sleep 3600")
    assert "n" not in collect(tmp_path / "runs")[0].metrics
    assert collect(tmp_path / "runs")[0].status == "finished"


@pytest.mark.parametrize(
    "name", ["with space", "$(touch pwned)", "`touch pwned`", "a'b\"c", "; touch pwned", "-n", "*"]
)
def test_a_path_is_never_part_of_the_command(tmp_path, monkeypatch, name):
    """Whatever the folder is called: the shell takes it from its environment."""
    here = tmp_path / "here"
    (tmp_path / name).mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "compare.py").write_text(
        "import json, sys\nprint(json.dumps({n: float(a == sys.argv[1]) for n, a in enumerate(sys.argv[2:])}))"
    )
    expected = (tmp_path / name / "runs" / "p0_r1" / "model").resolve()
    monkeypatch.setenv("EXPECTED", str(expected))
    command = f'{sys.executable} compare.py "$EXPECTED" "$WIT_MODEL" "${{WIT_OUTPUT%/evaluation}}/model"'
    assert made_up(tmp_path / name, prompts="0", eval_command=command) == 0
    metrics = collect(tmp_path / name / "runs")[0].metrics
    assert [metrics[n] for n in "01"] == [1.0, 1.0]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["model", "output", "prompt_weight", "response_weight"])
def test_a_placeholder_is_refused_with_the_variable_to_write(tmp_path, name):
    """Nothing is put into a command, so a command from before that would be run with the braces."""
    with pytest.raises(WITConfigError, match=rf'{{{name}}} is not filled in; write "\$WIT_{name.upper()}"'):
        made_up(tmp_path, eval_command=f"evaluate p={{{name}}}")
    assert not (tmp_path / "runs").exists()
    assert made_up(tmp_path, prompts="0", eval_command=f'{name}=1; echo "{{\\"n\\": ${{{name}}}}}"') == 0
    assert collect(tmp_path / "runs")[0].metrics["n"] == 1  # a variable of the shell's own is none
