"""A head whose vocabulary is split over ranks: everything is what the whole head makes of it, and it stays split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import subprocess_env

START = """
import functools, itertools, sys, torch, torch.distributed as dist
import headkit as t
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from traffic import Traffic
from wit_plugins.linear_cross_entropy import Head, Tokens, linear_nll, softmax, chunk_plan

rank, ranks, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def split(parameter):
    return None if parameter is None else distribute_tensor(parameter.detach(), mesh, [Shard(0)]).requires_grad_()


def same_everywhere(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(everyone, tensor)
    assert all(torch.equal(tensor, other) for other in everyone)
"""

VALUES = """
# Chunks of 7 tokens for a part of 51 rows, which would be 8 for one of 50: the ranks have to walk in step.
small = {"_CHUNK_ELEMENTS": 407, "_MIN_CHUNK_TOKENS": 1}
large = {name: getattr(chunk_plan, name) for name in small}
options = [{}, {"logit_scale": 0.3, "softcap": 2.0}, {"logit_scale": -1.5}]
for dtype, choice, chunks in itertools.product(t.FLOATS, options, (large, small)):
    for name, value in chunks.items():
        setattr(chunk_plan, name, value)
    hidden, weight, bias, targets, token_weights = t.make(dtype=dtype, with_bias=chunks is small)
    expected, wanted = t.reference(
        hidden, weight, bias, targets, token_weights, num_items=11, scale=choice.get("logit_scale", 1.0),
        cap=choice.get("softcap"),
    )
    shards = [split(weight), split(bias)]
    assert shards[0].to_local().shape[0] == min(-(-t.V // ranks), t.V - rank * -(-t.V // ranks))
    with Traffic() as traffic:
        loss = t.weighted_linear_cross_entropy(
            hidden, shards[0], targets, token_weights, bias=shards[1], num_items=11, impl=sys.argv[4], **choice
        )
        loss.backward()
    tokens = ((targets != -100) & (token_weights != 0)).sum()
    assert sum(size for name, size in traffic.calls if name == "allgather_") == 3 * tokens * ranks, traffic.calls
    assert [size for name, size in traffic.calls if name != "allgather_"] == [hidden.numel()], traffic.calls
    same_everywhere(loss.detach())
    same_everywhere(hidden.grad)
    t.assert_close(loss.detach(), expected, dtype, f"{choice} loss")
    t.assert_close(hidden.grad, wanted[0], dtype, f"{choice} hidden")
    for parameter, want in zip(shards, wanted[1:], strict=False):
        assert parameter.grad.placements == (Shard(0),)
        t.assert_close(parameter.grad.full_tensor(), want, dtype, f"{choice} head")
    with torch.no_grad():
        again = t.weighted_linear_cross_entropy(
            hidden, shards[0], targets, token_weights, bias=shards[1], num_items=11, impl=sys.argv[4], **choice
        )
    assert torch.equal(again, loss)

# Nothing to train on: a differentiable 0 on every rank, and nobody waits.
hidden, weight, _, targets, token_weights = t.make()
shard = split(weight)
t.weighted_linear_cross_entropy(hidden, shard, torch.full_like(targets, -100), token_weights).backward()
assert not hidden.grad.any() and not shard.grad.full_tensor().any()

# A frozen head: only the hidden states' gradient.
hidden, weight, _, targets, token_weights = t.make()
shard = split(weight).detach()
t.weighted_linear_cross_entropy(hidden, shard, targets, token_weights).backward()
t.assert_close(hidden.grad, t.reference(hidden, weight, None, targets, token_weights)[1][0], torch.float32)
"""

FACTS = """
def drawn(probabilities, tokens):
    # Targets that depend on the whole distribution: the first and the second choice, and the first once more.
    assert probabilities.shape == (tokens.stop - tokens.start, t.V)
    ids = probabilities.topk(2, dim=-1).indices
    return torch.cat([ids, ids[:, :1]], dim=1), probabilities.new_tensor([0.5, 0.25, 0.125]).expand(len(ids), 3)


def by_all(log_probs, tokens, entropies):
    return log_probs.exp() / log_probs.exp().mean() + sum(entropies.values())


def by_one(log_probs, tokens, entropies):
    return torch.where(log_probs > -4, log_probs.exp(), 0) + entropies[0] * entropies[3] * (1 + entropies.get(-1, 0))


def squared(log_probs, tokens):
    return log_probs.square(), -2 * log_probs


cases = {
    "replaced": {"replace": squared, "rescale": t.Rescale(by_one), "entropies": (0, 3)},
    "facts": {"with_correct": True, "with_entropy": True},
    "one by one": {"rescale": t.Rescale(by_one), "entropies": (-1, 0, 3, 60)},
    "all at once": {"rescale": t.Rescale(by_all, per_token=False), "entropies": (-1, 0, 5)},
    "drawn": {"retarget": drawn},
    "drawn and all at once": {
        "retarget": drawn, "rescale": t.Rescale(by_all, per_token=False), "entropies": (300,), "with_entropy": True,
    },
    "the target is the first choice": {"with_correct": True, "likely": True},
}
shapes, dtypes = [(0.3, 2.0)], [torch.float32]
if sys.argv[4] != "triton":  # its kernel is interpreted, which is slow
    shapes, dtypes = [(1.0, None), (-0.7, None), *shapes], [torch.float64, *dtypes]
for (name, case), (scale, cap), dtype in itertools.product(cases.items(), shapes, dtypes):
    likely = case.get("likely", False)
    case = {key: value for key, value in case.items() if key != "likely"}
    hidden, weight, bias, targets, token_weights = t.make(dtype=dtype, with_bias=True)
    targets = targets.clamp(min=0)
    if likely:
        targets[::2] = (scale * (hidden @ weight.t() + bias)).argmax(dim=-1)[::2]
    tokens = Tokens(targets, token_weights.double(), num_items=7, **case)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    whole = linear_nll(leaves[0], Head(leaves[1], leaves[2], scale, cap), tokens, "logits")
    whole.loss.backward()
    shards = [split(weight), split(bias)]
    mine = linear_nll(hidden, Head(*shards, scale, cap), tokens, sys.argv[4])
    mine.loss.backward()
    t.assert_close(mine.loss.detach(), whole.loss.detach(), dtype, name)
    t.assert_close(mine.nll, whole.nll, dtype, f"{name}: nll")
    same_everywhere(mine.nll)
    if "with_entropy" in case:
        t.assert_close(mine.entropy, whole.entropy, dtype, f"{name}: entropy")
    if "with_correct" in case:
        assert torch.equal(mine.correct, whole.correct) and (mine.correct.any() or not likely)
    grads = [hidden.grad, *(shard.grad.full_tensor() for shard in shards)]
    for grad, leaf, what in zip(grads, leaves, ("hidden", "weight", "bias"), strict=True):
        t.assert_close(grad, leaf.grad, dtype, f"{name}: gradient of {what}, scale {scale}, cap {cap}")
"""

CONFIDENT = """
# Where the model is sure, the target's gradient p - 1 is a small number: as exact in half precision as any other.
hidden, weight, _, targets, token_weights = t.make(h=64, dtype=torch.float16, ignored=0, zeros=0)
hidden = (10 * torch.nn.functional.normalize(weight.detach().float()[targets])).half().requires_grad_()
weight = torch.nn.functional.normalize(weight.detach().float()).half()
expected, (want, _) = t.reference(hidden, weight, None, targets, token_weights)
assert expected < 0.01
shard = split(weight)
t.weighted_linear_cross_entropy(hidden, shard, targets, token_weights, impl=sys.argv[4]).backward()
t.assert_close(hidden.grad, want, torch.float16)
"""

REFUSED = """
import pytest
from wit_plugins import WITConfigError
hidden, weight, bias, targets, token_weights = t.make(with_bias=True)
call = functools.partial(t.weighted_linear_cross_entropy, hidden, targets=targets, token_weights=token_weights)
for refused, says in (
    ({"lm_head_weight": distribute_tensor(weight.detach(), mesh, [Shard(1)])}, "not in consecutive rows"),
    ({"lm_head_weight": split(weight), "bias": bias.detach()}, "its weight alone"),
    ({"lm_head_weight": weight.detach(), "bias": split(bias)}, "its bias alone"),
    ({"lm_head_weight": split(weight[: ranks - 1])}, "into unknown parts"),
):
    with pytest.raises(WITConfigError, match=f"tensor parallelism, {says}.*set loss_impl to logits"):
        call(**refused)
whole = distribute_tensor(weight.detach(), mesh, [Replicate()])
assert torch.equal(call(lm_head_weight=whole), call(lm_head_weight=weight))
"""


def run(tmp_path: Path, ranks: int, impl: str, *parts: str, **changes: str) -> None:
    """The parts of a script on so many ranks, each of which must end well."""
    env = subprocess_env(CUDA_VISIBLE_DEVICES="", **changes)
    (tmp_path / "script.py").write_text("".join([START, *parts, "dist.destroy_process_group()\n"]))
    command = [sys.executable, str(tmp_path / "script.py")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store"), impl],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=500)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * ranks, "\n".join(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])  # of 101 rows: 51 and 50, or 34, 34 and 33
def test_a_split_vocabulary(tmp_path: Path, ranks: int) -> None:
    run(tmp_path, ranks, "torch", VALUES, FACTS, CONFIDENT, REFUSED)


@pytest.mark.slow
def test_a_split_vocabulary_with_the_kernel(tmp_path: Path) -> None:
    """Triton's kernel on each rank's own logits (interpreted, so that it runs here)."""
    run(tmp_path, 2, "triton", FACTS, CONFIDENT, TRITON_INTERPRET="1")
