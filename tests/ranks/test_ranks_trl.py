"""TRL on one, two and four ranks: the first loss, every gradient and the parameters after the step are one process's.

A table of cases over DDP, on the CPU over gloo; accelerate starts FSDP on GPUs only. All cases run in one launch. Not
in `make test`, which has a cross-section (`tests/trl/test_distributed.py`, `tests/core`): `nox -s ranks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks_trl import LORA, documents_of
from support import all_relative_error, from_dataset, llama, reference_step, subprocess_env
from trlkit import LEARNING_RATE

WEIGHTS = (0.2, 0.8)
# Eight documents of 4 to 12 tokens: the ranks' numbers of tokens differ in every case.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"accumulate": 2},
    "tied": {"tied": True},
    "LoRA": {"lora": True},
    "LoRA accumulated": {"lora": True, "accumulate": 2},
    "logits": {"loss_impl": "logits"},
    "weight_sum": {"normalization": "weight_sum"},
    "padding-free": {"args": {"padding_free": True, "max_length": None}},
    "packed": {"args": {"packing": True, "max_length": 16}},
    "packed LoRA": {"lora": True, "args": {"packing": True, "max_length": 16}},
    "a rank without weighted tokens": {"silent": True},
    "a rank without weighted tokens, packed": {"silent": True, "args": {"packing": True, "max_length": 16}},
}
SCRIPT = """
import json, os, pathlib, sys, torch
import torch.distributed as dist
from peft import LoraConfig
from ranks_trl import LORA, PACKED_ROWS, documents_of
from support import llama
from trlkit import sft_trainer
from trl import SFTConfig
from wit_trl import WITCallback, prepare_dataset
from words import tokenizer

folder, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for index, case in enumerate(cases):
    torch.manual_seed(0)
    world, accumulate = int(os.environ["WORLD_SIZE"]), case.get("accumulate", 1)
    arguments = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        **case.get("args", {}),
    }
    model = llama(tie_word_embeddings=case.get("tied", False))
    data = prepare_dataset(documents_of(case), tokenizer(), SFTConfig(str(folder), use_cpu=True, bf16=False))
    # All of the data is one step.
    arguments["per_device_train_batch_size"] = len(data) // (world * accumulate)
    if "packing" in arguments:
        arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PACKED_ROWS // world}
    others = {"peft_config": LoraConfig(**LORA)}
    trainer = sft_trainer(folder, data, model, others if case.get("lora") else {}, **arguments)
    if case.get("lora"):  # the second factor starts at zero, under which the first has no gradient
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(trainer.model.named_parameters()):
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    settings = {key: case[key] for key in ("loss_impl", "normalization") if key in case}
    assert len(trainer.train_dataset) == (PACKED_ROWS if "packing" in arguments else len(data))
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8, **settings))
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.accelerator.num_processes == world
    after = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            after[name] = parameter.detach()
    if trainer.accelerator.is_main_process:
        torch.save({"before": before, "after": after}, folder / f"case-{index}.pt")
        (folder / f"case-{index}.json").write_text(json.dumps(trainer.state.log_history))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def expected(case: dict[str, Any], before: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients from the formula in float64, of all documents in one process, at these parameters."""
    model: Any = llama(tie_word_embeddings=case.get("tied", False))
    if case.get("lora"):
        model = get_peft_model(model, LoraConfig(**LORA))
    model.load_state_dict(before, strict=False)
    docs = [doc for doc, row in zip(from_dataset(documents_of(case)), documents_of(case), strict=True) if row["weight"]]
    return reference_step(model, docs, *WEIGHTS, normalization=case.get("normalization", "nonzero_tokens"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which all cases have been run on so many ranks, once."""
    folders: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in folders:
            folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
            (folder / "run.py").write_text(SCRIPT)
            arguments = [str(folder), json.dumps(list(CASES.values()))]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            environment = subprocess_env()
            environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
            done = subprocess.run(
                [*command, "run.py", *arguments],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
            )
            (folder / "output").write_text(done.stdout + done.stderr)
            folders[ranks] = folder
        return folders[ranks]

    return of


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_so_many_ranks_take_the_step_of_one(launched: Any, ranks: int, case: str) -> None:
    folder, index = launched(ranks), list(CASES).index(case)
    log = folder / f"case-{index}.json"
    assert log.is_file(), (folder / "output").read_text()[-4000:]
    first, *_ = json.loads(log.read_text())
    saved = torch.load(folder / f"case-{index}.pt")
    loss, grads = expected(CASES[case], saved["before"])
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    before, after = saved["before"], saved["after"]
    assert set(after) == set(before) == set(grads)
    taken = {n: (before[n] - after[n]) / LEARNING_RATE for n in grads}
    assert all_relative_error(taken, grads) < 1e-4


def test_the_table_would_see_a_wrong_denominator() -> None:
    """Each rank's own mean, which is what a step without the global count would take, is another loss."""
    docs = documents_of({})
    model = llama()
    loss, _ = reference_step(model, from_dataset(docs), *WEIGHTS)
    halves = [reference_step(model, from_dataset(docs.select(range(i, len(docs), 2))), *WEIGHTS)[0] for i in (0, 1)]
    assert abs(sum(halves) / 2 - loss) > 1e-3 * loss
