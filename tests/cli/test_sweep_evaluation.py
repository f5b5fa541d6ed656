"""The user's own evaluation of each model."""

import json
import sys

import pytest
from sweepkit import collect, grid, made_up, order

from wit_plugins import WITConfigError
from wit_plugins.cli.sweep.evaluation import evaluation_script
from wit_plugins.cli.sweep.metrics import numbers
from wit_plugins.cli.sweep.results import choose_metrics

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
        "mkdir -p {output}/model && cp ../lm_eval.json {output}/model/results_2026.json",
        "cp ../lm_eval.json {output}",
        "echo noise {} [1]; cat ../lm_eval.json; echo done",
    ],
)
def test_the_evaluation_s_json_is_found(tmp_path, monkeypatch, command, capsys):
    (tmp_path / "lm_eval.json").write_text(json.dumps(LM_EVAL, indent=2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert made_up(tmp_path, prompts="0,1", eval_command=command) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert metrics["arc_easy/acc"] == 0.5
    assert metrics["eval_response_loss"] == pytest.approx(1.26)
    chosen = {metric.name: metric.direction for metric in choose_metrics(collect(tmp_path / "runs"), [])}
    assert (chosen["arc_easy/acc"], chosen["wikitext/word_perplexity"]) == ("max", "min")


def test_the_evaluation_knows_model_and_weights_and_is_run_again_if_it_failed(tmp_path, capsys):
    failing = "echo no luck >&2; exit 4"
    assert made_up(tmp_path, prompts="0.4", eval_command=failing) == 1
    assert "evaluation failed: exit code 4: no luck" in capsys.readouterr().out
    assert collect(tmp_path / "runs")[0].error[-1] == "no luck"
    good = """python3 -c 'import json, sys; print(json.dumps({"n": len(sys.argv[1]), "p": float(sys.argv[2])}))' """
    good = good.replace("python3", sys.executable) + "{model} {prompt_weight}"
    assert made_up(tmp_path, prompts="0.4", eval_command=good) == 0
    metrics = collect(tmp_path / "runs")[0].metrics
    assert (metrics["n"], metrics["p"]) == (len(str(tmp_path / "runs" / "p0.4_r1" / "model")), 0.4)
    assert len(order(tmp_path)) == 1  # the training was not run again


def test_an_old_result_is_never_a_new_one(tmp_path):
    """A file, a folder and a link at {output}, then a command that writes nothing; what was there is kept."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere.json"
    elsewhere.write_text('{"n": 3}')
    first = ["echo '{\"n\": 1}' > {output}", "mkdir {output} && echo '{\"n\": 2}' > {output}/a.json"]
    for kept, command in enumerate([*first, f"ln -s {elsewhere} {{output}}"], 1):
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
    """Whatever the folder is called, unquoted as {model} or quoted as the shell's own variable."""
    here = tmp_path / "here"
    (tmp_path / name).mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "compare.py").write_text(
        "import json, sys\nprint(json.dumps({n: float(a == sys.argv[1]) for n, a in enumerate(sys.argv[2:])}))"
    )
    expected = (tmp_path / name / "runs" / "p0_r1" / "model").resolve()
    monkeypatch.setenv("EXPECTED", str(expected))
    command = f'{sys.executable} compare.py "$EXPECTED" {{model}} "$WIT_MODEL" "${{WIT_OUTPUT%/evaluation}}/model"'
    assert made_up(tmp_path / name, prompts="0", eval_command=command) == 0
    metrics = collect(tmp_path / name / "runs")[0].metrics
    assert [metrics[n] for n in "012"] == [1.0, 1.0, 1.0]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    "command", ['x "{model}"', "x '{output}'", 'x "a\\"{model}"', "x 'a\\'\"{model}\"", "bash -c 'x {model}'"]
)
def test_a_placeholder_inside_quotes_is_refused(tmp_path, command):
    with pytest.raises(WITConfigError, match=r"stands inside .*write it without quotes.*\$WIT_(MODEL|OUTPUT)"):
        made_up(tmp_path, eval_command=command)
    assert not (tmp_path / "runs").exists()


def test_placeholders_outside_quotes():
    (cell,) = grid("0.1000001", "1")
    text = """a 'x' "y \\" z" \\" {model} p={output},d {prompt_weight} '{response_weight}'"""
    made = """a 'x' "y \\" z" \\" "$WIT_MODEL" p="$WIT_OUTPUT",d 0.1000001 '1'"""
    assert evaluation_script(text, cell) == made
