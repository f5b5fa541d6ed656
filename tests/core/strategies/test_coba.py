"""CoBa's weights of tasks: a plain computation from the formula, and cases whose answer is known."""

import literature
import numpy as np
import pytest

from wit_plugins import WITConfigError
from wit_plugins.contract.active import ActiveStrategies

WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def weights(history, before=None, **options):
    """After evaluations with these losses `[E, T]`, and one before training."""
    history = [before or [1.0] * len(history[0]), *history]
    names = [f"task{index}" for index in range(len(history[0]))]
    short = {f"coba_{name}": value for name, value in options.items()}
    groups = ActiveStrategies({"wit": WIT, "coba": {"groups": names, **short}}).groups
    return groups.weights({name: [losses[i] for losses in history] for i, name in enumerate(names)})


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("evaluations", [4, 5, 7, 12, 30])
def test_weights_are_the_formula_s(tasks, evaluations):
    """Before and after the window is full, and where a task falls below the least weight."""
    generator = np.random.default_rng(evaluations)
    rates, at = generator.uniform(-0.02, 0.1, tasks), np.arange(evaluations)[:, None]
    history = (3 * np.exp(-rates * at) + generator.normal(0, 0.05, (evaluations, tasks))).tolist()
    before = generator.uniform(2, 5, tasks).tolist()
    expected = literature.coba([before, *history], warmup=4, length=9, tau=5)
    assert weights(history, before, warmup_steps=4, history_length=9, tau=5) == pytest.approx(expected, rel=1e-6)
    assert len({round(weight, 6) for weight in expected}) == tasks


def test_the_warm_up_and_the_defaults():
    history = [[3 - 0.01 * e, 3 + 0.01 * e] for e in range(100)]
    assert weights(history[:99]) == [1, 1]
    assert weights(history) != [1, 1]
    assert weights(history) == pytest.approx(literature.coba([[1.0, 1.0], *history], 100, 200, 5))


def test_the_slower_task_weighs_more_and_one_that_diverges_less():
    """Both at a steady pace: RCS alone decides, DF being 1. Then a task's loss turns, and DF gives way to ACS."""
    steady = [[5 - 0.1 * e, 5 - 0.05 * e] for e in range(12)]
    fast, slow = weights(steady, warmup_steps=4, history_length=4)
    # α = -0.1, -0.05: RCS = softmax(-4/3, -2/3), weights = softmax(2 RCS).
    rcs = np.exp([-4 / 3, -2 / 3]) / np.exp([-4 / 3, -2 / 3]).sum()
    assert [fast, slow] == pytest.approx(np.exp(2 * rcs) / np.exp(2 * rcs).sum())
    turned = [[5 - 0.1 * e, 5 - 0.05 * e + max(0, e - 9)] for e in range(14)]
    falling, rising = weights(turned, warmup_steps=4, history_length=6)
    assert falling > rising


def test_tasks_of_one_pace_weigh_alike_whatever_their_losses_are():
    """Each loses 3% of its first loss at every evaluation."""
    before = [6.0, 2.0, 0.5]
    history = [[loss * 0.97**e for loss in before] for e in range(1, 12)]
    assert weights(history, before, warmup_steps=4, history_length=6) == pytest.approx([1 / 3] * 3)


def test_losses_that_do_not_move_weigh_alike():
    assert weights([[2.0, 3.0]] * 5, warmup_steps=2, history_length=4) == pytest.approx([0.5, 0.5])


def test_a_task_that_is_not_evaluated_is_refused():
    with pytest.raises(ValueError, match="the evaluation set has no response of task1"):
        weights([[1.0, float("nan")]] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "groups = None: needs all tasks, at least two"),
        ({"groups": ["code"]}, r"groups = \['code'\]: needs all tasks, at least two"),
        ({"groups": {"code": 1.0, "chat": 2.0}}, "groups = .*: needs all tasks"),
        ({"groups": ["code", "chat"], "coba_tau": 0}, "coba_tau = 0: is a number above 0"),
        ({"groups": ["code", "chat"], "coba_warmup_steps": 1}, "coba_warmup_steps = 1: is a number of evaluations"),
        ({"groups": ["code", "chat"], "coba_history_length": 50}, "coba_history_length is at least coba_warmup_steps"),
        ({"groups": ["code", "chat"], "cobatau": 5}, "no option 'cobatau'; did you mean 'coba_tau'"),
        ({"groups": ["code", "chat"], "key": 3}, "key = 3: is the name of a column"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, "coba": options})
