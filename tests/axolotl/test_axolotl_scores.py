"""`wit score` on an Axolotl configuration, and Rho-1 against what it wrote, from the formula in float64."""

import literature
import numpy as np
import pytest
from axokit import Workplace, train
from support import all_relative_error, llama, plain_copy

from wit_plugins.cli import main
from wit_plugins.cli.preview.command import prepare

WEIGHTS = (0.2, 0.8)
LAYOUTS = {
    "unpacked": {"micro_batch_size": 8},
    "packed, in a worker": {
        "sample_packing": True,
        "micro_batch_size": 1,
        "sequence_len": 256,
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 2,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scored_and_trained(tmp_path, layout):
    workplace, folder = Workplace(tmp_path), tmp_path / "scores"
    reference = llama(seed=7, vocab_size=64)
    reference.save_pretrained(tmp_path / "reference")
    strategies = {"rho1": {"share": literature.SHARE, "reference": str(folder)}}
    wit = {"prompt_weight": WEIGHTS[0], "response_weight": WEIGHTS[1], "strategies": strategies}
    path = workplace.config(wit=wit, **LAYOUTS[layout])
    assert main(["score", str(path), "--model", str(tmp_path / "reference"), "--output", str(folder)]) == 0
    assert len(np.load(folder / "documents.npy")) == 8
    run = train(path)
    with run.at_start() as model:
        copy = plain_copy(model).train()
    loss, grads = literature.rho1_step(copy, [run.docs], WEIGHTS, reference.double().eval())
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(run.taken, grads) < 1e-4


def test_packed_epochs_leave_documents_out_and_scores_none(tmp_path, monkeypatch):
    """Axolotl's sampler drops what fills no batch; another epoch may hold it."""
    workplace, folder = Workplace(tmp_path), tmp_path / "scores"
    path = workplace.config(
        count=20, sample_packing=True, micro_batch_size=3, sequence_len=32, sample_packing_bin_size=1
    )
    seen = []
    monkeypatch.setattr("wit_plugins.cli.score.prepare", lambda *args: seen.append(prepare(*args)) or seen[0])
    assert main(["score", str(path), "--output", str(folder)]) == 0
    assert sum(len(row) for row in seen[0].splits["train"].rows) < 20
    assert len(np.load(folder / "documents.npy")) == 20
