"""Two CPU processes of which one alone has images: the same loss and step as one process."""

import json

import pytest
import torch
from apart import on_ranks
from support import all_relative_error
from trlkit import LEARNING_RATE, weights_of
from trlvisionkit import batches_of, data, vision_trainer
from visionkit import weighted_step
from wit_trl import WITCallback

IMAGES = [2, 0, 1, 0]


def train(folder, name, arguments):
    trainer, special = vision_trainer(folder, name, data(IMAGES), **arguments)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    batches = list(trainer.get_train_dataloader())
    seen = [bool(torch.isin(batch["input_ids"], torch.tensor(sorted(special))).any()) for batch in batches]
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    (folder / f"seen-{trainer.args.process_index}.json").write_text(json.dumps(seen))
    if trainer.is_world_process_zero():
        torch.save(weights_of(trainer), folder / "weights.pt")
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Gemma3"])
def test_images_on_one_of_two_ranks(tmp_path, name, accumulation):
    """The dataset is not shuffled: with a batch of one, rank 0 has rows 0 and 2, and rank 1 the others."""
    size = 2 // accumulation
    order = {"train_sampling_strategy": "sequential"}
    on_ranks(
        train,
        tmp_path,
        name,
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, **order},
    )
    training, *_ = json.loads((tmp_path / "logs.json").read_text())
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    if accumulation == 2:
        assert seen == [[True, True], [False, False]]
    alone, special = vision_trainer(tmp_path, name, data(IMAGES), per_device_train_batch_size=4)
    loss, grads, count = weighted_step(alone.model, batches_of(alone), special, 0.2, 0.8)
    assert training["loss"] == pytest.approx(loss, rel=1e-5)
    assert training["prompt_tokens"] + training["response_tokens"] == count
    before, after = weights_of(alone), torch.load(tmp_path / "weights.pt")
    taken = {n: (before[n] - after[n]) / LEARNING_RATE for n in grads}
    assert all_relative_error(taken, grads) < 1e-4
