"""The hooks of framework adapters: who is asked, whose answer counts."""

import pytest
from trainkit import CONFIG, make_trainer

from wit_plugins import WITConfigError, attach, attached, hookimpl
from wit_plugins.cli.driver import FrameworkDriver, drivers
from wit_plugins.contract.plugins import strategy_names
from wit_plugins.testing import registered
from wit_plugins.training.adapter import TrainerAdapter


class Picky(TrainerAdapter):
    framework = "Picky 1.0"

    def check(self, trainer):
        if trainer.args.seed == 13:
            raise WITConfigError("seed = 13: not with Picky; take another")


class PickyDriver(FrameworkDriver):
    name, title = "picky", "Picky"

    def recognises(self, values):
        return "picky" in values


class Plugin:
    def __init__(self, answer):
        self.answer = answer

    @hookimpl
    def adapt_trainer(self, trainer):
        return self.answer if trainer.args.run_name == "picky" else None

    @hookimpl
    def framework_driver(self):
        return PickyDriver()


def test_the_adapter_of_a_trainer_is_asked(tmp_path):
    with registered(Plugin(Picky()), "picky"):
        assert "picky" not in strategy_names()
        other = make_trainer(tmp_path)
        attach(other, CONFIG)
        assert attached(other).adapter.framework == "transformers"
        mine = make_trainer(tmp_path, run_name="picky")
        attach(mine, CONFIG)
        assert attached(mine).adapter.framework == "Picky 1.0"
        with pytest.raises(WITConfigError, match="seed = 13: not with Picky"):
            attach(make_trainer(tmp_path, run_name="picky", seed=13), CONFIG)


def test_an_answer_that_is_no_adapter_is_refused(tmp_path):
    with registered(Plugin("yes"), "picky"), pytest.raises(WITConfigError, match="'yes', which is no TrainerAdapter"):
        attach(make_trainer(tmp_path, run_name="picky"), CONFIG)


def test_drivers_are_collected():
    pytest.importorskip("rich")  # what the command needs
    with registered(Plugin(None), "picky"):
        assert "picky" in [driver.name for driver in drivers()]
    assert "picky" not in [driver.name for driver in drivers()]
