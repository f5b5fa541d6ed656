"""What cannot be exact stops `axolotl` before anything is loaded, with the way out."""

import importlib.metadata
import inspect
import pickle
import sys

import pytest
import yaml
from axokit import AXOLOTL, CHAT, assert_step_is_exact, axolotl, train
from packaging.version import Version

from wit_plugins import WITConfigError, foreign

PLUGINS = ["axokit.Recorder", "wit_axolotl.WITPlugin"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_on_inputs": True}, "train_on_inputs = True: then nothing is masked.*set it to false"),
        ({"rl": "dpo"}, "rl = 'dpo'.*take wit out"),
        ({"reward_model": True}, "reward_model = True"),
        ({"process_reward_model": True}, "process_reward_model = True"),
        ({"pretraining_dataset": [{"path": "x"}]}, "pretraining_dataset = .*has no prompt.*use datasets"),
        (
            {"use_eaft": True},
            r"use_eaft = True: it would replace the weighted loss.*strategies: \{eaft: \{divisor: 1\}\}",
        ),
        ({"chunked_cross_entropy": True}, "chunked_cross_entropy = True.*take the option out"),
        ({"liger_use_token_scaling": True}, r"liger_use_token_scaling = True.*strategies: \[dft\]"),
        ({"kd_trainer": True}, "kd_trainer = True"),
        ({"context_parallel_size": 2}, "context_parallel_size = 2.*set it to 1"),
        ({"context_parallel": {"size": 2}}, r"context_parallel = \{'size': 2\}.*cuts the labels of a row.*set it to 1"),
        ({"use_dft": True}, r"use_dft = True: it would replace the weighted loss.*strategies: \[dft\]"),
        ({"diffusion_lm": {"a": 1}}, "diffusion_lm = .*take it or wit out"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size = 2.*set it to 1"),
        ({"plugins": [*PLUGINS, "axolotl.integrations.diffusion.DiffusionPlugin"]}, r"plugins: .*DiffusionPlugin"),
        ({"plugins": [*PLUGINS, "axolotl.integrations.kd.KDPlugin"]}, r"plugins: .*KDPlugin replaces the loss"),
        ({"wit": None}, "there is no wit: block; add"),
        ({"wit": {"promt_weight": 0.4}}, "wit: .*unknown key 'promt_weight'; did you mean 'prompt_weight'"),
        ({"wit": {"response_weight": 0.4}}, "wit: prompt_weight is required; add prompt_weight: 0.2"),
        ({"wit": {"prompt_weight": -0.4}}, "wit: prompt_weight = -0.4"),
        ({"wit": {"prompt_weight": float("nan")}}, "wit: prompt_weight = nan"),
        ({"wit": {"prompt_weight": float("inf")}}, "wit: prompt_weight = inf"),
        ({"wit": {"prompt_weight": "much"}}, "wit: prompt_weight = 'much'"),
        ({"wit": {"prompt_weight": 0, "response_weight": 0}}, "are both 0"),
        ({"wit": {"prompt_weight": 0.4, "loss_impl": "fast"}}, "wit: loss_impl = 'fast'"),
        ({"wit": {"prompt_weight": 0.4, "strategies": ["dtf"]}}, "did you mean 'dft'"),
        ({"wit": 0.4}, "wit: expected a mapping such as"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["train", "preprocess"])
def test_configurations(place, command, settings, message):
    """There is no model to load: what is refused, is refused before."""
    path = place.config(**{**settings, "base_model": "/nowhere"})
    with pytest.raises(WITConfigError, match=f"(?s){message}"):
        axolotl(command, path, *(["--launcher", "python"] if command == "train" else []))
    assert not (path.parent / "out").exists()


def test_under_ray_the_command_refuses_before_there_are_workers(place):
    """Ray, the first thing that would be missed, is not in this environment."""
    path = place.config(wit={"promt_weight": 0.4})
    with pytest.raises(WITConfigError, match="did you mean 'prompt_weight'"):
        axolotl("train", path, "--use-ray", "--ray-num-workers", "2")
    with pytest.raises(ModuleNotFoundError, match="No module named 'ray'"):
        axolotl("train", place.config(), "--use-ray", "--ray-num-workers", "2")


def test_what_ray_sends_cannot_be_read_without_the_package(place, monkeypatch):
    """Axolotl prints the ImportError of a plugin and trains on without it, in a worker too."""
    from axolotl.cli.config import load_cfg

    wit = {"prompt_weight": 0.4, "sample_weight_key": None, "strategies": {"dft": None}}
    cfg = load_cfg(str(place.config(wit=wit)), use_ray=True)
    sent = pickle.dumps(pickle.loads(pickle.dumps(cfg.to_dict()["wit"])))  # on its way it may be unpacked and packed
    assert pickle.loads(sent) == wit
    monkeypatch.setitem(sys.modules, "wit_axolotl", None)
    monkeypatch.delitem(sys.modules, "wit_axolotl.config")
    with pytest.raises(ModuleNotFoundError, match="wit_axolotl"):
        pickle.loads(sent)


def test_a_dataset_without_a_prompt(place):
    with pytest.raises(WITConfigError, match="nothing masked in any of its 8 examples.*train_on_inputs at false"):
        place.train(kind="completion")


def test_a_dataset_without_a_response(place):
    dataset = {**CHAT, "roles_to_train": ["tool"], "train_on_eos": "none"}
    with pytest.raises(WITConfigError, match="no response in any of its 8 examples"):
        place.train(dataset=dataset)


def test_the_block_without_the_plugin_line_in_a_process_that_had_it(place):
    """Axolotl's plugins outlive a run. (In a process of its own it ignores the block: docs/axolotl.md.)"""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    load_cfg(str(place.config()))
    plugin = PluginManager.get_instance().plugins["wit_axolotl.WITPlugin"]

    def to_the_trainer():
        plugin.post_trainer_create(load_cfg(str(place.config(plugins=["axokit.Recorder"]))), trainer=None)

    with pytest.raises(WITConfigError, match="plugins does not name wit_axolotl.WITPlugin; add it"):
        to_the_trainer()  # up to 0.19 in `load_cfg`
    cfg = load_cfg(str(place.config(plugins=["axokit.Recorder"], wit=None)))
    assert plugin.get_training_args(cfg) is None
    plugin.post_trainer_create(cfg, trainer=None)  # nothing to do


def test_a_text_in_the_place_of_the_list_of_plugins():
    """Axolotl stops at its first letter before it asks us; `wit check` asks us."""
    from wit_axolotl.config import is_listed

    with pytest.raises(WITConfigError, match=r"plugins = 'wit_axolotl.WITPlugin': .*\[wit_axolotl.WITPlugin\]"):
        is_listed({"plugins": "wit_axolotl.WITPlugin", "wit": {"prompt_weight": 0.2}})


def test_a_dataset_without_a_prompt_is_said_without_a_traceback(place, monkeypatch, capsys):
    """What the trainer's data is refused for, as the interpreter shows it."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    try:
        place.train(kind="completion")
    except WITConfigError:
        capsys.readouterr()
        sys.excepthook(*sys.exc_info())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wit_axolotl: the training dataset has nothing masked in any of its 8 examples")


def test_a_plugin_that_cannot_be_imported_stops_the_run(place, monkeypatch):
    """Axolotl would print the ImportError and train on without it."""
    monkeypatch.setitem(sys.modules, "wit_axolotl.plugin", None)
    with pytest.raises(WITConfigError, match="wit_axolotl.WITPlugin cannot be imported"):
        train(place.config())


def test_a_mistyped_plugin(place):
    with pytest.raises(AttributeError, match="no attribute 'WitPlugin'; the plugin is wit_axolotl.WITPlugin"):
        train(place.config(plugins=["wit_axolotl.WitPlugin"]))


def numbered(monkeypatch, version):
    """The Axolotl under test, with another number."""
    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "axolotl" else own(name))
    monkeypatch.setattr(foreign, "_said", set())


def test_a_version_that_is_too_old(place, monkeypatch):
    numbered(monkeypatch, "0.18.0")
    with pytest.raises(WITConfigError, match=r"Axolotl 0.18.0 is not supported.*pip install"):
        train(place.config())


def test_a_newer_version_that_works_alike_trains_and_says_so(place, monkeypatch):
    numbered(monkeypatch, "0.99.0")
    with pytest.warns(foreign.NewerThanTestedWarning, match=r"Axolotl 0.99.0 .*its parts that matter here are unchan"):
        run = train(place.config())
    assert_step_is_exact(run)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (".post_trainer_create(", r"axolotl.train.setup_model_and_trainer has no '.post_trainer_create\("),
        ("get_dataset_wrapper", "axolotl.utils.data.sft._load_and_process_single_dataset has no"),
        ("plugin_manager.get_training_args", "HFCausalTrainerBuilder.build has no"),
    ],
)
def test_a_newer_version_that_works_in_another_way_is_refused(place, monkeypatch, piece, message):
    numbered(monkeypatch, "0.99.0")
    own = inspect.getsource
    monkeypatch.setattr(foreign.inspect, "getsource", lambda function: own(function).replace(piece, "other("))
    with pytest.raises(WITConfigError, match=rf"Axolotl 0.99.0 .*{message}.*the newest version that works is 0.21.0"):
        train(place.config())


def test_options_of_strategies_survive_axolotl(place):
    """Axolotl drops None from the configuration that it validated; `strategies: {dft: }` must not go with it."""
    path = place.config()
    config = yaml.safe_load(path.read_text())
    config["wit"]["strategies"] = {"dft": None}
    path.write_text(yaml.safe_dump(config))
    assert train(path).trainer._wit.config.strategies == {"dft": {}}


@pytest.mark.skipif(Version("0.20") > AXOLOTL, reason="there is no such form before Axolotl 0.20")
def test_the_plugin_named_as_an_entry_point(place):
    """`module:Class`, which Axolotl takes for `module.Class`."""
    assert_step_is_exact(train(place.config(plugins=["axokit.Recorder", "wit_axolotl:WITPlugin"])))
