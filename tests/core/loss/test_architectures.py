"""The fused head in real architectures at tiny sizes: each equals its own full-logits loss, gradient for gradient."""

import copy
import logging

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from patchkit import run
from support import VOCAB_SIZE, all_relative_error

from wit_plugins import WITConfigError
from wit_plugins.training.adapter import TrainerAdapter

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.3, "output_router_logits": True}

# Architecture, what its configuration needs beyond the sizes.
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3": {"query_pre_attn_scalar": 8},
    "Phi3": {},
    "Cohere": {"logit_scale": 0.37},
    "Granite": {"logits_scaling": 3.0},
    "FalconH1": {
        "lm_head_multiplier": 0.7,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
    },
    "Qwen3Moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 8},
    "Mixtral": {**EXPERTS, "num_local_experts": 4},
    "GptOss": {**EXPERTS, "num_local_experts": 4},
}


def build(name):
    torch.manual_seed(1)
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    config = getattr(transformers, config_name)(**SIZES, **ARCHITECTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # Large logits, so that a soft cap bends them and a missing factor shows.
    model.get_output_embeddings().weight.data.mul_(2)
    return model.train()


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_its_own_logits(name, calls):
    model = build(name)
    expected, expected_outcome, _, expected_grads = run(copy.deepcopy(model), "logits", calls=calls)
    output, outcome, head, grads = run(model, "auto", calls=calls)
    assert head.chosen == "fused"
    assert type(output) is type(expected)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert all_relative_error(grads, expected_grads) < 1e-5
    assert torch.allclose(outcome.result.role_sums, expected_outcome.result.role_sums, rtol=1e-5)
    if "router_aux_loss_coef" in ARCHITECTURES[name]:
        assert torch.allclose(output.aux_loss, expected.aux_loss)
        assert output.loss.item() - outcome.result.loss.item() == pytest.approx(0.3 * output.aux_loss.item(), rel=1e-4)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_metrics_come_out_of_the_same_pass():
    class Metrics(TrainerAdapter):
        response_metrics = True

    model = build("Gemma2")
    _, expected, *_ = run(copy.deepcopy(model), "logits", adapter=Metrics())
    _, outcome, *_ = run(model, "auto", adapter=Metrics())
    assert outcome.result.correct == expected.result.correct
    assert torch.allclose(outcome.result.entropy, expected.result.entropy, rtol=1e-5)


def test_hidden_states_are_kept():
    output, *_ = run(build("Llama"), "auto", output_hidden_states=True)
    assert len(output.hidden_states) == 3


def test_without_gradients():
    model = build("Llama").eval()
    with torch.no_grad():
        expected, *_ = run(copy.deepcopy(model), "logits", training=False)
        output, *_ = run(model, "auto", training=False)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_device_map_keeps_its_hooks():
    """accelerate moves the head's inputs and weights in a wrapper of its forward; offloaded, they are nowhere else."""
    model = build("Llama").eval()
    with torch.no_grad():
        expected, *_ = run(copy.deepcopy(model), "logits", training=False)
        head = model.get_output_embeddings()
        weights = {"weight": head.weight.detach().clone()}
        add_hook_to_module(head, AlignDevicesHook("cpu", offload=True, weights_map=weights))
        assert head.weight.device.type == "meta"
        for calls in (1, 2):  # checked against the model's own logits the first time, not the second
            output, _, wit, _ = run(model, "fused", training=False, calls=calls)
            assert wit.chosen == "fused"
            assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
            assert head.weight.device.type == "meta"


class ProcessingLlama(transformers.LlamaForCausalLM):
    """Post-processes its logits, and computes its own loss from what comes out."""

    def process(self, logits):
        raise NotImplementedError

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.process(output.logits)
        if labels is not None:
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=VOCAB_SIZE)
        return output


class SquashedLlama(ProcessingLlama):
    """Post-processes its logits in a way that no configuration names."""

    def process(self, logits):
        return logits - 0.1 * logits**2


class CappedLlama(ProcessingLlama):
    """Caps its logits under a name that is nobody else's, as RecurrentGemma does."""

    cap = 2.0

    def process(self, logits):
        return self.cap * torch.tanh(logits / self.cap)


@pytest.mark.parametrize(
    ("cap", "dtype"), [(2.0, torch.float32), (30.0, torch.float32), (30.0, torch.bfloat16), (300.0, torch.bfloat16)]
)
def test_an_unknown_cap_is_found_while_logits_are_small(cap, dtype):
    """At the start of training a cap hardly changes anything: (z / cap)^2 / 3 of these logits is far below 1e-4."""
    torch.manual_seed(1)
    model = CappedLlama(transformers.LlamaConfig(**SIZES)).to(dtype)
    model.cap = cap
    model.lm_head.weight.data.mul_(0.002)
    expected, *_, expected_grads = run(copy.deepcopy(model), "logits")
    output, _, head, grads = run(model, "auto")
    assert head.chosen == "logits"
    assert output.loss.item() == expected.loss.item()
    assert all_relative_error(grads, expected_grads) == 0


def test_recurrent_gemma_is_trained_from_its_logits():
    torch.manual_seed(1)
    sizes = {**SIZES, "block_types": ("recurrent", "attention"), "lru_width": 16, "attention_window_size": 64}
    model = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**sizes, logits_soft_cap=2.0))
    model.get_output_embeddings().weight.data.mul_(0.002)
    output, _, head, _ = run(model.train(), "auto", use_cache=False)
    assert head.chosen == "logits"
    assert output.logits is not None


class TwoHeads(ProcessingLlama):
    """Calls its head twice."""

    def forward(self, *args, labels=None, **kwargs):
        self.first = None
        self.first = super().forward(*args, **kwargs).logits
        return super().forward(*args, labels=labels, **kwargs)

    def process(self, logits):
        return logits if self.first is None else logits + self.first


@pytest.mark.parametrize(
    ("cls", "reason"), [(SquashedLlama, "changes its logits in a way that is not known"), (TwoHeads, "2 times")]
)
def test_what_is_not_known_falls_back_to_logits(cls, reason, caplog):
    torch.manual_seed(1)
    model = cls(transformers.LlamaConfig(**SIZES))
    expected, *_, expected_grads = run(copy.deepcopy(model), "logits")
    with caplog.at_level(logging.WARNING):
        output, _, head, grads = run(model, "auto")
    assert head.chosen != "fused"
    assert output.loss.item() == expected.loss.item()
    assert all_relative_error(grads, expected_grads) == 0
    ours = [record.message for record in caplog.records if record.name.startswith("wit_plugins")]
    assert [reason in message and cls.__name__ in message for message in ours] == [True]  # said once
    with pytest.raises(WITConfigError, match=f"loss_impl = 'fused'.*{reason}.*auto"):
        run(model, "fused")


def test_a_head_that_is_no_linear_layer(caplog):
    class Scaled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, hidden):
            return self.linear(hidden) * 1.5

    model = build("Llama")
    model.set_output_embeddings(Scaled(model.get_output_embeddings()))
    expected, *_ = run(copy.deepcopy(model), "logits")
    output, _, head, _ = run(model, "auto")
    assert head.chosen != "fused"
    assert output.loss.item() == expected.loss.item()
    with pytest.raises(WITConfigError, match="its head is a Scaled"):
        run(model, "fused")
