"""Two CPU processes: the same loss, the same step, the same logs as one, though the ranks' token counts differ."""

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import ParallelismConfig
from apart import Failed, on_ranks
from packaging import version
from peft import LoraConfig, get_peft_model
from support import all_relative_error, from_dataset, llama, reference_step, role_losses
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig
from trlkit import LEARNING_RATE, dataset, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WITConfigError

HELD_OUT = 7  # with a batch of 2 on each of 2 ranks, the sampler repeats one example to even out the last batch


def train(folder, arguments, evaluate_first=False):
    held_out = dataset("tokenised", HELD_OUT, seed=9)
    trainer = sft_trainer(folder, trainer_kwargs={"eval_dataset": held_out}, **arguments)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        torch.save(weights_of(trainer), folder / "weights.pt")
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


@pytest.mark.parametrize(
    "arguments",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
        {"per_device_train_batch_size": 4, "loss_type": "nll"},
    ],
    ids=["plain", "accumulated", "padding_free", "nll"],
)
def test_two_processes_equal_one(tmp_path, arguments):
    on_ranks(train, tmp_path, {"per_device_eval_batch_size": 2, "eval_strategy": "epoch", **arguments})
    training, evaluation, *_ = json.loads((tmp_path / "logs.json").read_text())

    alone = sft_trainer(tmp_path)
    docs = from_dataset(alone.train_dataset)
    loss, grads = reference_step(alone.model, docs, 0.2, 0.8)
    assert training["loss"] == pytest.approx(loss, rel=1e-5)
    roles = role_losses(alone.model, docs)
    assert {k: training[k] for k in roles} == pytest.approx(roles, rel=1e-5)
    before, after = weights_of(alone), torch.load(tmp_path / "weights.pt")
    taken = {n: (before[n] - after[n]) / LEARNING_RATE for n in grads}
    assert all_relative_error(taken, grads) < 1e-4

    if "padding_free" not in arguments:  # flattened rows hide which examples are repeated; docs/trl.md says so
        alone.model.load_state_dict(after)
        held_out = role_losses(alone.model, from_dataset(dataset("tokenised", HELD_OUT, seed=9)))
        assert {k: evaluation[f"eval_{k}"] for k in held_out} == pytest.approx(held_out, rel=1e-5)


class Logs(TrainerCallback):
    """On one rank alone."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.log({"loss": 1.0, "mine": 1.0})


def train_with_logs_of_one_rank(folder):
    trainer = sft_trainer(folder, per_device_train_batch_size=2, logging_steps=2, ddp_timeout=300)
    trainer.add_callback(Logs(trainer))
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


def test_a_log_that_one_rank_writes(tmp_path):
    """By a callback on the main process: nobody else is there to reduce with, so nothing waits."""
    on_ranks(train_with_logs_of_one_rank, tmp_path)
    entries = json.loads((tmp_path / "logs.json").read_text())
    assert [("prompt_loss" in entry) for entry in entries if "loss" in entry] == [False, False, True]


def test_normalising_on_each_rank_alone_is_refused(tmp_path):
    with pytest.raises(Failed, match="average_tokens_across_devices = False"):
        on_ranks(train, tmp_path, {"average_tokens_across_devices": False, "per_device_train_batch_size": 4})


def test_gradients_that_are_not_averaged_stop_the_run(tmp_path):
    """transformers (seen in 5.16 and 5.23) leaves the model unwrapped when evaluate() runs before train()."""
    with pytest.raises(Failed, match="not wrapped in DistributedDataParallel"):
        on_ranks(train, tmp_path, {"per_device_train_batch_size": 4}, True)


TENSOR_PARALLEL_TRAINS = version.parse(transformers.__version__) >= version.parse("5.23")


def train_tensor_parallel(folder):
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # it wants GPUs for tensor parallelism
    whole = llama(vocab_size=64, hidden_size=32)  # older transformers split only what can be halved
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "model")
    dist.barrier()

    def refused(model, saying, loss_impl):
        trainer = sft_trainer(folder, model=model)
        with pytest.raises(WITConfigError, match=saying):
            WITCallback(trainer, prompt_weight=0.2, response_weight=0.8, loss_impl=loss_impl)

    load = AutoModelForCausalLM.from_pretrained
    model = load(folder / "model", tp_plan="auto")
    assert (getattr(model, "tp_size", None) is not None) == TENSOR_PARALLEL_TRAINS
    if not TENSOR_PARALLEL_TRAINS:  # this transformers does not train such a model, with weights or without
        refused(model, "a transformers before 5.23", "auto")
        refused(model, "set loss_impl to logits", "fused")
        return
    plan = DistributedConfig(tp_size=2, tp_plan={"lm_head": "colwise"})  # which leaves a rank with its own logits
    refused(load(folder / "model", distributed_config=plan), "give lm_head the style colwise_gather_output", "fused")
    adapted = get_peft_model(load(folder / "model", tp_plan="auto"), LoraConfig(target_modules=["q_proj"]))
    refused(adapted, "train all parameters", "logits")

    trainer = sft_trainer(folder, model=model)
    assert model.lm_head.weight.to_local().shape == (32, 32)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8, loss_impl="fused"))
    trainer.train()
    after = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in trainer.model.named_parameters()}
    torch.save((trainer.state.log_history[0], after), folder / f"rank-{dist.get_rank()}.pt")


def test_a_tensor_parallel_head(tmp_path):
    """Trained from its shards where transformers trains such a model; what would not be exact is refused."""
    on_ranks(train_tensor_parallel, tmp_path)
    saved = sorted(tmp_path.glob("rank-*.pt"))
    assert len(saved) == (2 if TENSOR_PARALLEL_TRAINS else 0)
    whole, docs = llama(vocab_size=64, hidden_size=32), from_dataset(dataset("tokenised"))
    loss, grads = reference_step(whole, docs, 0.2, 0.8)
    before, expected = dict(whole.named_parameters()), {"loss": loss, **role_losses(whole, docs)}
    for path in saved:
        logged, after = torch.load(path, weights_only=False)
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert all_relative_error({n: (before[n] - after[n]) / LEARNING_RATE for n in grads}, grads) < 1e-4
