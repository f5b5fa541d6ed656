"""Two processes over NCCL, a GPU each: the loss and the step are those of one process (on a CPU: over gloo).

Data parallel, fully sharded and tensor parallel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version

pytest.importorskip("trl.trainer", reason="TRL is not installed", exc_type=ImportError)
from gpukit import DEVICE, ON_GPU, WEIGHTS, skip_if
from support import all_relative_error, from_dataset, llama, reference_step, subprocess_env
from trlkit import LEARNING_RATE, dataset

KITS = Path(__file__).parents[1] / "kits"
SCRIPT = """
import json, pathlib, sys, torch
import torch.distributed as dist
from support import llama
from trlkit import sft_trainer
from wit_trl import WITCallback
folder, arguments = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
trainer = sft_trainer(folder, model=llama(tie_word_embeddings=arguments.pop("tied", False)), **arguments)
trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
trainer.train()
assert dist.get_backend() == ("gloo" if arguments["use_cpu"] else "nccl") or "cuda:nccl" in dist.get_backend()
sharded = any(hasattr(p, "full_tensor") for p in trainer.model.parameters())
assert sharded == bool(arguments.get("fsdp"))
after = {n: getattr(p, "full_tensor", lambda p=p: p)().detach().cpu() for n, p in trainer.model.named_parameters()}
if trainer.accelerator.is_main_process:
    torch.save({n.removeprefix("module."): p for n, p in after.items()}, folder / "after.pt")
    (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
dist.destroy_process_group()
"""
FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "tied": True},
        {"per_device_train_batch_size": 4, **FSDP2},
        {"per_device_train_batch_size": 4, "tied": True, **FSDP2},
    ],
    ids=["DDP", "DDP accumulated", "DDP tied", "FSDP2", "FSDP2 tied"],
)
def test_two_ranks_equal_one(device, tmp_path, arguments):
    skip_if("accelerate starts FSDP on GPUs only" if "fsdp" in arguments and not ON_GPU else None)
    few = ON_GPU and torch.cuda.device_count() < 2
    skip_if(f"needs two GPUs; here is {torch.cuda.device_count()}" if few else None)
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    command += [str(tmp_path), json.dumps({**arguments, "use_cpu": not ON_GPU})]
    env = subprocess_env(WIT_GPU_DEVICE=DEVICE)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    model = llama(tie_word_embeddings=arguments.get("tied", False))
    loss, grads = reference_step(model, from_dataset(dataset("tokenised")), *WEIGHTS)
    first, *_ = json.loads((tmp_path / "logs.json").read_text())
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    after, before = torch.load(tmp_path / "after.pt"), dict(model.named_parameters())
    taken = {n: (before[n].detach() - after[n]) / LEARNING_RATE for n in grads}
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"accumulate": 2, "tied": True},
        {"model": "gemma2"},
        {"model": "phi"},
        {"settings": {"strategies": {"eaft": {}}}},
        {"settings": {"strategies": {"otr": {"samples": 4, "beta": 0.1, "temperature": 1.0}}}},
    ],
    ids=["plain", "accumulated, tied", "a soft cap", "a bias", "entropies", "drawn targets"],
)
def test_two_halves_of_a_model_take_the_step_of_the_whole(device, tmp_path, case):
    """Tensor parallelism, `tp_plan="auto"`: the kernel runs on each rank's part of the vocabulary."""
    few = ON_GPU and torch.cuda.device_count() < 2
    skip_if(f"needs two GPUs; here is {torch.cuda.device_count()}" if few else None)
    skip_if(None if version.parse(transformers.__version__) >= version.parse("5.23") else "needs transformers 5.23")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(KITS / "ranks_tensor.py"), str(tmp_path), json.dumps([case])]
    env = subprocess_env(WIT_GPU_DEVICE=DEVICE)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    from ranks_tensor import assert_step_of_one_process

    assert_step_of_one_process(tmp_path, 0, case, tmp_path / "alone")
