"""The second shelf of methods: options that are refused, and cases small enough to know the answer."""

import math

import pytest
import torch

from wit_plugins import WITConfigError, hookimpl, snapshot_every
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.strategies import iw_sft, mile, talr, unlikelihood
from wit_plugins.testing import registered, weigh

SAID = [("user", "two plus"), ("assistant", "two four")]
HALF = math.log(0.5)


class Near:
    @hookimpl
    def anchor_weight(self, options):
        return options["pull"]


def test_one_anchor_a_run():
    with registered(Near(), "near"):
        with pytest.raises(WITConfigError, match="near and asft both hold the model near a reference"):
            ActiveStrategies({"near": {"pull": 0.2}, "asft": {}})
        assert ActiveStrategies({"near": {"pull": 0.2}}).needs.anchor_weight == 0.2
    assert ActiveStrategies({"dft": {}}).needs.anchor_weight == 0
    with pytest.raises(WITConfigError, match="asft: reference = 3: is the path or the name of a model"):
        ActiveStrategies({"asft": {"reference": 3}})


class Short:
    @hookimpl
    def replace_nll(self, log_probs, weights, roles):
        return log_probs[:1], log_probs[:1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("power", {}, "power: needs q; write power: {q: 1}"),
        ("power", {"alpha": 1}, "there is no option 'alpha'"),
        ("power", {"q": -1}, "q = -1: is a number >= 0"),
        ("power", {"q": True}, "q = True: is a number >= 0"),
        ("power", {"q": 1, "only_top": 10}, "only_top = 10: is a probability from 0 to 1"),
        ("power", {"q": 1, "only_top": 0.5, "only_bottom": 0.1}, "no token would be kept"),
        ("mile", {"gama": 1}, "no option 'gama'; did you mean 'gamma'"),
        ("mile", {"gamma": "x"}, "gamma = 'x': is a number >= 0"),
        ("talr", {}, "talr: needs min_weight"),
        ("talr", {"min_weight": 2}, "min_weight = 2: is the least factor of a token, from 0 to 1"),
        ("deft", {"cayley": "yes"}, "cayley = 'yes': is true or false"),
        ("deft", {"cayly": True}, "did you mean 'cayley'"),
        ("iw_sft", {"clip": 1.8}, "clip = 1.8: is at most 1"),
        ("iw_sft", {"clip": 0.5}, "clip = 0.5: is read for one factor a token.*sum_over_time: false"),
        ("iw_sft", {"sum_over_time": False, "temp": 2}, "temp = 2: is read for one factor a document.*time: true"),
        ("iw_sft", {"sum_over_time": 1}, "sum_over_time = 1: is true"),
        ("iw_sft", {"temp": 0}, "temp = 0: is a number above 0"),
        ("asft", {"alpha": 0}, "alpha = 0: is a number above 0, such as 0.1; dft: {} is the loss without it"),
        ("asft", {"kl_weight": 0.1}, "there is no option 'kl_weight'"),
        ("asft", {"refrence": "x"}, "did you mean 'reference'"),
        ("unlikelihood", {"alpha": 1}, "unlikelihood: takes no options"),
        ("psft", {"clip_ratio_high": -1}, "clip_ratio_high = -1: is a number >= 0"),
        ("psft", {"clip_ratio": 1}, "did you mean 'clip_ratio_high'"),
        ("psft", {"renew_steps": 0}, "psft: renew_steps = 0: is a whole number of optimizer steps, at least 1"),
        ("psft", {"renew_steps": 2.5}, "renew_steps = 2.5: is a whole number"),
        ("iw_sft", {"references": "x"}, "did you mean 'reference'"),
    ],
)
def test_refused_by_name(name, options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": {"prompt_weight": 0.0, "response_weight": 1.0}, name: options})


@pytest.mark.parametrize(
    ("strategies", "weights"),
    [
        ({"power": {"q": 0}}, [1, 1, 1]),
        ({"power": {"q": 1}}, [0.5, 0.25, 1]),  # Dynamic Fine-Tuning
        ({"power": {"q": 2}}, [0.25, 0.0625, 1]),
        ({"power": {"q": 1, "only_top": 0.4}}, [0.5, 0, 1]),
        ({"power": {"q": 0, "only_bottom": 0.4}}, [0, 1, 0]),
        ({"deft": {}}, [0.5**0.5, 0.25**0.25, 1]),
        ({"talr": {"min_weight": 0.3}}, [math.exp(-1), 0.3, 1]),  # one document: its mean nll is ln 2
    ],
)
def test_by_hand(strategies, weights):
    tokens = weigh(SAID, strategies, log_probs=[HALF, 2 * HALF, 0.0], concentrations=[0.5, 0.25, 1.0])
    assert [token.weight for token in tokens[1:]] == pytest.approx(weights, rel=1e-6)


def test_the_concentration_has_to_be_given():
    with pytest.raises(ValueError, match="asks for the concentration; give concentrations, as many as log_probs"):
        weigh(SAID, {"deft": {}}, log_probs=[HALF] * 3)


def test_an_older_model_cannot_be_given():
    with pytest.raises(ValueError, match="psft compares with an earlier state of a model"):
        weigh(SAID, {"psft": {}}, log_probs=[HALF] * 3)


def test_one_pace_a_run():
    class Other:
        @hookimpl
        @snapshot_every("every")
        def dynamic_weights(self, snapshot_log_probs):
            return snapshot_log_probs.exp()

    with registered(Other(), "other"):
        with pytest.raises(WITConfigError, match="one snapshot.*psft after 8 steps, other after 3 steps"):
            ActiveStrategies({"psft": {}, "other": {"every": 3}})
        ActiveStrategies({"psft": {}, "other": {"every": 8}})

    class Unmarked:
        @hookimpl
        def dynamic_weights(self, snapshot_log_probs):
            return snapshot_log_probs.exp()

    with registered(Unmarked(), "unmarked"), pytest.raises(WITConfigError, match=r"put @snapshot_every"):
        ActiveStrategies({"unmarked": {}})


def test_unlikelihood_by_hand():
    """At p = 0.25, at a p that float32 rounds to 1, and at p = 0; a weight above 0 keeps its nll."""
    log_probs = torch.tensor([math.log(0.25), -1e-12, -torch.inf, math.log(0.25)])
    losses, slopes = unlikelihood.replace_nll(log_probs, torch.tensor([-1.0, -1.0, -2.0, 0.5]))
    assert losses.tolist() == pytest.approx([-math.log(0.75), -math.log(1e-5), 0, -math.log(0.25)], rel=1e-5)
    assert slopes.tolist() == pytest.approx([-1 / 3, -1e5, 0, 1], rel=1e-5)


def test_what_has_other_targets_has_no_nll_to_replace():
    with pytest.raises(WITConfigError, match="otr and unlikelihood both put other targets"):
        ActiveStrategies({"otr": {"samples": 1, "beta": 0, "temperature": 1}, "unlikelihood": {}})


def test_a_term_of_another_shape_is_refused():
    log_probs, ones = torch.zeros(2), torch.ones(2)
    with registered(Short(), "short"):
        asked = ActiveStrategies({"short": {}}).on_device
        with pytest.raises(ValueError, match=r"'short' returned losses \(1,\) and slopes"):
            asked.replace_nll(log_probs, ones.to(torch.uint8), ones)


def test_what_weighs_nothing_changes_nobody_s_factor():
    """A token of weight 0 that is computed for a metric; and a micro-batch in which no other is."""
    weights, documents = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 1, 0])
    entropy = torch.tensor([1.0, 3.0, 100.0])
    assert mile.dynamic_weights(entropy, weights, {})[:2].tolist() == pytest.approx([2 / 3, 4 / 3])
    log_probs = torch.tensor([-1.0, -3.0, -50.0])
    factors = talr.dynamic_weights(log_probs, weights, documents, {"min_weight": 0.0})
    assert factors[:2].tolist() == pytest.approx([math.exp(-0.5), math.exp(-1.5)])  # tau is 2
    reference = torch.tensor([-2.0, -2.0, 0.0])
    factors = iw_sft.dynamic_weights(log_probs, reference, weights, documents, {})
    assert factors.tolist() == pytest.approx([math.e, 1 / math.e, math.e])
    nothing = torch.zeros(3)
    assert mile.dynamic_weights(entropy, nothing, {}).isfinite().all()
    assert talr.dynamic_weights(log_probs, nothing, documents, {"min_weight": 0.0}).isfinite().all()
    assert iw_sft.dynamic_weights(log_probs, reference, nothing, documents, {}).tolist() == [1, 1, 1]


def test_a_micro_batch_known_by_heart_has_no_temperature():
    one, zero = torch.ones(2), torch.zeros(2)
    factors = talr.dynamic_weights(zero, one, torch.tensor([0, 0]), {"min_weight": 0.0})
    assert factors.tolist() == [1, 1]
