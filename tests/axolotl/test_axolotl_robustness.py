"""`wit robustness` on an Axolotl configuration, against conversations reworded by hand."""

import json

import pytest
import rewordkit
import yaml
from axokit import CHAT, configuration
from clikit import read_json
from transformers import AutoModelForCausalLM

from wit_plugins.cli import main


@pytest.mark.parametrize("layout", [{}, {"sample_packing": True, "eval_sample_packing": False}], ids=["rows", "packed"])
def test_the_loss_of_each_wording(tmp_path, layout):
    rewordkit.save_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rewordkit.messages()))
    source = {"path": str(data), "ds_type": "json", **CHAT}
    settings = {"output_dir": str(tmp_path / "out"), "micro_batch_size": 1, "sequence_len": 512, **layout}
    held_out = [{**source, "split": "train"}]
    values = configuration(tmp_path, source, test_datasets=held_out, eval_strategy="epoch", **settings)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["robustness", str(path), "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = read_json(tmp_path / "numbers.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for key, value in rewordkit.expected(model, "<|im_end|>").items():
        assert numbers[key] == pytest.approx(value, rel=1e-5), key
