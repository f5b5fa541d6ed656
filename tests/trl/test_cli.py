"""`python -m wit_trl sft`: TRL's own script, launched by accelerate, with weights."""

import json

import pytest
import yaml
from commandkit import ARGS, TWO_PROCESSES, first_loss, run
from support import from_dataset, llama, reference_step
from trlkit import dataset, sft_trainer, tokenizer
from wit_trl.__main__ import main


@pytest.fixture
def workplace(tmp_path):
    """A model folder, a dataset folder and a configuration file, as a user would have them."""
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    dataset("conversational").to_json(str(tmp_path / "data" / "train.jsonl"))
    config = {
        **ARGS,
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def expected_loss(tmp_path):
    trainer = sft_trainer(tmp_path / "reference", "conversational")
    return reference_step(trainer.model, from_dataset(trainer.train_dataset), 0.2, 0.8)[0]


def test_weights_on_the_command_line(workplace):
    done = run(workplace, "sft", "--config", "sft.yaml", "--prompt_weight", "0.2", "--response_weight", "0.8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert first_loss(workplace) == pytest.approx(expected_loss(workplace), rel=1e-5)
    assert "WIT on: prompt_weight=0.2, response_weight=0.8" in done.stdout
    for folder in ("out", "out/checkpoint-1"):
        assert json.loads((workplace / folder / "wit_config.json").read_text())["prompt_weight"] == 0.2
    assert "prompt tokens weigh 0.2" in (workplace / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sft", "--config", "sft.yaml"], "prompt_weight is missing; add --prompt_weight 0.2"),
        (["sft", "--config", "sft.yaml", "--prompt_weight", "-1"], "prompt_weight = -1.0"),
        (["sft", "--config", "sft.yaml", "--promt_weight", "0.2", "--prompt_weight", "1"], "--promt_weight"),
        (
            ["sft", "--config", "sft.yaml", "--prompt_weight", "0.2", "--normalization", "mean"],
            "normalization = 'mean'",
        ),
        (["sft", "--config", "sft.yaml", "--prompt_weight", "0.2", "--strategies", "{dft"], "is not JSON"),
        (["dpo", "--config", "sft.yaml"], "'dpo' has no prompt and response weights; use `trl dpo`"),
    ],
)
def test_mistakes_are_said_before_anything_is_launched(workplace, monkeypatch, capfd, args, message):
    monkeypatch.chdir(workplace)
    assert main(args) == 2
    assert message in capfd.readouterr().err
    assert not (workplace / "out").exists()


def test_a_mistake_in_the_data_is_the_last_line(workplace):
    """Only the trainer sees it, in every process of accelerate's; it is said once, and nothing of how they ended.

    In a single process: test_trl_data_weights.py.
    """
    unmasked = json.dumps({"input_ids": [3, 4, 5], "labels": [3, 4, 5]}) + "\n"
    (workplace / "data" / "train.jsonl").write_text(unmasked * 8)
    done = run(workplace, "sft", "--config", "sft.yaml", "--prompt_weight", "0.2", *TWO_PROCESSES)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("python -m wit_trl sft: the training dataset has nothing masked in any of its 8 examples")
    assert done.stderr.count("nothing masked") == 1


def test_help_names_the_weights_and_trl_s_arguments(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--help"])
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    assert "--prompt_weight" in shown
    assert "--packing_strategy" in shown
    assert main(["--help"]) == 0
    assert "usage: python -m wit_trl sft" in capfd.readouterr().out


def test_strategies_on_the_command_line():
    from wit_trl.sft import WITArguments

    assert WITArguments(0.2, strategies="dft").config().strategies == {"dft": {}}
    assert WITArguments(0.2, strategies='{"dft": {}}').config().strategies == {"dft": {}}
    assert WITArguments(0.2, strategies={"dft": {}}).config().strategies == {"dft": {}}  # from a YAML file


def test_a_script_of_trl_that_changed_is_noticed(monkeypatch):
    import trl.scripts.sft
    from wit_trl.sft import _check_script

    from wit_plugins import WITConfigError

    _check_script()

    def main():
        pass

    monkeypatch.setattr(trl.scripts.sft, "main", main)
    with pytest.raises(WITConfigError, match="does not work as this project expects"):
        _check_script()
