"""The first batch's question: at (0, 1), is the weighted loss the model's own?"""

from contextlib import nullcontext

import pytest
import torch
import transformers
from support import VOCAB_SIZE, llama
from trainkit import CONFIG, first_log, make_trainer

from wit_plugins import WeightsNotAppliedError, WITConfig, attach, attached
from wit_plugins.loss.loss_call import LossCall

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def bamba(coefficient):
    torch.manual_seed(1)
    mamba = {
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
        "attn_layer_indices": [0],
    }
    return transformers.BambaForCausalLM(transformers.BambaConfig(**SIZES, **mamba, z_loss_coefficient=coefficient))


def bart():
    torch.manual_seed(1)
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "d_model": 16, "dropout": 0.0}
    sizes |= {"is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    return transformers.BartForCausalLM(transformers.BartConfig(vocab_size=VOCAB_SIZE, **sizes))


class PredictsTwo(transformers.LlamaForCausalLM):
    """Adds the loss of the token after the next one, as remote code with further heads does; in training alone."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None and self.training:
            further = torch.nn.functional.cross_entropy(output.logits[:, :-2].transpose(1, 2), labels[:, 2:])
            output.loss = output.loss + 0.1 * further
        return output


def predicts_two():
    torch.manual_seed(1)
    return PredictsTwo(transformers.LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: bamba(0.5), "z_loss_coefficient = 0.5"),
        (bart, "shifts its labels"),
        (predicts_two, "adds a loss of its"),
    ],
)
def test_a_model_with_another_loss_stops_in_its_first_batch(tmp_path, make, named):
    trainer = make_trainer(tmp_path, make(), remove_unused_columns=False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    attach(trainer, WITConfig(prompt_weight=0.0))
    with pytest.raises(WeightsNotAppliedError, match=named):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"neftune_noise_alpha": 5}])
def test_dropout_and_options_do_not_disturb_it(tmp_path, settings):
    """The two answers are compared under the same random numbers, and the run goes on with its own."""
    losses = []
    for config in (None, WITConfig(prompt_weight=0.0)):
        trainer = make_trainer(tmp_path, llama(attention_dropout=0.3), **settings)
        if config:
            attach(trainer, config)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if settings.get("bf16") else 1e-5)


def test_bamba_without_its_z_loss_trains(tmp_path):
    losses = []
    for config in (None, WITConfig(prompt_weight=0.0)):
        trainer = make_trainer(tmp_path, bamba(0.0))
        if config:
            attach(trainer, config)
        trainer.train()
        losses.append(first_log(trainer)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_jetmoe_names_its_coefficient_in_another_way(tmp_path):
    """At (0, 1), step for step what transformers does by itself, whose loss holds the auxiliary one."""
    losses = []
    sizes = {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
    more = {"kv_channels": 8, "num_local_experts": 4, "aux_loss_coef": 0.3, "output_router_logits": True}
    for config in (None, WITConfig(prompt_weight=0.0)):
        torch.manual_seed(1)
        model = transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes, **more))
        trainer = make_trainer(tmp_path, model, gradient_accumulation_steps=2)
        if config:
            attach(trainer, config)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    without = first_log(trainer)["response_loss"]
    ids = torch.arange(2, 8)[None]
    if trainer.model(input_ids=ids, labels=ids).aux_loss is None:
        assert losses[0][0] == pytest.approx(without, rel=1e-5)  # transformers 5.16 hands over no router's logits
    else:
        assert losses[0][0] > without + 0.3  # so that a run without it would have been seen


class Refuses(transformers.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        if labels is not None:
            raise RuntimeError("no labels, please")
        return super().forward(*args, **kwargs)


def test_a_model_that_fails_when_it_is_given_labels_stops(tmp_path):
    trainer = make_trainer(tmp_path, Refuses(llama().config), remove_unused_columns=False)
    attach(trainer, CONFIG)
    with pytest.raises(WeightsNotAppliedError, match="fails when it is given labels .RuntimeError: no labels, please"):
        trainer.train()


class TakesNone(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, return_dict=None):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)


class ReturnsNone(transformers.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("architecture", [TakesNone, ReturnsNone])
def test_a_model_without_a_loss_of_its_own_trains(tmp_path, architecture):
    """It loses nothing: at (0, 1) its first loss is that of the same model with transformers' loss."""
    losses = []
    for model in (llama(), architecture(llama().config)):
        model.load_state_dict(llama().state_dict())
        trainer = make_trainer(tmp_path, model, remove_unused_columns=False)
        attach(trainer, WITConfig(prompt_weight=0.0))
        trainer.train()
        losses.append(first_log(trainer)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(("make", "refused"), [(predicts_two, True), (llama, False)])
def test_where_rows_are_cut_over_ranks(tmp_path, make, refused):
    """Each rank compares the losses of its own part of the rows."""
    trainer = make_trainer(tmp_path, make(), remove_unused_columns=False)
    attach(trainer, CONFIG)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    attached(trainer).head.begin(LossCall(torch.tensor(40), training=True, shifted=True))
    with pytest.raises(WeightsNotAppliedError, match="adds a loss of its") if refused else nullcontext():
        trainer.model(**batch, shift_labels=batch["labels"])
