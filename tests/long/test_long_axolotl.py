"""10,000 steps in Axolotl, and a run that is resumed in its middle. `nox -s long`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from axokit import Workplace, axolotl, train
from axolotl.integrations.base import BasePlugin
from longkit import STEPS, Sums, Watch, bits


class Watched(BasePlugin):
    """Adds the callback that looks at the process."""

    watch: Watch
    trainer: Any

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        Watched.trainer = trainer

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        Watched.watch = Watch()
        return [Watched.watch]


# Without the recorder of the other tests, which keeps every example that comes by.
PLUGINS = ["test_long_axolotl.Watched", "axokit.UseCPU", "wit_axolotl.WITPlugin"]


def test_nothing_grows_and_sums_are_exact_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Sums(monkeypatch)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = {"max_steps": STEPS, "num_epochs": None, "logging_steps": STEPS, "learning_rate": 1e-4}
    path = Workplace(tmp_path).config(micro_batch_size=2, plugins=PLUGINS, bf16=True, **settings)
    axolotl("train", str(path), "--launcher", "python")
    assert Watched.trainer.state.global_step == STEPS
    Watched.watch.check(path.parent / "out")
    (logged,) = [entry for entry in Watched.trainer.state.log_history if "loss" in entry]
    sums.check(logged, STEPS)


def test_a_run_that_is_resumed_in_its_middle_is_the_same(tmp_path: Path) -> None:
    """Bit by bit, packed: parameters, and every log."""
    workplace = Workplace(tmp_path)
    packed = {"sample_packing": True, "pad_to_sequence_len": True, "sequence_len": 40, "micro_batch_size": 1}
    adam = {"optimizer": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 0.01, "num_epochs": 4}
    settings = {
        "kind": "chat",
        "count": 24,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 50,
        **packed,
        **adam,
    }
    path = workplace.config(**settings)
    whole = train(path)
    losses, parameters = whole.losses, bits(whole.trainer.model)
    checkpoint = path.parent / "out" / "checkpoint-3"
    resumed = train(workplace.config(**settings, resume_from_checkpoint=str(checkpoint)))
    assert len(losses) > 6
    assert resumed.losses == losses
    after = bits(resumed.trainer.model)
    assert all(torch.equal(after[name], parameters[name]) for name in parameters)
