"""What the weights make the ranks say to each other: counted, run against run, with weights and without."""

import collections
import json
import os

import torch
import transformers
from apart import on_ranks
from trlkit import dataset, sft_trainer
from wit_trl import WITCallback

STEPS, LOG_EVERY, HELD_OUT, BATCH = 6, 2, 7, 2


def train_and_count(folder):
    """Once without weights and once with them; what the first rank gives to the others."""
    sent = []

    def counted(name):
        own = getattr(torch.distributed, name)

        def call(*args, **kwargs):
            # What this rank gives: the second argument of a gather, the first of a reduction; objects are pickled.
            given = args[-1] if "gather" in name else args[0]
            given = kwargs.get("input_tensor", kwargs.get("tensor", given))
            size = given.numel() * given.element_size() if isinstance(given, torch.Tensor) else "object"
            sent.append((name.removesuffix("_into_tensor").removesuffix("_object"), size))
            return own(*args, **kwargs)

        setattr(torch.distributed, name, call)

    for name in ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast"):
        counted(name)

    own = transformers.Trainer._get_num_items_in_batch

    def counting(trainer, *args):
        sent.append(("labels counted", 0))
        return own(trainer, *args)

    transformers.Trainer._get_num_items_in_batch = counting

    for weighted in (False, True):
        if weighted:
            os.environ["WIT_RUN_FOLDER"] = str(folder / "sweep")  # as `wit sweep` starts a run, which it may stop
        arguments = {"per_device_train_batch_size": 1, "max_steps": STEPS, "logging_steps": LOG_EVERY}
        arguments |= {"eval_strategy": "steps", "eval_steps": STEPS, "per_device_eval_batch_size": BATCH}
        held_out = dataset("tokenised", HELD_OUT, seed=9)
        trainer = sft_trainer(folder, trainer_kwargs={"eval_dataset": held_out}, **arguments)
        if weighted:
            trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
        sent.clear()
        trainer.train()
        if trainer.is_world_process_zero():
            (folder / f"sent-{weighted}.json").write_text(json.dumps(sent))


def test_the_weights_add_a_handful_of_small_messages(tmp_path):
    """docs/dev/ranks.md has these numbers: a scalar a step, the roles' sums a log, two gathers an evaluation."""
    on_ranks(train_and_count, tmp_path)
    without, weighted = (
        collections.Counter((name, size) for name, size in json.loads((tmp_path / f"sent-{kind}.json").read_text()))
        for kind in (False, True)
    )
    batches = -(-HELD_OUT // (2 * BATCH))
    assert not without - weighted  # what the framework says by itself, it still says
    # transformers counts labels once a step; 5.16 in each batch of an evaluation, too. The denominator goes beside it.
    counts = without["labels counted", 0]
    assert counts in (STEPS, STEPS + batches)
    assert weighted - without == {
        ("all_gather", 8): counts,  # the denominator, int64
        ("all_gather", 4 * 8): STEPS // LOG_EVERY,  # nll and tokens of both roles, float64
        ("all_gather", batches * 8): 1,  # how many rows each batch of a rank has, once an evaluation
        # the same for each row and its weighted loss with the denominator, of as many rows as the fullest batch has
        ("all_gather", batches * BATCH * 6 * 8): 1,
        ("all_gather", "object"): 1,  # the settings, to be the same on all ranks
        ("all_reduce", 8): STEPS,  # whether to stop, at fewer than two hundred steps of a run
    }
