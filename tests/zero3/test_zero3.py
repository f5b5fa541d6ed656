"""DeepSpeed's ZeRO-3 itself, on two CPU processes: the head's weight is partitioned, the step is the formula's.

Outside `make test`, since DeepSpeed is built from source: `nox -s zero3`.
"""

import json
import subprocess
import sys

import pytest
from support import subprocess_env

SCRIPT = """
import json, os, pathlib, sys
import deepspeed, torch
from support import all_relative_error, documents, llama, reference_step
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.loss.loss_call import LossCall
from wit_plugins.contract.active import ActiveStrategies

deepspeed.init_distributed("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
kind, out = sys.argv[1], pathlib.Path(sys.argv[2])
docs = documents(8, seed=5)
model = llama(tie_word_embeddings=kind == "tied")
before = {n: p.detach().clone() for n, p in model.named_parameters()}
loss, grads = reference_step(model, docs, 0.2, 0.8)
if kind == "frozen":
    model.lm_head.weight.requires_grad_(False)
    del grads["lm_head.weight"]
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 1e9,  # its default is 1.0
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
assert world == 2 and model.lm_head.weight.numel() == 0  # a part of it is somewhere else
strategies = ActiveStrategies({"wit": {"prompt_weight": 0.2, "response_weight": 0.8}})
head = WeightedHead(model, strategies, TrainerAdapter(), "nonzero_tokens", "fused")

def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    def padded(name, fill):
        return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}

own = torch.zeros(())
batch = WeightedCollator(collate, strategies)([d.example() for d in docs[rank::world]])
count = sum(len(d.input_ids) - 1 for d in docs)
head.begin(LossCall(torch.tensor(count), True))
output = engine(**batch)
own += head.outcome.result.loss.detach()
torch.distributed.all_reduce(own)
engine.backward(output.loss * world)  # the ranks' gradients are averaged
engine.step()
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    taken = {n: (before[n] - p.detach()) / 0.05 for n, p in model.named_parameters() if n in grads}
if rank == 0:
    error = all_relative_error(taken, grads)
    out.write_text(json.dumps({"loss": own.item(), "expected": loss, "error": error, "chosen": head.chosen}))
"""


@pytest.mark.parametrize("kind", ["plain", "tied", "frozen"])
def test_one_step(tmp_path, kind):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    env = subprocess_env(DS_ACCELERATOR="cpu")
    done = subprocess.run([*command, kind, "out.json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["chosen"] == "fused"
    assert result["loss"] == pytest.approx(result["expected"], rel=1e-5)
    assert result["error"] < 1e-4
