"""The methods of the literature in TRL: layouts, trainers whose batches are known, and two ranks."""

import faitkit
import literature
import pytest
import tltrainingkit
import torch
from apart import on_ranks
from support import all_relative_error, from_dataset
from torch.utils.data import SequentialSampler
from trlkit import dataset, logs, sft_trainer, weights_of
from wit_trl import WITCallback

import wit_plugins
from wit_plugins import hookimpl, share_kept

LEARNING_RATE = 0.5  # some of these gradients are small, and read off float32 parameters
WEIGHTS = {"weighted": (0.2, 0.8), "response": (0.0, 1.0)}
LAYOUTS = {
    "unpacked": {},
    "packed": {"packing": True},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "packed, accumulated": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}
COMPARING = {"rho1": (literature.rho1_step, {"share": literature.SHARE}), "sstoken": (literature.sstoken_step, {})}


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


def in_order(tmp_path, **args):
    """A trainer whose micro-batches are its dataset's rows, one after the other, and these micro-batches."""
    settings = {"max_length": 32, "learning_rate": LEARNING_RATE, **args}
    trainer = sft_trainer(tmp_path, **settings)
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    rows, size = [from_dataset([row]) for row in trainer.train_dataset], trainer.args.per_device_train_batch_size
    batches = [[doc for row in rows[at : at + size] for doc in row] for at in range(0, len(rows), size)]
    return trainer, batches


def for_two_ranks(tmp_path, **args):
    """What `in_order` makes, of documents of which two ranks get different numbers of tokens."""
    data = dataset("tokenised", seed=1)
    trainer, batches = in_order(tmp_path, data=data, per_device_train_batch_size=2, **args)
    counts = [sum(len(doc.input_ids) - 1 for docs in batches[rank::2] for doc in docs) for rank in (0, 1)]
    assert counts[0] != counts[1]
    return trainer, batches


def train_on_ranks(folder, method, args, options):
    """A rank's part of a run; what came of it is kept by the first."""
    for name, (plugin, *_) in OWN.items():
        wit_plugins.register(plugin, name)
    attached = {"fait": faitkit.attached, "tl_training": tltrainingkit.attached}
    if method in attached:
        trainer = attached[method](folder, **args)
    else:
        model = literature.adapted() if method in COMPARING and "reference" not in options else None
        trainer, _ = for_two_ranks(folder, model=model, gradient_accumulation_steps=2, **args)
        trainer.add_callback(WITCallback(trainer, *WEIGHTS["weighted"], strategies={method: options}))
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save((logs(trainer), weights_of(trainer)), folder / "after.pt")


def assert_ranks_are_one(folder, trainer, expected, method, options=None, **args):
    """Two ranks, each with half of the step's micro-batches, take the step that is expected of one process."""
    on_ranks(train_on_ranks, folder, method, args, options or {})
    loss, grads = expected
    logged, after = torch.load(folder / "after.pt")
    assert logged == pytest.approx([loss], rel=1e-5)
    before, rate = weights_of(trainer), trainer.args.learning_rate
    assert all_relative_error({n: (before[n] - p) / rate for n, p in after.items()}, grads) < 1e-4
