"""What a rank runs of the table in Axolotl: `axolotl train` on a configuration, in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before Axolotl is imported: it reports to its makers otherwise

import rankskit
import torch
import yaml
from axokit import CHAT, configuration, train
from axolotl.utils import distributed

UNPACKED, PACKED = 8, 24  # documents
LORA: dict[str, Any] = {
    "adapter": "lora",
    **{f"lora_{name}": value for name, value in rankskit.LORA.items()},
    # on by default, and classes stay patched for the process
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
OURS = ["axokit.Recorder", "wit_axolotl.WITPlugin"]
ON_NO_GPU = OURS if rankskit.ON_GPU else ["axokit.NoDeviceMap", *OURS]
# How Axolotl says what `rankskit.parallel_arguments` says.
PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {"plugins": OURS if rankskit.ON_GPU else ["axokit.UseCPU", *OURS]},
    "fsdp2": {
        "fsdp_version": 2,
        "fsdp_config": {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "reshard_after_forward": True,
        },
    },
    "zero2": {"deepspeed": rankskit.zero(2), "plugins": ON_NO_GPU},
    "zero3": {"deepspeed": rankskit.zero(3), "plugins": ON_NO_GPU},
}


def settings(workplace: Path, case: dict[str, Any], parallel: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Axolotl's configuration of a case: all documents are one step."""
    accumulate = case.get("accumulate", 1)
    weights = dict(zip(("prompt_weight", "response_weight"), rankskit.WEIGHTS, strict=True))
    changes: dict[str, Any] = {
        **PARALLEL[parallel],
        "base_model": str(workplace / ("tied" if case.get("tied") else "model")),
        "wit": {**weights, **case.get("wit", {})},
        "output_dir": str(folder / "out"),
        "micro_batch_size": UNPACKED // (ranks * accumulate),
        "gradient_accumulation_steps": accumulate,
    }
    if case.get("packed"):
        changes |= {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 80, "pad_to_sequence_len": True}
        changes["gradient_accumulation_steps"] = rankskit.PACKED_ROWS // ranks
    if case.get("lora"):
        changes |= {"lora_model_dir": str(workplace / "adapter"), **LORA}
    if case.get("evaluated"):
        held_out = {"path": str(workplace / "held_out.jsonl"), "ds_type": "json", "split": "train", **CHAT}
        changes |= {"test_datasets": [held_out], "eval_strategy": "epoch", "eval_batch_size": 1}
    name = f"{'silent' if case.get('silent') else 'chat'}-{PACKED if case.get('packed') else UNPACKED}.jsonl"
    dataset = {"path": str(workplace / name), "ds_type": "json", **CHAT}
    return configuration(workplace, dataset, **changes)


def run(workplace: Path, case: dict[str, Any], parallel: str, folder: Path) -> None:
    path = folder / f"rank-{os.environ['RANK']}.yaml"
    path.write_text(yaml.safe_dump(settings(workplace, case, parallel, rankskit.world_size(), folder)))
    if parallel.startswith("zero"):
        distributed.distributed_state = None  # what it sets up once a process, and refuses to find at a second run
        if not rankskit.ON_GPU and rankskit.world_size() == 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # on one rank it asks for NCCL itself
    trainer = train(path).trainer
    assert len(trainer.train_dataset) == (PACKED if case.get("packed") else UNPACKED)
    rankskit.keep(trainer, parallel, folder)
