"""`wit robustness` on a LLaMA-Factory configuration, against conversations reworded by hand."""

import pytest
import rewordkit
from clikit import read_json
from lfkit import NEAT, Place
from transformers import AutoModelForCausalLM

from wit_plugins.cli import main

COLUMNS = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@pytest.mark.parametrize("layout", [{}, pytest.param({"neat_packing": True}, marks=NEAT)], ids=["rows", "packed"])
def test_the_loss_of_each_wording(tmp_path, layout):
    place = Place(tmp_path)
    rewordkit.save_model(tmp_path / "model")
    rows = [{"messages": turns} for turns in rewordkit.messages()]
    for name in ("train", "held_out"):
        place.dataset(name, rows, **COLUMNS, tags={**TAGS, "system_tag": "system"})
    wit = {"prompt_weight": 0.2, "response_weight": 0.8}
    path = place.write(wit=wit, eval_dataset="held_out", eval_strategy="epoch", cutoff_len=512, **layout)
    assert main(["robustness", str(path), "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = read_json(tmp_path / "numbers.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for key, value in rewordkit.expected(model, "<|im_end|>\n").items():
        assert numbers[key] == pytest.approx(value, rel=1e-5), key
