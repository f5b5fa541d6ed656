"""What cannot be exact is refused when the callback is made, with the way out."""

import warnings

import pytest
import trl
import wit_trl.label_weights
import wit_trl.versions
from packaging.version import Version
from support import llama
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from trlkit import dataset, logs, sft_trainer
from wit_trl import WITCallback

from wit_plugins import WITConfigError, attached, detach, foreign


@pytest.mark.parametrize(
    ("data", "args", "message"),
    [
        ("plain", {"completion_only_loss": False}, "nothing masked.*completion_only_loss.*assistant_only_loss"),
        ("conversational", {"completion_only_loss": False}, "nothing masked.*8 examples"),
        ("assistant_only", {}, "nothing masked.*assistant_only_loss=True"),
        ("tokenised", {"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1.*set it to 0"),
        ("tokenised", {"loss_type": "dft"}, r"loss_type = 'dft'.*strategies=\{'dft': \{\}\}"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_options(tmp_path, data, args, message):
    trainer = sft_trainer(tmp_path, data, **args)
    with pytest.raises(WITConfigError, match=message):
        WITCallback(trainer, prompt_weight=0.2)
    assert attached(trainer) is None


@pytest.mark.parametrize("packing", [False, True])
def test_a_dataset_without_a_response(tmp_path, packing):
    data = dataset("tokenised").map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    # TRL drops fully masked examples when it truncates, so there is no truncation here.
    trainer = sft_trainer(tmp_path, data, packing=packing, max_length=64 if packing else None)
    with pytest.raises(WITConfigError, match="no response in any of its"):
        WITCallback(trainer, prompt_weight=0.2)


def test_a_dataset_of_which_trl_leaves_no_row(tmp_path):
    trainer = sft_trainer(tmp_path, dataset("tokenised").map(lambda row: {"labels": [-100] * len(row["input_ids"])}))
    with pytest.raises(WITConfigError, match="the training dataset is empty.*left all of them out"):
        WITCallback(trainer, prompt_weight=0.2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_callback_for_another_trainer(tmp_path, shared, evaluates):
    """Folds in a loop, with a model each or one for all of them: the second would train without weights."""
    first = sft_trainer(tmp_path)
    callback = WITCallback(first, prompt_weight=0.2)
    first.add_callback(callback)
    first.train()
    second = sft_trainer(tmp_path, model=first.model if shared else None)
    second.add_callback(callback)
    with pytest.raises(WITConfigError, match="made for another trainer.*make a new one for each"):
        second.evaluate(dataset("tokenised")) if evaluates else second.train()
    with pytest.raises(WITConfigError, match="made for another trainer"):
        sft_trainer(tmp_path, trainer_kwargs={"callbacks": [callback]})
    if not shared:  # the second has patched the model
        first.train()  # its own trainer is still its own
        first.evaluate(dataset("tokenised"))


def test_two_trainers_on_one_model(tmp_path):
    first = sft_trainer(tmp_path)
    WITCallback(first, prompt_weight=0.2)
    second = sft_trainer(tmp_path, model=first.model)
    with pytest.raises(WITConfigError, match=r"weights of another trainer.*detach\(other_trainer\)"):
        WITCallback(second, prompt_weight=0.2)
    detach(first)
    second.add_callback(WITCallback(second, prompt_weight=0.2))
    second.train()


def test_a_cell_of_a_notebook_that_is_run_again(tmp_path):
    """Nobody holds the first trainer any more, so that its weights are nobody's."""
    model, losses = llama(), []
    for _ in range(2):
        trainer = sft_trainer(tmp_path, model=model, learning_rate=0.0)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2))
        trainer.train()
        losses += logs(trainer)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_an_auxiliary_loss_that_the_model_does_not_have(tmp_path):
    """Glm4Moe has `output_router_logits` and no auxiliary loss; TRL by itself stops too, with other words.

    Older versions (with an older transformers) take the option for none, and train.
    """
    config = Glm4MoeConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    models = [Glm4MoeForCausalLM(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    own, weighted = (sft_trainer(tmp_path, model=model, router_aux_loss_coef=0.1) for model in models)
    weighted.add_callback(WITCallback(weighted, prompt_weight=0.0))
    if Version(trl.__version__) < Version("1.15"):
        own.train()
        weighted.train()
        assert logs(weighted) == pytest.approx(logs(own), rel=1e-5)
        return
    with pytest.raises(AttributeError, match="num_experts"):
        own.train()
    with pytest.raises(WITConfigError, match="router_aux_loss_coef = 0.1: the model returns no auxiliary.*leave"):
        weighted.train()


def test_a_custom_loss_function(tmp_path):
    def my_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum()

    trainer = sft_trainer(tmp_path, trainer_kwargs={"compute_loss_func": my_loss})
    with pytest.raises(WITConfigError, match="compute_loss_func = my_loss.*docs/authors/strategies.md"):
        WITCallback(trainer, prompt_weight=0.2)


def test_another_trainer_of_trl(tmp_path):
    from datasets import Dataset
    from support import llama
    from trlkit import tokenizer

    rows = [{"prompt": "w01", "chosen": "w02", "rejected": "w03"}] * 4
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    # A reference model, as DPO would load one from the model's name, which a model built from a config lacks.
    trainer = trl.DPOTrainer(
        llama(), llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    with pytest.raises(WITConfigError, match="DPOTrainer does not train on prompt and response.*SFTTrainer"):
        WITCallback(trainer, prompt_weight=0.2)


def test_a_version_that_is_too_old(tmp_path, monkeypatch):
    trainer = sft_trainer(tmp_path)
    monkeypatch.setattr(trl, "__version__", "1.8.0")
    with pytest.raises(WITConfigError, match=r"TRL 1.8.0 is not supported.*pip install"):
        WITCallback(trainer, prompt_weight=0.2)


@pytest.fixture
def a_newer_trl(monkeypatch):
    """The TRL under test, with the number of one that is still to come."""
    if Version(trl.__version__) < wit_trl.versions.FUSED_HEAD_SINCE:
        pytest.skip("its loss is another one")
    monkeypatch.setattr(foreign, "_said", set())
    monkeypatch.setattr(trl, "__version__", "1.99.0")


def test_a_newer_version_that_works_alike_trains_and_says_so_once(tmp_path, a_newer_trl):
    trainers = sft_trainer(tmp_path), sft_trainer(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for trainer in trainers:
            WITCallback(trainer, prompt_weight=0.2)
            assert attached(trainer) is not None
    (line,) = [str(warning.message) for warning in said if warning.category is foreign.NewerThanTestedWarning]
    assert "TRL 1.99.0" in line
    assert "its parts that matter here are unchanged" in line


@pytest.mark.parametrize(
    ("owner", "name", "piece"),
    [
        (trl.SFTTrainer, "compute_loss", "outputs = model"),
        (wit_trl.label_weights, "_original", "takes self, args"),
        (trl.trainer.utils, "FusedCausalLMOutput", "log_probs"),
    ],
    ids=["loss", "data", "output"],
)
def test_a_newer_version_that_works_in_another_way_is_refused(tmp_path, monkeypatch, a_newer_trl, owner, name, piece):
    def other(self, args):
        return None

    trainer = sft_trainer(tmp_path)
    monkeypatch.setattr(owner, name, other)
    with pytest.raises(WITConfigError, match=rf"TRL 1.99.0 .*{piece}.*the newest version that works is 1.16.0"):
        WITCallback(trainer, prompt_weight=0.2)


def test_a_script_that_works_in_another_way_is_refused(monkeypatch, a_newer_trl):
    from trl.scripts import sft as script
    from wit_trl import sft

    sft._check_script()
    monkeypatch.setattr(script, "main", lambda *args: None)
    with pytest.raises(WITConfigError, match=r"trl sft.*the newest version that works is 1.16.0"):
        sft._check_script()


def test_the_tested_versions_hold_the_one_under_test():
    framework = wit_trl.versions.FRAMEWORK
    assert framework.oldest <= Version(trl.__version__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_weight": -1}, "WITCallback: prompt_weight = -1"),
        ({"prompt_weight": 0.2, "respons_weight": 1}, "did you mean 'response_weight'"),
        ({"prompt_weight": 0.2, "strategies": ["dtf"]}, "did you mean 'dft'"),
        ({"prompt_weight": 0.2, "loss_impl": "fast"}, "loss_impl = 'fast'"),
    ],
)
def test_settings(tmp_path, settings, message):
    with pytest.raises(WITConfigError, match=message):
        WITCallback(sft_trainer(tmp_path), **settings)


def test_different_settings_twice(tmp_path):
    trainer = sft_trainer(tmp_path)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2))
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2))  # the same again is nothing new
    with pytest.raises(WITConfigError, match="attached already"):
        WITCallback(trainer, prompt_weight=0.4)


def test_a_callback_whose_weights_are_gone(tmp_path):
    trainer = sft_trainer(tmp_path)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2))
    detach(trainer)
    with pytest.raises(WITConfigError, match="not attached any more"):
        trainer.train()


def test_detach_gives_trl_back(tmp_path):
    """After detach, a run is TRL's own, at the first digit and the last."""
    losses = []
    for weighted in (False, True):
        trainer = sft_trainer(tmp_path)
        if weighted:
            WITCallback(trainer, prompt_weight=0.2)
            detach(trainer)
        trainer.train()
        losses.append(logs(trainer)[0])
    assert losses[0] == losses[1]
