"""ssToken through the real `SFTTrainer`, in float64 by the attention of transformers' own eager implementation."""

import pytest
import torch
from literature import adapted, sstoken_step
from methodkit import LAYOUTS, LEARNING_RATE, in_order
from support import all_relative_error, from_dataset, llama, plain_copy
from trlkit import logs, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WeightsNotAppliedError, WITConfigError
from wit_plugins.strategies import sstoken


@pytest.mark.parametrize(("loss_impl", "weights"), [("fused", (0.0, 1.0)), ("logits", (0.2, 0.8))])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_step_are_the_formula_s(tmp_path, layout, weights, loss_impl):
    trainer, batches = in_order(tmp_path, model=adapted(llama(num_key_value_heads=1)), **LAYOUTS[layout])
    steps = trainer.args.gradient_accumulation_steps
    options = {} if layout == "packed" else {"rho": 0.35, "gamma": 0.3}
    loss, grads = sstoken_step(plain_copy(trainer.model).train(), batches[:steps], weights, **options)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    trainer.add_callback(WITCallback(trainer, *weights, strategies={"sstoken": options}, loss_impl=loss_impl))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


def mistral():
    """Attends to no more than five tokens, in every layer."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.4}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, pad_token_id=0, bos_token_id=None, eos_token_id=1))


@pytest.mark.parametrize(
    ("made", "implementation", "args"),
    [
        (llama, "eager", {"packing": True}),
        (llama, "sdpa", {"gradient_checkpointing": True}),
        (mistral, "sdpa", {}),
        (mistral, "eager", {"packing": True}),
    ],
)
def test_whatever_computes_the_attention(tmp_path, made, implementation, args):
    base = made()
    base.set_attn_implementation(implementation)
    trainer, batches = in_order(tmp_path, model=adapted(base), **args)
    loss, grads = sstoken_step(plain_copy(trainer.model).train(), batches, (0.2, 0.8))
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, 0.2, 0.8, strategies={"sstoken": {}}))
    trainer.train()
    assert base.config._attn_implementation == implementation
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
def test_the_denominator_counts_what_is_kept(tmp_path, normalization):
    """⌈0.6 R⌉ of each response, whichever they are, and all of the prompt: a loss of 1 a token says how many."""
    base = llama()
    with torch.no_grad():
        base.lm_head.weight.zero_()  # every token's nll is ln 61
    trainer = sft_trainer(tmp_path, model=adapted(base), gradient_accumulation_steps=2, per_device_train_batch_size=4)
    sizes = [(sum(not r for r in d.is_response[1:]), sum(d.is_response)) for d in from_dataset(trainer.train_dataset)]
    assert any(0.6 * response % 1 for _, response in sizes)
    kept = sum(-(-3 * response // 5) for _, response in sizes)
    strategies = {"sstoken": {}}
    trainer.add_callback(WITCallback(trainer, 0.2, 0.8, strategies=strategies, normalization=normalization))
    trainer.train()
    prompt = sum(prompt for prompt, _ in sizes)
    divisor = prompt + kept if normalization == "nonzero_tokens" else 0.2 * prompt + 0.8 * kept
    expected = torch.tensor(61.0).log().item() * (0.2 * prompt + 0.8 * kept) / divisor
    assert logs(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_the_selected_set_by_hand():
    """Two documents; one prompt token that weighs something, and a response token that weighs nothing."""
    own = torch.tensor([-9.0, -1.0, -2.0, -4.0, -1.0, -1.0, -3.0])
    reference = torch.tensor([0.0, -1.0, -4.0, -4.0, -9.0, -2.0, -5.0])  # moved by 0, 2, 0 (and 8), 1, 2
    attention = torch.tensor([1.0, 0.9, 0.3, 0.1, 1.0, 0.6, 0.0])
    roles = torch.tensor([1, 2, 2, 2, 2, 2, 2], dtype=torch.uint8)
    weights = torch.tensor([0.2, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    documents = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    for options, kept in (
        ({"rho": 0.5, "gamma": 1}, [0, 1, 2, 6]),  # of 0, 1, 0 the highest two: the earlier of equals
        ({"rho": 0.5, "gamma": 0}, [0, 1, 2, 5]),
        ({"rho": 0.3, "gamma": 0.5}, [0, 2, 6]),  # 0.45, 0.65, 0.05 and 0.3, 0.5
        ({"rho": 0.3, "gamma": 0.2}, [0, 1, 5]),  # 0.72, 0.44, 0.08 and 0.48, 0.2
        ({"rho": 1}, [0, 1, 2, 3, 5, 6]),
        ({}, [0, 1, 2, 5, 6]),
    ):
        mask = sstoken.select_tokens(own, reference, attention, roles, weights, documents, options)
        assert mask.nonzero().flatten().tolist() == sorted(kept), options


def test_attention_that_is_another_is_no_attention(tmp_path):
    """A layer with a bias of its own: what is looked at would not be what it does."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def louder(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, 2 * query, *args, **kwargs)

    AttentionInterface.register("louder", louder)
    trainer = sft_trainer(tmp_path, model=adapted())
    trainer.add_callback(WITCallback(trainer, 0.2, strategies={"sstoken": {}}))
    trainer.model.get_base_model().model.layers[-1].self_attn.config = type(trainer.model.config)(
        **{**trainer.model.config.to_dict(), "attn_implementation": "louder"}
    )
    with pytest.raises(WeightsNotAppliedError, match="is not the softmax of its queries and keys within each document"):
        trainer.train()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (llama, {}, "sstoken compares with a reference.*has none; train with LoRA"),
        (lambda: adapted(llama(attention_dropout=0.1)), {}, "attention_dropout = 0.1 drops some of it at random"),
        (adapted, {"rho": 0}, "sstoken: rho = 0: is a share above 0 and at most 1"),
        (adapted, {"gamma": 1.5}, "gamma = 1.5: is a share from 0 to 1"),
        (adapted, {"gama": 1}, "no option 'gama'; did you mean 'gamma'"),
    ],
)
def test_refused_before_training(tmp_path, model, options, message):
    with pytest.raises(WITConfigError, match=message):
        WITCallback(sft_trainer(tmp_path, model=model()), prompt_weight=0.2, strategies={"sstoken": options})


def test_two_selections_are_refused(tmp_path):
    both = {"sstoken": {}, "rho1": {"share": 0.5}}
    with pytest.raises(WITConfigError, match="sstoken and rho1 both select tokens"):
        WITCallback(sft_trainer(tmp_path, model=adapted()), prompt_weight=0.2, strategies=both)
