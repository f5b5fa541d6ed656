"""The methods of the literature through `axolotl train`, by the same `strategies:` block as anywhere."""

import literature
import pytest
from axokit import Workplace
from support import all_relative_error, llama, plain_copy


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("literature"))


@pytest.mark.parametrize("method", literature.METHODS)
def test_loss_and_step_are_the_formula_s(workplace, method):
    options = literature.METHODS[method][1]
    packed = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 256}
    run = workplace.train(wit={"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {method: options}}, **packed)
    assert run.trainer.state.global_step == 1
    with run.at_start() as model:
        copy = plain_copy(model)
    loss, grads = literature.step(copy, method, [run.docs], (0.2, 0.8), seed=7)
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(run.taken, grads) < 1e-4


def test_eaft_within_wit_equals_use_eaft(workplace):
    """The way out that the refusal of `use_eaft` names, step for step."""
    args = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    own = workplace.train(plugins=["axokit.Recorder"], wit=None, use_eaft=True, eaft_alpha=0.8, eaft_k=7, **args)
    strategies = {"eaft": {"alpha": 0.8, "top_k": 7, "divisor": 1}}
    wit = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": strategies}
    weighted = workplace.train(wit=wit, **args)
    plain = workplace.train(plugins=["axokit.Recorder"], wit=None, **args)
    assert weighted.losses == pytest.approx(own.losses, rel=1e-5)
    assert weighted.losses != pytest.approx(plain.losses, rel=1e-3)
    assert all_relative_error(weighted.taken, own.taken) < 1e-4


def test_rho1_compares_with_the_model_below_its_adapter(workplace):
    """LoRA that was trained before, and goes on: at its start it would be no adapter, and nothing in excess."""
    folder = workplace.folder / "adapter"
    literature.adapted(llama(vocab_size=64)).save_pretrained(folder)
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {"rho1": {"share": literature.SHARE}}}
    lora = {"adapter": "lora", "lora_model_dir": str(folder), "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    # Axolotl's kernels, on by default, would change the attention's class for all tests that follow in this process.
    lora |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    run = workplace.train(wit=wit, **lora)
    with run.at_start() as model:
        copy = plain_copy(model).train()
    loss, grads = literature.rho1_step(copy, [run.docs], (0.2, 0.8))
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(run.taken, grads) < 1e-4
