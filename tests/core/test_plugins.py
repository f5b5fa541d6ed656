"""Strategies: registered names, products, options, trust."""

import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from wit_plugins import PROMPT, RESPONSE, WITConfigError, entropy_of_top, hookimpl, per_token, register
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.contract.plugins import DEFAULT_STRATEGIES, HOOKS_OF_A_STRATEGY, plugin_manager, strategy_names
from wit_plugins.contract.requirements import Requirements, without_references

ROLES = np.array([0, PROMPT, RESPONSE, RESPONSE], dtype=np.uint8)
IDS = np.array([4, 5, 6, 7])
WIT = {"prompt_weight": 0.25, "response_weight": 0.5}


class ById:
    """Weights by token id, with an option that it checks."""

    @hookimpl
    def validate_options(self, options):
        if not isinstance(options.get("id"), int):
            raise ValueError(f"id = {options.get('id')!r} is not a token id")

    @hookimpl
    def static_weights(self, input_ids, options, example):
        return np.where(input_ids == options["id"], example["factor"], 1.0)


class Broken:
    def __init__(self, result):
        self.result = result

    @hookimpl
    def static_weights(self):
        return self.result


@pytest.fixture
def registered():
    names = []

    def add(plugin, name):
        register(plugin, name)
        names.append(name)

    yield add
    for name in names:
        plugin_manager().unregister(name=name)


def test_built_in_strategies_are_registered_like_others():
    assert {"wit", "dft"} <= set(strategy_names())
    assert "trl" not in strategy_names()  # an adapter is a plugin, but no strategy


def test_a_built_in_strategy_is_imported_when_it_is_named():
    code = (
        "import sys, wit_plugins.contract.plugins as p; from wit_plugins.contract.active import ActiveStrategies;"
        "loaded = lambda: {m.split('.')[-1] for m in sys.modules if m.startswith('wit_plugins.strategies.')};"
        "assert p.plugin_manager().has_plugin('dft') and set(p.DEFAULT_STRATEGIES) <= set(p.strategy_names());"
        "assert not loaded(), loaded();"
        "ActiveStrategies({'wit': {'prompt_weight': 0.2, 'response_weight': 0.8}, 'dft': {}});"
        "assert loaded() == {'wit', 'dft'}, loaded()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(DEFAULT_STRATEGIES))
def test_every_built_in_name_has_a_strategy(name):
    plugin = plugin_manager().get_plugin(name)
    assert plugin.__name__ == DEFAULT_STRATEGIES[name]
    assert plugin_manager().get_name(plugin) == name
    assert any(hasattr(plugin, hook) for hook in HOOKS_OF_A_STRATEGY)


def test_a_built_in_name_cannot_be_taken():
    """Whether or not its strategy was imported before."""
    code = (
        "import wit_plugins.contract.plugins as p; from wit_plugins import WITConfigError, hookimpl\n"
        "class Mine:\n"
        "    static_weights = hookimpl(lambda self, roles: None)\n"
        "for _ in range(2):\n"
        "    try: p.register(Mine(), 'dft')\n"
        "    except WITConfigError as error: assert 'registered already' in str(error), error\n"
        "    else: raise AssertionError('it was taken')\n"
        "    assert p.plugin_manager().get_plugin('dft').__name__ == 'wit_plugins.strategies.dft'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_told_the_built_in_ones_alike():
    with pytest.raises(WITConfigError, match="'masked_though' is not a registered strategy.*masked_thought"):
        ActiveStrategies({"masked_though": {}})


def test_importing_the_core_imports_no_framework():
    code = (
        "import sys, wit_plugins.contract.plugins as p; p.plugin_manager();"
        "assert not {'trl', 'axolotl', 'llamafactory', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_axolotl_plugin_that_cannot_be_imported_stops_a_run():
    """Axolotl goes on without a plugin that fails with ImportError; this must not be one."""
    with pytest.raises(WITConfigError, match="wit_axolotl.WITPlugin cannot be imported: No module named 'axolotl"):
        importlib.import_module("wit_axolotl").WITPlugin  # noqa: B018


def test_wit_alone():
    weights = ActiveStrategies({"wit": WIT}).static_weights(IDS, ROLES, {})
    assert weights.dtype == np.float32
    assert weights.tolist() == [0, 0.25, 0.5, 0.5]


def test_static_weights_multiply(registered):
    registered(ById(), "by_id")
    active = ActiveStrategies({"wit": WIT, "by_id": {"id": 7}})
    assert active.static_weights(IDS, ROLES, {"factor": 0.5}).tolist() == [0, 0.25, 0.5, 0.25]


def test_what_strategies_need_is_found_out_once(registered):
    class Asks:
        @hookimpl
        def static_weights(self, roles, text):
            return None

        @hookimpl
        @entropy_of_top(5)
        def dynamic_weights(self, log_probs, topk_entropy, reference_log_probs, documents):
            return None

    class Changes:
        @hookimpl
        def change_inputs(self, input_ids):
            return None

    registered(Asks(), "asks")
    registered(Changes(), "changes")
    active = ActiveStrategies({"wit": WIT, "asks": {}, "changes": {}})
    assert active.needs == Requirements(
        dynamic=("asks",),
        entropies=(5,),
        references=("asks",),
        reference=None,
        snapshots=(),
        snapshot_every=None,
        prompt_attention=(),
        share_of_responses=None,
        documents=("asks",),
        per_token=False,
        across_tokens=("asks", "changes"),
        draws_targets=False,
        replaces_nll=(),
        anchors=(),
        anchor_weight=0.0,
        anchor_model=None,
        changed_inputs=("changes",),
        text={"text": ("asks",)},
        spans=False,
        by_role_alone=False,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        active.needs.per_token = True
    with without_references():
        assert active.needs.references == ("asks",)  # of this run, whatever is asked for later
        assert ActiveStrategies(active.options_by_name).needs.references == ()
    assert pickle.loads(pickle.dumps(ActiveStrategies({"dft": {}}))).needs == ActiveStrategies({"dft": {}}).needs


def test_dynamic_weights_multiply(registered):
    class Half:
        @hookimpl
        def dynamic_weights(self, roles):
            return torch.where(roles == PROMPT, 0.5, 1.0)

    registered(Half(), "half")
    log_probs = torch.tensor([0.1, 0.2, 0.4]).log()
    active = ActiveStrategies({"wit": WIT, "dft": {}, "half": {}})
    assert active.needs.dynamic
    factors = active.on_device.dynamic_weights(log_probs, torch.tensor([PROMPT, RESPONSE, RESPONSE], dtype=torch.uint8))
    assert torch.allclose(factors, torch.tensor([0.05, 0.2, 0.4]))
    assert not ActiveStrategies({"wit": WIT}).needs.dynamic


def test_only_named_strategies_are_called(registered):
    registered(Broken("never called"), "idle")
    assert ActiveStrategies({"wit": WIT}).static_weights(IDS, ROLES, {}).tolist() == [0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dtf", {}, "'dtf' is not a registered strategy; did you mean 'dft'"),
        ("os.path", {}, "'os.path' is not a registered strategy"),
        ("trl", {}, "'trl' is not a registered strategy"),
        ("dft", {"beta": 1}, r"dft: takes no options, got \['beta'\]"),
        ("by_id", {"id": "x"}, "by_id: id = 'x' is not a token id"),
    ],
)
def test_wrong_names_and_options(registered, name, options, message):
    registered(ById(), "by_id")
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, name: options})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.ones(3), "shape"),
        (np.array([1, -1, 1, 1]), "negative or not finite"),
        (np.array([1, np.nan, 1, 1]), "negative or not finite"),
    ],
)
def test_strategies_that_return_nonsense(registered, result, message):
    registered(Broken(result), "broken")
    with pytest.raises(ValueError, match=f"'broken'.*{message}"):
        ActiveStrategies({"wit": WIT, "broken": {}}).static_weights(IDS, ROLES, {})


