"""`make demo` in a few steps, and the examples that it ships."""

import json
import math
import subprocess
import sys
from pathlib import Path

from support import subprocess_env
from tiny_model import byte_tokenizer, small_llama

TRL_CONFIGS = next(p / "configs" / "trl" for p in Path(__file__).parents if (p / "configs" / "trl").is_dir())


def test_demo_runs_end_to_end(tmp_path):
    command = [sys.executable, str(TRL_CONFIGS / "demo.py"), "--steps", "4", "--output", str(tmp_path)]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["runs"]
    assert [(run["prompt_weight"], run["response_weight"]) for run in runs] == [(0.0, 1.0), (0.2, 0.8), (1.0, 1.0)]
    assert results["parameters"] > 2_000_000
    for run in runs:
        # The same model before training, whatever the weights; an untrained one is close to uniform.
        assert run["response_loss"][0] == runs[0]["response_loss"][0]
        assert abs(run["prompt_loss"][0] - math.log(results["vocabulary"])) < 0.5
        assert run["steps"][0] == 0
        assert run["steps"][-1] == 4
        assert run["response_loss"][-1] < run["response_loss"][0]
    # More weight on the prompt, lower prompt loss.
    final = [run["prompt_loss"][-1] for run in runs]
    assert final == sorted(final, reverse=True)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    for label in ("(0, 1)", "(0.2, 0.8)", "(1, 1)"):
        assert label in done.stdout


def test_a_model_in_a_folder_is_trained_by_lora(tmp_path):
    """As `make demo` does with a real one: its template has no generation marks, and the demo brings its own."""
    texts = [(TRL_CONFIGS / "data" / "train.jsonl").read_text("utf-8")]
    tokenizer = byte_tokenizer(texts, "{{ messages[0]['content'] }}")
    small_llama(len(tokenizer), 32, 2, seed=0, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, str(TRL_CONFIGS / "demo.py"), "--model", "model", "--steps", "4", "--output", "out"]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 < results["trained_parameters"] < results["parameters"] / 5
    assert isinstance(results["before"], str)
    for run in results["runs"]:
        assert run["steps"] == [0, 1, 2, 3, 4]
        assert run["response_loss"][0] == results["runs"][0]["response_loss"][0]
        assert run["response_loss"][-1] != run["response_loss"][0]
    assert "untrained" in done.stdout


def test_no_question_of_the_test_examples_is_among_those_that_are_trained_on():
    rows = {}
    for name in ("train.jsonl", "test.jsonl"):
        text = (TRL_CONFIGS / "data" / name).read_text("utf-8")
        rows[name] = [json.loads(line)["messages"] for line in text.splitlines()]
    users = {n: {m["content"] for row in r for m in row if m["role"] == "user"} for n, r in rows.items()}
    assert not users["train.jsonl"] & users["test.jsonl"]
    every = [row for r in rows.values() for row in r]
    assert len(every) == 720
    assert sum(row[0]["role"] == "system" for row in every) > 200
    assert sum(len([m for m in row if m["role"] == "assistant"]) > 1 for row in every) > 150
