"""Heads whose parameters are spread over several devices."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from headkit import (
    assert_close,
    make,
    reference,
)
from support import subprocess_env

from wit_plugins.linear_cross_entropy import (
    weighted_linear_cross_entropy,
)


def test_zero3_parameters_are_gathered_while_projecting(monkeypatch):
    """A stand-in for DeepSpeed: a parameter of length 0 that its context manager fills and empties again."""
    hidden, weight, bias, targets, token_weights = make(with_bias=True)
    full = {id(p): p.detach().clone() for p in (weight, bias)}
    log = []

    class GatheredParameters:
        def __init__(self, params):
            self.params = params

        def __enter__(self):
            log.append([tuple(p.shape) for p in self.params])
            for p in self.params:
                p.data = full[id(p)]

        def __exit__(self, *_):
            for p in self.params:
                p.data = torch.empty(0)

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    expected, (grad_hidden, grad_weight, grad_bias) = reference(hidden, weight, bias, targets, token_weights)
    for number, parameter in enumerate((weight, bias)):
        parameter.ds_id, parameter.ds_status = number, types.SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0)
    loss = weighted_linear_cross_entropy(hidden, weight, targets, token_weights, bias=bias, impl="torch")
    assert log == [[(0,), (0,)]]
    assert weight.numel() == bias.numel() == 0
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    assert_close(loss.detach(), expected, torch.float32)
    for grad, want in zip(grads, (grad_hidden, grad_weight, grad_bias), strict=True):
        assert_close(grad, want, torch.float32)

    # Gathered already (tied embeddings while the model runs): left alone.
    for parameter in (weight, bias):
        parameter.ds_status = types.SimpleNamespace(name="AVAILABLE")
        parameter.data = full[id(parameter)]
    weighted_linear_cross_entropy(hidden, weight, targets, token_weights, bias=bias, impl="torch").backward()
    assert len(log) == 1


FSDP = """
import sys, torch, torch.distributed as dist
import headkit as t
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

rank, path, half = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "half"
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
batches = [t.make(seed=seed, with_bias=True) for seed in (1, 2)]
_, weight, bias, _, _ = batches[0]
head = torch.nn.Linear(t.H, t.V)
with torch.no_grad():
    head.weight.copy_(weight), head.bias.copy_(bias)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if half else MixedPrecisionPolicy()
fully_shard(head, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
hidden, _, _, targets, token_weights = batches[rank]
if half:
    hidden = hidden.detach().bfloat16().requires_grad_()
loss = t.weighted_linear_cross_entropy(hidden, head.weight, targets, token_weights, bias=head.bias, num_items=11)
loss.backward()
results = [t.reference(b[0].bfloat16() if half else b[0], weight, bias, *b[3:], num_items=11) for b in batches]
dtype = torch.bfloat16 if half else torch.float32
t.assert_close(loss.detach(), results[rank][0], dtype)
t.assert_close(hidden.grad, results[rank][1][0], dtype)
for place, parameter in ((1, head.weight), (2, head.bias)):  # the average over the ranks, as FSDP2 itself would take
    mean = (results[0][1][place] + results[1][1][place]) / 2
    assert parameter.grad.placements == parameter.placements
    assert parameter.grad.dtype == torch.float32
    t.assert_close(parameter.grad.full_tensor(), mean, dtype)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["single", "half"])
def test_fsdp2_head(precision, tmp_path):
    """Two processes with different batches: the sharded gradient is the mean of both, as FSDP2 itself makes it."""
    env = subprocess_env(CUDA_VISIBLE_DEVICES="", WORLD_SIZE="2")
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "store"), precision] for rank in (0, 1)]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
