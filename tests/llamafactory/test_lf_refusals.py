"""What is refused: before anything is loaded, naming key, value and way out."""

import importlib.metadata
import inspect
import json
import re

import pytest
from lfkit import LLAMAFACTORY, Version, WITCallback, place, run, run_command, start_command
from llamafactory.train.tuner import run_exp
from transformers import Trainer, TrainingArguments
from wit_llamafactory import patch_training
from wit_llamafactory.refusals import check_arguments

from wit_plugins import WeightsNotAppliedError, WITConfigError, attached, detach, foreign

WIT = {"prompt_weight": 0.4, "response_weight": 0.6}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("refusals"))


def refused(workplace, monkeypatch, capsys, *overrides, **changes):
    """The message of a refused command, which loaded nothing and wrote nothing."""
    from llamafactory.train import tuner

    def untouched(*args, **kwargs):
        raise AssertionError("LLaMA-Factory was started")

    monkeypatch.setattr(tuner, "run_exp", untouched)
    config = workplace.write("refused.yaml", **{"wit": WIT, **changes})
    assert run_command(monkeypatch, "train", str(config), *overrides) == 1
    assert not (workplace.folder / "out").exists()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


IN_THE_FILE = [
    *[({"stage": stage}, rf"stage = '{stage}'.*set stage: sft") for stage in ("pt", "rm", "ppo", "dpo", "kto")],
    ({"train_on_prompt": True}, r"train_on_prompt = True: nothing is masked.*set it to false.*prompt_weight: 1.0"),
    ({"use_dft_loss": True}, r"use_dft_loss = True.*set it to false and name the strategy.*strategies: \{dft: \{\}\}"),
    ({"use_eaft_loss": True}, r"use_eaft_loss = True.*set it to false.*strategies: \{eaft: \{alpha: 1.0\}\}"),
    ({"use_asft_loss": True}, r"use_asft_loss = True.*set it to false.*strategies: \{asft: \{alpha: 0.1\}\}"),
    ({"use_unsloth": True}, r"use_unsloth = True: Unsloth replaces the model's forward.*set it to false"),
    ({"use_mca": True}, r"use_mca = True: Megatron.*USE_MCA"),
    ({"use_hyper_parallel": True}, r"use_hyper_parallel = True.*set it to false"),
    ({"use_kt": True}, r"use_kt = True.*USE_KT"),
    ({"ignore_pad_token_for_loss": False}, r"ignore_pad_token_for_loss = False: padding.*set it to true"),
]

IN_THE_BLOCK = [
    ({**WIT, "promt_weight": 0.1}, r"wit: unknown key 'promt_weight'; did you mean 'prompt_weight'\?"),
    ({"response_weight": 1.0}, r"wit: prompt_weight is required; add prompt_weight: 0.2"),
    ({**WIT, "prompt_weight": -0.1}, r"wit: prompt_weight = -0.1: .*greater than or equal to 0"),
    ({**WIT, "prompt_weight": "0.2"}, r"wit: prompt_weight = '0.2': .*number"),
    ({"prompt_weight": 0, "response_weight": 0}, r"both 0"),
    ({**WIT, "normalization": "mean"}, r"wit: normalization = 'mean': .*nonzero_tokens"),
    ({**WIT, "strategies": ["dtf"]}, r"strategies: 'dtf' is not a registered strategy; did you mean 'dft'\?"),
    ([0.2, 0.8], r"wit: expected a mapping such as \{prompt_weight: 0.2"),
    (0.2, r"wit: expected a mapping"),
]


@pytest.mark.parametrize(("changes", "message"), IN_THE_FILE, ids=[str(c) for c, _ in IN_THE_FILE])
def test_options_that_cannot_be_combined(workplace, monkeypatch, capsys, changes, message):
    assert re.search(message, refused(workplace, monkeypatch, capsys, **changes))


@pytest.mark.parametrize(("wit", "message"), IN_THE_BLOCK, ids=[str(c) for c, _ in IN_THE_BLOCK])
def test_mistakes_within_the_block(workplace, monkeypatch, capsys, wit, message):
    assert re.search(message, refused(workplace, monkeypatch, capsys, wit=wit))


def test_an_empty_block(workplace, monkeypatch, capsys):
    config = workplace.write("empty.yaml")
    config.write_text(config.read_text() + "wit:\n")
    assert run_command(monkeypatch, "train", str(config)) == 1
    assert "wit: expected a mapping" in capsys.readouterr().err


def test_overrides_are_checked_too(workplace, monkeypatch, capsys):
    assert "stage = 'dpo'" in refused(workplace, monkeypatch, capsys, "stage=dpo")
    assert "unknown key 'weight'" in refused(workplace, monkeypatch, capsys, "wit.weight=1")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("USE_V1", "USE_V1 = 1: LLaMA-Factory's new engine is not supported yet; take USE_V1 out of the environment"),
        ("USE_MCA", "use_mca = True: Megatron"),
        ("USE_KT", "use_kt = True: KTransformers"),
    ],
)
def test_engines_of_the_environment(workplace, monkeypatch, capsys, variable, message):
    monkeypatch.setenv(variable, "1")
    assert message in refused(workplace, monkeypatch, capsys)


