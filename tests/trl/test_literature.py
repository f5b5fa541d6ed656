"""The methods of the literature through the real `SFTTrainer`: loss and step equal the papers' formulas in float64."""

import literature
import pytest
import test_fait
import test_tl_training
import torch
from support import all_relative_error, from_dataset, plain_copy
from test_distributed import launch
from torch.utils.data import SequentialSampler
from trlkit import logs, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import hookimpl, share_kept
from wit_plugins.testing import registered

LEARNING_RATE = 0.5  # some of these gradients are small, and read off float32 parameters
WEIGHTS = {"weighted": (0.2, 0.8), "response": (0.0, 1.0)}
LAYOUTS = {
    "unpacked": {},
    "packed": {"packing": True},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "packed, accumulated": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}


class Hardest:
    """Keeps the tokens with the highest nll, of those that weigh anything."""

    @hookimpl
    @share_kept("share")
    def select_tokens(self, log_probs, weights, options):
        nll = torch.where(weights != 0, -log_probs, -torch.inf)
        kept = nll.argsort(descending=True)[: -(-int((weights != 0).sum() * options["share"] * 1000) // 1000)]
        return torch.zeros_like(nll, dtype=torch.bool).index_fill_(0, kept, True)


class Decaying:
    """Position over the number of weighted tokens of the document."""

    @hookimpl
    def dynamic_weights(self, log_probs, weights, documents, positions):
        counts = torch.zeros(int(documents.max()) + 1, dtype=log_probs.dtype)
        counts.index_add_(0, documents, (weights != 0).to(log_probs.dtype))
        return positions / counts[documents].clamp(min=1)


OWN = {
    "hardest": (Hardest(), literature.hardest, {"share": 0.5}),
    "decaying": (Decaying(), literature.decaying, {}),
}


def methods():
    return {**literature.METHODS, **{name: own[1:] for name, own in OWN.items()}}


def in_order(tmp_path, **args):
    """A trainer whose micro-batches are its dataset's rows, one after the other, and these micro-batches."""
    settings = {"max_length": 32, "learning_rate": LEARNING_RATE, **args}
    trainer = sft_trainer(tmp_path, **settings)
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    rows, size = [from_dataset([row]) for row in trainer.train_dataset], trainer.args.per_device_train_batch_size
    batches = [[doc for row in rows[at : at + size] for doc in row] for at in range(0, len(rows), size)]
    return trainer, batches


def check(tmp_path, method, layout, weights, options, **callback):
    trainer, batches = in_order(tmp_path, **LAYOUTS[layout])
    steps = trainer.args.gradient_accumulation_steps
    loss, grads = literature.step(plain_copy(trainer.model), method, batches[:steps], weights)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    prompt_weight, response_weight = weights
    trainer.add_callback(WITCallback(trainer, prompt_weight, response_weight, strategies={method: options}, **callback))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", literature.METHODS)
def test_loss_and_step_are_the_formula_s(tmp_path, method, layout):
    check(tmp_path, method, layout, WEIGHTS["weighted"], literature.METHODS[method][1])


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("method", OWN)
def test_what_a_strategy_of_one_s_own_is_told(tmp_path, monkeypatch, method, loss_impl, weights):
    """A selection's denominator is its share of the whole step's tokens; documents are found in packed rows too."""
    plugin, function, options = OWN[method]
    monkeypatch.setitem(literature.METHODS, method, (function, options))
    with registered(plugin, method):
        check(tmp_path, method, "packed, accumulated", weights, options, loss_impl=loss_impl)
        check(tmp_path, method, "unpacked", weights, options, loss_impl=loss_impl)


TWO_RANKS = """
import json, pathlib, sys, torch
import test_fait, test_tl_training, wit_plugins
from test_literature import OWN, in_order, methods
from trlkit import logs, weights_of
from wit_trl import WITCallback
folder = pathlib.Path(sys.argv[1])
for name, (plugin, *_) in OWN.items():
    wit_plugins.register(plugin, name)


def run(trainer, method):
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save((logs(trainer), weights_of(trainer)), folder / f"{method}.pt")


for method, (_, options) in methods().items():
    torch.manual_seed(0)
    trainer, _ = in_order(folder / method, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.add_callback(WITCallback(trainer, 0.2, 0.8, strategies={method: options}))
    run(trainer, method)
alone = {"per_device_train_batch_size": 1}  # each rank has one row at a time
run(test_fait.attached(folder / "fait", gradient_accumulation_steps=4, **alone), "fait")
run(test_tl_training.attached(folder / "tl_training", gradient_accumulation_steps=3, **alone), "tl_training")
"""


def test_two_ranks_are_one(tmp_path, monkeypatch):
    """Every method but those that compare with a reference or sort, in one start of the two processes."""
    monkeypatch.setattr(literature, "METHODS", methods())
    done = launch(tmp_path, {}, script=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-9000:]
    trainer, batches = in_order(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)

    def is_one(method, trainer, loss, grads):
        logged, after = torch.load(tmp_path / f"{method}.pt")
        assert logged == pytest.approx([loss], rel=1e-5), method
        before, rate = weights_of(trainer), trainer.args.learning_rate
        taken = {n: (before[n] - p) / rate for n, p in after.items()}
        assert all_relative_error(taken, grads) < 1e-4, method

    for method in literature.METHODS:
        step = literature.step(plain_copy(trainer.model), method, batches, WEIGHTS["weighted"])
        is_one(method, trainer, *step)
    trainer = test_fait.attached(tmp_path)
    is_one("fait", trainer, *test_fait.expected(tmp_path, trainer.model))
    trainer = test_tl_training.attached(tmp_path)
    is_one("tl_training", trainer, *test_tl_training.expected(trainer))
