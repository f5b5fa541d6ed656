"""One of torchrun's processes: trains and evaluates every case, with rows that are cut over ranks.

run_context.py FOLDER RANKS_OF_A_ROW DEVICE CASES. By the environment, it is FSDP2 with torch's context parallelism or
DeepSpeed with Ulysses; the stage of ZeRO is WIT_TEST_STAGE.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from context_cases import EVALUATED, LEARNING_RATE, LORA, documents_of, model_of
from datasets import Dataset
from peft import LoraConfig
from rankskit import full_parameters, zero
from support import PLAIN_SGD
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from words import tokenizer

from wit_plugins import WITConfig, WITError, attach

FOLDER, PARTS, DEVICE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
WORLD = int(os.environ["WORLD_SIZE"])
WAY = "sp_size" if "ACCELERATE_USE_DEEPSPEED" in os.environ else "cp_size"
STAGE = int(os.environ.get("WIT_TEST_STAGE", "2"))
PARALLEL = f"zero{STAGE}" if WAY == "sp_size" else "fsdp2"


def trainer_of(case: dict[str, Any]) -> Any:
    rows = Dataset.from_list([doc.example() for doc in documents_of(case)])
    given = dict(case.get("args", {}))
    # All documents are one step. DeepSpeed goes through the batches of a row's ranks one after the other.
    accumulated, most = given.pop("gradient_accumulation_steps", 1), len(rows) * PARTS // WORLD
    accumulated = min(accumulated * (PARTS if WAY == "sp_size" else 1), most)
    settings = {
        "per_device_train_batch_size": most // accumulated,
        "gradient_accumulation_steps": accumulated,
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
        "learning_rate": LEARNING_RATE,
        **PLAIN_SGD,
        "use_cpu": DEVICE == "cpu",
        "dataloader_pin_memory": False,
        **({"deepspeed": zero(STAGE)} if WAY == "sp_size" else {}),
        **given,
    }
    stream = rows.to_iterable_dataset() if case.get("stream") else rows
    data = {"train_dataset": stream, "eval_dataset": rows.select(range(EVALUATED)), "processing_class": tokenizer()}
    folder = str(FOLDER / "out")
    if case.get("trainer") == "transformers":
        collator = DataCollatorForSeq2Seq(tokenizer(), padding=True)
        collator.tokenizer.padding_side = case.get("side", "right")
        return Trainer(model_of(case), TrainingArguments(folder, **settings), data_collator=collator, **data)
    settings = {"bf16": False, "gradient_checkpointing": False, "max_length": 64, **settings}
    lora = {"peft_config": LoraConfig(**LORA)} if case.get("lora") else {}
    return SFTTrainer(model_of(case), SFTConfig(folder, **settings), **data, **lora)


def whole(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters before they are sharded."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(case: dict[str, Any], index: int) -> None:
    torch.manual_seed(0)
    trainer = trainer_of(case)
    if case.get("lora"):  # the second factor starts at zero, under which the first has no gradient
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(trainer.model.named_parameters()):
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    before = whole(trainer.model)
    lengths: dict[str, set[int]] = {"training": set(), "evaluation": set()}

    def record(module: Any, arguments: Any) -> None:
        lengths["training" if trainer.model.training else "evaluation"].add(arguments[0].shape[1])

    trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings().register_forward_pre_hook(record)
    prompt_weight, response_weight = case.get("weights", (0.2, 0.8))
    settings = {"prompt_weight": prompt_weight, "response_weight": response_weight, **case.get("settings", {})}
    try:
        attach(trainer, WITConfig(**settings))
        trainer.train()
    except WITError as error:
        if trainer.is_world_process_zero():
            (FOLDER / f"case-{index}.json").write_text(json.dumps({"error": str(error)}))
        return
    assert trainer.state.global_step == 1
    after = {name: parameter.cpu() for name, parameter in full_parameters(trainer, PARALLEL).items()}
    evaluation = trainer.evaluate()
    seen: list[Any] = [None] * WORLD
    dist.all_gather_object(seen, lengths)
    mesh = trainer.accelerator.torch_device_mesh
    result = {
        "logs": trainer.state.log_history,
        "evaluation": evaluation,
        "lengths": {when: sorted(set().union(*(of[when] for of in seen))) for when in lengths},
        "way": WAY,
        "mesh": None if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
        "chosen": trainer._wit.head.chosen,
        "exchanges": dict(lacking.calls) if DEVICE == "cpu" else None,
    }
    if trainer.is_world_process_zero():
        torch.save({"before": before, "after": after}, FOLDER / f"case-{index}.pt")
        (FOLDER / f"case-{index}.json").write_text(json.dumps(result))


lacking: Any = importlib.import_module("ring_on_cpu" if WAY == "cp_size" else "ulysses_on_cpu")
if DEVICE == "cpu":
    lacking.install()
for number, one in enumerate(json.loads(sys.argv[4])):
    run(one, number)
    if WAY == "sp_size":
        lacking.forget()
dist.destroy_process_group()
