"""What tensor-parallel ranks train, and the reference is computed from; and the training itself, run by torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from datasets import Dataset
from support import all_relative_error, from_dataset, llama, reference_step, role_losses
from traffic import Traffic
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from trlkit import LEARNING_RATE, dataset, sft_trainer
from wit_trl import WITCallback
from words import tokenizer

from wit_plugins import WITConfig, attach, attached

VOCAB, HIDDEN = 509, 32  # a prime number of rows; and more of them than a micro-batch has tokens
WEIGHTS = {"prompt_weight": 0.2, "response_weight": 0.8}
ON_GPU = os.environ.get("WIT_GPU_DEVICE") == "cuda"
PACKED_ROWS = 4  # that TRL makes of the documents with max_length 16
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def model_of(case: dict[str, Any]) -> Any:
    """The whole model, the same at every call."""
    torch.manual_seed(3)
    if case.get("model") == "gemma2":  # a soft cap, and a tied head
        config = Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager")
        return Gemma2ForCausalLM(config)
    if case.get("model") == "phi":  # a head with a bias
        model = PhiForCausalLM(PhiConfig(**_SMALL))
        torch.nn.init.normal_(model.lm_head.bias)
        return model
    tied = case.get("tied", False)
    return llama(vocab_size=VOCAB, hidden_size=HIDDEN, num_attention_heads=4, tie_word_embeddings=tied)


def rows(count: int = 8, seed: int = 0) -> Dataset:
    """Documents whose tokens are from all over the vocabulary, and so of every rank's part."""

    def spread(row: dict[str, list[int]]) -> dict[str, list[int]]:
        return {
            "input_ids": [8 * i + 5 for i in row["input_ids"]],
            "labels": [-100 if i == -100 else 8 * i + 5 for i in row["labels"]],
        }

    return dataset("tokenised", count, seed).map(spread)


def trainer_of(case: dict[str, Any], folder: Path, model: Any) -> Any:
    """The trainer, with the weights attached: all of the data is one step."""
    accumulate = case.get("accumulate", 1)
    arguments = {
        "per_device_train_batch_size": 8 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "use_cpu": not ON_GPU,
        **({"eval_strategy": "epoch", "per_device_eval_batch_size": 4} if case.get("evaluate") else {}),
        **case.get("args", {}),
    }
    if "packing" in arguments:
        arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PACKED_ROWS}
    held_out = rows(7, seed=9) if case.get("evaluate") else None
    settings = {**WEIGHTS, **case.get("settings", {})}
    if case.get("trainer") != "transformers":
        trainer = sft_trainer(folder, rows(), model, {"eval_dataset": held_out}, **arguments)
        trainer.add_callback(WITCallback(trainer, **settings))
        return trainer
    plain = TrainingArguments(
        str(folder / "out"),
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **arguments,
    )
    collator = DataCollatorForSeq2Seq(tokenizer())
    trainer = Trainer(model, plain, data_collator=collator, train_dataset=rows(), eval_dataset=held_out)
    attach(trainer, WITConfig(**settings))
    return trainer


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    """Train every case on the ranks of this launch, tensor parallel; what came of it is written by the first rank."""
    if not ON_GPU:  # which accelerate asks for, though its part is to leave the model as transformers made it
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # type: ignore[method-assign]
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for index, case in enumerate(cases):
        saved = folder / f"model-{index}"
        if rank == 0:
            model_of(case).save_pretrained(saved)
        dist.barrier()
        plan = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(saved, distributed_config=plan, dtype=torch.float32)
        longest = -(-VOCAB // ranks)
        for parameter in model.lm_head.parameters():
            assert parameter.to_local().shape[0] == min(longest, VOCAB - rank * longest), "the head is not split"
        trainer = trainer_of(case, folder, model)
        assert trainer.get_tp_size() == ranks == trainer.accelerator.num_processes
        with Traffic() as traffic:
            trainer.train()
        loss_impl = case.get("settings", {}).get("loss_impl", "fused")
        assert attached(trainer).head.chosen == loss_impl  # type: ignore[union-attr]
        assert trainer.state.global_step == 1
        after = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in trainer.model.named_parameters()}
        if rank == 0:
            torch.save({name: tensor.cpu() for name, tensor in after.items()}, folder / f"case-{index}.pt")
            log = {"history": trainer.state.log_history, "largest": traffic.largest, "calls": len(traffic.calls)}
            (folder / f"case-{index}.json").write_text(json.dumps(log))
    dist.destroy_process_group()


def assert_step_of_one_process(folder: Path, index: int, case: dict[str, Any], alone: Path) -> None:
    """Compare what the ranks wrote of a case with the formula, or, for strategies, with one process in `alone`."""
    told = json.loads((folder / f"case-{index}.json").read_text())
    model, docs = model_of(case), from_dataset(rows())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = case.get("settings", {})
    if "strategies" in settings:
        trainer = trainer_of(case, alone, model)
        trainer.train()
        loss = trainer.state.log_history[0]["loss"]
        grads = {n: (before[n] - p.detach().cpu()) / LEARNING_RATE for n, p in trainer.model.named_parameters()}
        roles = {}
    else:
        normalization = settings.get("normalization", "nonzero_tokens")
        loss, grads = reference_step(model, docs, *WEIGHTS.values(), normalization=normalization)
        roles = role_losses(model, docs)
    first = told["history"][0]
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert {key: first[key] for key in roles} == pytest.approx(roles, rel=1e-5)
    after = torch.load(folder / f"case-{index}.pt")
    taken = {name: (before[name] - after[name]) / LEARNING_RATE for name in grads}
    assert all_relative_error(taken, grads) < 1e-4
    if case.get("evaluate"):
        evaluation = next(entry for entry in told["history"] if "eval_loss" in entry)
        model.load_state_dict(after)
        roles = role_losses(model, from_dataset(rows(7, seed=9)))
        assert {key: evaluation[f"eval_{key}"] for key in roles} == pytest.approx(roles, rel=1e-5)
    # transformers gathers the logits of all tokens, and drawing targets takes a chunk's whole distribution. Otherwise
    # nothing as large as the head is sent, the sixteen positions of the first check included.
    assert told["calls"] > 0
    gathers = settings.get("loss_impl") == "logits" or "otr" in settings.get("strategies", {})
    assert (told["largest"] >= VOCAB * HIDDEN) == gathers


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