def test_the_new_engine_without_a_block_is_llamafactory_s(monkeypatch, workplace):
    from llamafactory.v1 import launcher

    seen = []
    monkeypatch.setenv("USE_V1", "1")
    monkeypatch.setattr(launcher, "launch", lambda: seen.append("v1"))
    run_command(monkeypatch, "train", str(workplace.write("plain.yaml")))
    assert seen == ["v1"]


@pytest.mark.parametrize("argument", ["--wit.prompt_weight", "wit.prompt_weight=0.2", "--wit"])
def test_weights_without_a_file(monkeypatch, capsys, argument):
    assert run_command(monkeypatch, "train", "--stage", "sft", argument) == 1
    assert "the weights stand in a configuration file" in capsys.readouterr().err


def test_before_torchrun_in_a_process_of_its_own(workplace):
    """Once for all workers, without a traceback."""
    config = workplace.write("refused.yaml", wit=WIT, stage="dpo")
    done = start_command(workplace.folder, "train", str(config), FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.returncode == 1
    assert done.stderr.count("stage = 'dpo'") == 1
    assert "Traceback" not in done.stderr


class TestTheCallbackAlone:
    """The same refusals through `run_exp`, which nobody checked before."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_on_prompt": True}, "train_on_prompt = True"),
            ({"use_dft_loss": True}, "use_dft_loss = True"),
            ({"ignore_pad_token_for_loss": False}, "ignore_pad_token_for_loss = False"),
        ],
    )
    def test_options(self, workplace, monkeypatch, changes, message):
        from llamafactory.train.sft import workflow

        monkeypatch.setattr(workflow, "load_tokenizer", None)  # nothing is loaded
        with pytest.raises(WITConfigError, match=message):
            run(workplace.config(**changes), (0.4, 0.6))

    def test_another_stage(self, workplace):
        (workplace.folder / "pt.json").write_text(json.dumps([{"text": "blue gold " * 40}] * 4))
        workplace.dataset("pt", [{"text": "blue gold " * 60}] * 4, columns={"prompt": "text"})
        with pytest.raises(WITConfigError, match="not the one of LLaMA-Factory's stage: sft"):
            run(workplace.config(stage="pt", dataset="pt", cutoff_len=64), (0.4, 0.6))

    def test_two_of_them(self, workplace):
        with pytest.raises(WITConfigError, match="2 of them are a WITCallback"):
            run_exp(workplace.config(), callbacks=[WITCallback(0.2), WITCallback(0.4)])

    def test_wrong_settings(self):
        with pytest.raises(WITConfigError, match=r"WITCallback: unknown key 'weight'"):
            WITCallback(0.2, weight=1)
        with pytest.raises(WITConfigError, match=r"'dtf' is not a registered strategy"):
            WITCallback(0.2, strategies=["dtf"])

    def test_on_any_other_trainer(self, workplace, tmp_path):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        with pytest.raises(WITConfigError, match=r"use wit_plugins.attach"):
            Trainer(workplace.model(), arguments, callbacks=[WITCallback(0.2)])
        trainer = Trainer(workplace.model(), arguments, train_dataset=[{"input_ids": [5, 6], "labels": [5, 6]}])
        trainer.add_callback(WITCallback(0.2))
        with pytest.raises(WeightsNotAppliedError, match=r"its weights are not attached"):
            trainer.train()

    def test_a_callback_that_is_used_again(self, workplace, tmp_path):
        """It goes on to the next run's trainer, and to no trainer of another kind."""
        weights = WITCallback(**WIT)
        losses = []
        for name in "ab":
            run_exp(workplace.config(output_dir=str(tmp_path / name)), callbacks=[weights])
            losses.append(weights.trainer.state.log_history[0]["loss"])
        assert losses[0] == losses[1]
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        with pytest.raises(WITConfigError, match="not the one of LLaMA-Factory's stage: sft"):
            Trainer(workplace.model(), arguments, callbacks=[weights])
        run_exp(workplace.config(output_dir=str(tmp_path / "c")), callbacks=[weights])
        trainer = Trainer(workplace.model(), arguments, train_dataset=[{"input_ids": [5, 6], "labels": [5, 6]}])
        trainer.add_callback(weights)
        with pytest.raises(WeightsNotAppliedError, match=r"its weights are not attached"):
            trainer.train()

    def test_weights_taken_off_again(self, workplace, tmp_path):
        class TakeOff(type(WITCallback(0.2)).__mro__[1]):
            def on_train_begin(self, *args, **kwargs):
                detach(weights.trainer)

        weights = WITCallback(0.2)
        with pytest.raises(WeightsNotAppliedError, match="its weights are not attached"):
            run_exp(workplace.config(output_dir=str(tmp_path)), callbacks=[TakeOff(), weights])
        assert attached(weights.trainer) is None


def test_a_cache_without_masking(workplace, tmp_path):
    """`tokenized_path` written with `train_on_prompt: true`: the arguments do not say so, the examples do."""
    cached = {"tokenized_path": str(tmp_path / "cache")}
    run(workplace.config(output_dir=str(tmp_path / "own"), train_on_prompt=True, **cached))
    weights = {**WIT, "message_weight_keys": [], "sample_weight_key": None}  # no weights in the data to miss
    with pytest.raises(WITConfigError, match=r"nothing masked.*set train_on_prompt: false.*tokenized_path"):
        run(workplace.config(output_dir=str(tmp_path / "out"), **cached), weights)


def numbered(monkeypatch, version):
    """The LLaMA-Factory under test, with another number, and not patched yet."""
    from llamafactory.train import tuner

    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "llamafactory" else own(name))
    monkeypatch.setattr(foreign, "_said", set())
    monkeypatch.setattr(tuner, "run_sft", inspect.unwrap(tuner.run_sft))


