"""The second shelf of methods through the real `SFTTrainer`: loss and step equal the formulas in float64."""

import pytest
import second_shelf
import torch
from apart import on_ranks
from literature import adapted
from second_shelf import CASES
from support import all_relative_error, plain_copy
from test_literature import LAYOUTS, LEARNING_RATE, for_two_ranks, in_order
from trlkit import logs, weights_of
from wit_trl import WITCallback

WEIGHTED = (0.2, 0.8)
COMPARING = ("iw_sft",)  # with the model without its adapter
OF_DOCUMENTS = ("talr", "iw_sft")  # which look at documents, packed or not


def model_for(name):
    return adapted() if CASES[name][0] in COMPARING else None


def check(tmp_path, name, layout, weights, **callback):
    trainer, batches = in_order(tmp_path, model=model_for(name), **LAYOUTS[layout])
    copy = plain_copy(trainer.model).train()
    loss, grads = second_shelf.step(copy, batches[: trainer.args.gradient_accumulation_steps], weights, name)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    strategy, options, _ = CASES[name]
    trainer.add_callback(WITCallback(trainer, *weights, strategies={strategy: options}, **callback))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_loss_and_step_are_the_formula_s(tmp_path, name):
    check(tmp_path, name, "packed, accumulated", WEIGHTED)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] in OF_DOCUMENTS])
def test_padded_documents_are_those_of_packed_rows(tmp_path, name):
    check(tmp_path, name, "accumulated", (0.0, 1.0), loss_impl="logits")


def train_on_ranks(folder):
    """Runs of a step each, one after the other; what came of them is kept by the first rank."""
    after = {}
    for name, (strategy, options, _) in CASES.items():
        trainer, _ = for_two_ranks(folder, model=model_for(name), gradient_accumulation_steps=2)
        trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies={strategy: options}))
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        after[name] = logs(trainer), weights_of(trainer)
    if trainer.is_world_process_zero():
        torch.save(after, folder / "after.pt")


def test_two_ranks_are_one(tmp_path):
    """Each has half of the step's micro-batches. All methods in one launch."""
    on_ranks(train_on_ranks, tmp_path)
    after = torch.load(tmp_path / "after.pt")
    for name in CASES:
        trainer, batches = for_two_ranks(tmp_path, model=model_for(name))
        loss, grads = second_shelf.step(plain_copy(trainer.model).train(), batches, WEIGHTED, name)
        logged, parameters = after[name]
        before, rate = weights_of(trainer), trainer.args.learning_rate
        assert logged == pytest.approx([loss], rel=1e-5), name
        assert all_relative_error({n: (before[n] - p) / rate for n, p in parameters.items()}, grads) < 1e-3, name