def test_nobody_answers_in_the_place_of_a_strategy(registered):
    """Registered later, never named: pluggy would ask it first."""
    before = ActiveStrategies({"wit": WIT, "dft": {}})

    class Loud:
        @hookimpl(tryfirst=True)
        def static_weights(self, roles):
            return np.full(len(roles), 7.0)

        @hookimpl(tryfirst=True)
        def dynamic_weights(self, log_probs):
            return torch.full_like(log_probs, 7.0)

        @hookimpl(tryfirst=True)
        def validate_options(self, options):
            raise ValueError("asked")

    registered(Loud(), "loud")
    log_probs = torch.tensor([0.1, 0.2]).log()
    for active in (before, ActiveStrategies({"wit": WIT, "dft": {}})):
        assert active.static_weights(IDS, ROLES, {}).tolist() == [0, 0.25, 0.5, 0.5]
        factors = active.on_device.dynamic_weights(log_probs, torch.tensor([PROMPT, RESPONSE], dtype=torch.uint8))
        assert torch.allclose(factors, log_probs.exp())


class Unmarked:
    def static_weights(self, roles):
        return np.ones(len(roles))


class Misspelt:
    @hookimpl
    def static_weight(self, roles):
        return np.ones(len(roles))


class WrongArgument:
    @hookimpl
    def static_weights(self, rolls):
        return np.ones(len(rolls))


class Wrapper:
    @hookimpl(wrapper=True)
    def static_weights(self):
        return (yield)


class Empty:
    pass


WRONG = [
    (Unmarked(), "static_weights is not marked, so it would never be called; put @hookimpl above it"),
    (Misspelt(), "there is none of this name; did you mean 'static_weights'"),
    (WrongArgument(), "rolls"),
    (Wrapper(), "static_weights is a wrapper"),
    (Empty(), "implements no hook; the hooks are validate_options, static_weights, dynamic_weights"),
]