def test_a_version_that_is_too_old(monkeypatch):
    numbered(monkeypatch, "0.9.3")
    with pytest.raises(WITConfigError, match=r"LLaMA-Factory 0.9.3 is not supported; pip install 'llamafactory>="):
        WITCallback(0.2)


def test_a_newer_version_that_works_alike_is_patched_and_says_so(monkeypatch):
    from llamafactory.train import tuner

    numbered(monkeypatch, "0.99.0")
    with pytest.warns(foreign.NewerThanTestedWarning, match=r"LLaMA-Factory 0.99.0 .*its parts that matter .* unchang"):
        WITCallback(0.2)
    assert tuner.run_sft.takes_weights


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("trainer = CustomSeq2SeqTrainer(", "llamafactory.train.sft.workflow.run_sft has no"),
        ("super().compute_loss(", "CustomSeq2SeqTrainer.compute_loss has no"),
        ("encode_multiturn", "SupervisedDatasetProcessor._encode_data_example has no"),
    ],
)
def test_a_newer_version_that_works_in_another_way_is_refused(monkeypatch, piece, message):
    from llamafactory.train import tuner

    numbered(monkeypatch, "0.99.0")
    own = inspect.getsource
    monkeypatch.setattr(foreign.inspect, "getsource", lambda function: own(function).replace(piece, "other("))
    with pytest.raises(WITConfigError, match=rf"LLaMA-Factory 0.99.0 .*{message}.*newest version that works is 0.9.5"):
        WITCallback(0.2)
    assert not hasattr(tuner.run_sft, "takes_weights")


def test_no_llamafactory_at_all(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(WITConfigError, match="LLaMA-Factory is not installed in this environment; pip install"):
        WITCallback(0.2)


def test_code_of_llamafactory_that_changed_is_noticed(monkeypatch, workplace, capsys):
    from llamafactory import launcher
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow

    def launch():
        pass

    def run_sft(*args):
        pass

    config = workplace.write("refused.yaml", wit=WIT)
    with monkeypatch.context() as changed:
        changed.setattr(launcher, "launch", launch)
        assert run_command(changed, "train", str(config)) == 1
        assert "does not work as this project expects" in capsys.readouterr().err
    monkeypatch.setattr(tuner, "run_sft", run_sft)
    monkeypatch.setattr(workflow, "run_sft", run_sft)
    with pytest.raises(WITConfigError, match="does not work as this project expects"):
        patch_training.install()


def test_a_run_that_builds_no_trainer_is_an_error(monkeypatch, workplace):
    """The last line of defence: `run_sft` came back, and nothing was attached."""
    from llamafactory.train import tuner

    monkeypatch.setattr(tuner, "run_sft", lambda *args: None)
    with pytest.raises(WeightsNotAppliedError, match="without building the trainer"):
        run(workplace.config(), (0.4, 0.6))


def test_missing_keys_are_at_their_defaults():
    check_arguments({})
    check_arguments({"stage": "sft", "train_on_prompt": False, "use_dft_loss": None})


def test_versions_under_test_are_stated():
    assert LLAMAFACTORY in {Version("0.9.4"), Version("0.9.5")}


@pytest.mark.parametrize("key", ["do_train", "trust_remote_code", "packing"])
def test_text_where_llamafactory_needs_true_or_false(workplace, monkeypatch, capsys, key):
    """A quoted `false` would be true to it."""
    config = workplace.write("quoted.yaml", wit={"prompt_weight": 0.2}, **{key: "false"})
    assert run_command(monkeypatch, "train", str(config)) == 1
    message = f"{key} = 'false': is text, which LLaMA-Factory takes for true whatever it says; write {key}: false"
    assert message in capsys.readouterr().err
