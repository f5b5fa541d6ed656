"""`wit score` on a LLaMA-Factory configuration, and Rho-1 against what it wrote, from the formula in float64."""

import literature
import numpy as np
import pytest
from lfkit import LOSS, NEAT, chatml, place, run, tokenizer
from support import Document, all_relative_error, llama

from wit_plugins.cli import main

WEIGHTS = (0.4, 0.6)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("scores"))


@pytest.mark.parametrize(
    "layout",
    [{}, pytest.param({"neat_packing": True, "dataloader_num_workers": 1}, marks=NEAT)],
    ids=["unpacked", "packed"],
)
def test_scored_and_trained(workplace, tmp_path, layout):
    folder = tmp_path / "scores"
    sizes = {"vocab_size": len(tokenizer()), "max_position_embeddings": 512, "eos_token_id": 1}
    reference = llama(seed=7, **sizes)
    reference.save_pretrained(tmp_path / "reference")
    strategies = {"rho1": {"share": literature.SHARE, "reference": str(folder)}}
    wit = {"prompt_weight": WEIGHTS[0], "response_weight": WEIGHTS[1], "strategies": strategies}
    path = workplace.write(wit=wit, **layout)
    assert main(["score", str(path), "--model", str(tmp_path / "reference"), "--output", str(folder)]) == 0
    docs = [Document(doc.input_ids, doc.is_response) for doc in chatml()]
    assert len(np.load(folder / "documents.npy")) == len(docs)
    recorder = run(workplace.config(output_dir=str(tmp_path / "out"), **layout), wit)
    loss, grads = literature.rho1_step(recorder.initial.train(), [docs], WEIGHTS, reference.double().eval())
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    assert all_relative_error(recorder.taken, grads) < 1e-4