@pytest.mark.parametrize(("plugin", "message"), WRONG)
def test_hooks_that_would_never_be_called_are_refused(plugin, message):
    for _ in range(2):  # and nothing of the first attempt is left
        with pytest.raises(WITConfigError, match=f"(?s)'mine' cannot be registered.*{message}"):
            register(plugin, "mine")
    assert not plugin_manager().has_plugin("mine")
    assert ActiveStrategies({"wit": WIT}).static_weights(IDS, ROLES, {}).tolist() == [0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(("plugin", "message"), WRONG)
def test_a_wrong_entry_point_stops_no_run_that_does_not_name_it(plugin, message, monkeypatch):
    import wit_plugins.contract.plugins as plugins

    class EntryPoint:
        name, value = "bad", "bad_package.plugin"

        def load(self):
            return plugin

    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint()])
    with pytest.warns(UserWarning, match=f"(?s)'bad'.*is off.*{message}"):
        manager = plugins.plugin_manager.__wrapped__()
    assert not manager.has_plugin("bad")
    assert manager.has_plugin("wit")


def test_an_entry_point_with_a_taken_name_is_said_to_be_off(monkeypatch):
    import wit_plugins.contract.plugins as plugins

    class EntryPoint:
        name, value = "dft", "their_package.dft"

    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint()])
    with pytest.warns(UserWarning, match="'dft' \\(their_package.dft\\) is off: another plugin has its name"):
        plugins.plugin_manager.__wrapped__()


class Relative:
    """p / mean(p): a factor that depends on the whole micro-batch."""

    @hookimpl
    def dynamic_weights(self, log_probs):
        return log_probs.exp() / log_probs.exp().mean()


class SaysPerToken(Relative):
    @hookimpl
    @per_token
    def dynamic_weights(self, log_probs):
        return super().dynamic_weights(log_probs)


def test_per_token_is_a_promise_that_is_checked(registered):
    registered(Relative(), "relative")
    registered(SaysPerToken(), "says_per_token")
    log_probs, roles = torch.tensor([0.1, 0.4]).log(), torch.full((2,), RESPONSE, dtype=torch.uint8)
    assert ActiveStrategies({"wit": WIT, "dft": {}}).needs.per_token
    active = ActiveStrategies({"wit": WIT, "dft": {}, "relative": {}})
    assert not active.needs.per_token
    assert torch.allclose(active.on_device.dynamic_weights(log_probs, roles), torch.tensor([0.1 * 0.4, 0.4 * 1.6]))
    with pytest.raises(ValueError, match="'says_per_token' is marked per_token, but .* depends on other tokens"):
        ActiveStrategies({"wit": WIT, "says_per_token": {}}).on_device.dynamic_weights(log_probs, roles)


def test_dynamic_weights_that_are_no_weights(registered):
    class Negative:
        @hookimpl
        def dynamic_weights(self, log_probs):
            return log_probs

    registered(Negative(), "negative")
    with pytest.raises(ValueError, match="'negative' returned factors that are negative or not finite"):
        ActiveStrategies({"wit": WIT, "negative": {}}).on_device.dynamic_weights(
            torch.tensor([-0.5]), torch.tensor([RESPONSE], dtype=torch.uint8)
        )


def test_a_name_is_taken_once(registered):
    registered(ById(), "by_id")
    with pytest.raises(WITConfigError, match="registered already"):
        register(ById(), "by_id")


def test_pickles_with_modules_and_objects(registered, tmp_path, monkeypatch):
    registered(ById(), "by_id")
    active = ActiveStrategies({"wit": WIT, "by_id": {"id": 7}})
    data = pickle.dumps(active)
    plugin_manager().unregister(name="by_id")  # as in a spawned worker, which has the entry points only
    again = pickle.loads(data)
    assert again.static_weights(IDS, ROLES, {"factor": 0.5}).tolist() == [0, 0.25, 0.5, 0.25]


def test_a_broken_entry_point_warns_and_stays_off(monkeypatch):
    import wit_plugins.contract.plugins as plugins

    class EntryPoint:
        name, value = "bad", "bad_package.plugin"

        def load(self):
            raise ImportError("no module named bad_package")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint()])
    with pytest.warns(UserWarning, match="'bad'.*no module named bad_package"):
        manager = plugins.plugin_manager.__wrapped__()
    assert not manager.has_plugin("bad")
    assert manager.has_plugin("wit")


def test_a_third_party_comes_in_by_entry_point(monkeypatch):
    import wit_plugins.contract.plugins as plugins

    module = types.ModuleType("third_party")
    module.static_weights = hookimpl(lambda roles: np.ones(len(roles)))

    class EntryPoint:
        name, value = "third", "third_party"

        def load(self):
            return module

    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint()] if group == "wit_plugins" else [])
    assert plugins.plugin_manager.__wrapped__().get_plugin("third") is module


def test_hook_calls_can_be_traced():
    code = (
        "import numpy as np; from wit_plugins.contract.active import ActiveStrategies;"
        "ActiveStrategies({'wit': {'prompt_weight': 1.0, 'response_weight': 1.0}})"
        ".static_weights(np.zeros(1), np.ones(1, np.uint8), {})"
    )
    env = {**os.environ, "WIT_TRACE_HOOKS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert "static_weights(" in done.stderr
    assert "-> wit" in done.stderr
