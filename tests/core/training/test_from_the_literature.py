"""The methods of the literature on cases small enough to know the answer."""

import math

import literature
import numpy as np
import pytest
import torch
import trainkit
from support import documents

from wit_plugins import WITConfig, WITConfigError, attach, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.strategies import masked_thought, otr
from wit_plugins.testing import registered, weigh
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.tokens.token_random import Chance

WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def test_eaft_by_hand():
    """A token at which the model is undecided between 20 weighs ln 20 / 3, one at which it is sure nothing."""
    said = [("user", "two plus"), ("assistant", "two four")]
    undecided = math.log(20)
    entropies = [undecided, 0.0, undecided / 2]
    for options, weights in (({}, [1, 0, 0.5]), ({"alpha": 2}, [1, 0, 0.25]), ({"alpha": 0}, [1, 1, 1])):
        options = {**options, "divisor": undecided}
        tokens = weigh(said, {"eaft": options}, log_probs=[-1.0] * 3, entropies=entropies)
        assert [token.weight for token in tokens[1:]] == pytest.approx(weights)
    (_, first, *_) = weigh(said, {"eaft": {}}, log_probs=[-1.0] * 3, entropies=entropies)
    assert first.weight == pytest.approx(undecided / 3)
    with pytest.raises(ValueError, match=r"asks for the entropy; give entropies, as many as log_probs \(3\)"):
        weigh(said, {"eaft": {}}, log_probs=[-1.0] * 3)


def test_drawn_tokens_by_hand():
    """Shares 0.5, 0.25, 0.25, in this order; at temperature 1/2 they are 4/6, 1/6, 1/6."""
    probabilities = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    numbers = torch.tensor([[0.0, 0.49, 0.5, 0.74, 0.76, 0.99]])
    options = {"samples": 6, "beta": -0.5, "temperature": 1.0}
    ids, coefficients = otr.draw_targets(probabilities, torch.tensor([1]), lambda k: numbers[:, :k], options)
    assert ids.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert coefficients[0].tolist() == pytest.approx([-0.5 / 6, -0.5 / 6, 1 / 6, 1 / 6, -0.5 / 6, -0.5 / 6])
    ids, _ = otr.draw_targets(probabilities, torch.tensor([1]), lambda k: numbers, {**options, "temperature": 0.5})
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    ids, _ = otr.draw_targets(probabilities, torch.tensor([1]), lambda k: torch.ones(1, 1), options)
    assert ids.tolist() == [[2]]  # what rounds up to 1 is still no token without a share


def test_one_token_rollout_is_dft_on_average():
    """At β = 0 and temperature 1: the target is drawn as often as the model would write it."""
    torch.manual_seed(0)
    probabilities = torch.randn(40, 11).softmax(-1)
    targets = torch.arange(40) % 11
    options = {"samples": 5000, "beta": 0.0, "temperature": 1.0}
    _, coefficients = otr.draw_targets(probabilities, targets, lambda k: torch.rand(40, k), options)
    dft = probabilities[torch.arange(40), targets]
    assert (coefficients.sum(-1) - dft).abs().max() < 5 * 0.5 / math.sqrt(5000)


def test_masking_rises_with_the_training():
    ids, roles = torch.arange(10, 20)[None], torch.tensor([[1] * 5 + [2] * 5], dtype=torch.uint8)
    random = (torch.arange(10)[None] + 0.5) / 10
    options = {"mask_token_id": 3, "probability": 0.8, "warmup": 0.5}
    for progress, last in ((0.0, 5), (0.25, 5), (0.4, 6), (0.5, 8), (0.9, 8)):
        masked = masked_thought.change_inputs(ids, roles, random, progress, options)
        assert [i for i in range(10) if masked[0, i] == 3] == list(range(5, last))
    without = masked_thought.change_inputs(ids, roles, random, 0.0, {"mask_token_id": 3})
    assert torch.equal(without, ids)  # 0.2 by default, and all numbers here are above
    assert (masked_thought.change_inputs(ids, roles, random * 0, 0.0, {"mask_token_id": 3}) == 3).sum() == 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("otr", {}, "otr: needs samples"),
        ("otr", {"samples": 2, "beta": 0}, "otr: needs temperature"),
        ("otr", {"samples": 2.5, "beta": 0, "temperature": 1}, "samples = 2.5: is a whole number"),
        ("otr", {"samples": 2, "beta": "x", "temperature": 1}, "beta = 'x': is a number"),
        ("otr", {"samples": 2, "beta": 0, "temperature": 0}, "temperature = 0: is above 0"),
        ("otr", {"samples": 2, "betta": 0}, "no option 'betta'; did you mean 'beta'"),
        ("masked_thought", {}, "masked_thought: needs mask_token_id"),
        ("masked_thought", {"mask_token_id": -1}, "mask_token_id = -1: is the id of a token"),
        ("masked_thought", {"mask_token_id": 3, "probability": 1.2}, "probability = 1.2: is a share from 0 to 1"),
        ("masked_thought", {"mask_token_id": 3, "mask_rate": 0.4}, "no option 'mask_rate'"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, name: options})


def padded_to(length, left):
    def collate(features):
        made = {}
        for key, fill in (("input_ids", 0), ("labels", -100)):
            rows = [list(f[key]) for f in features]
            holes = [[fill] * (length - len(row)) for row in rows]
            made[key] = torch.tensor([h + r if left else r + h for r, h in zip(rows, holes, strict=True)])
        return made

    return collate


def test_a_token_s_numbers_are_its_own_in_any_batch():
    """Alone, beside others, padded on either side, behind another one in a packed row: as computed in whole numbers."""
    docs = documents(6, seed=3)
    strategies = ActiveStrategies({"wit": WIT})

    def numbers(rows, left, step=4, seed=7):
        examples = [
            {
                "input_ids": [i for doc in row for i in doc.input_ids],
                "labels": [i for doc in row for i in doc.labels],
                "seq_lengths": [len(doc.input_ids) for doc in row],
            }
            for row in rows
        ]
        batch = WeightedCollator(padded_to(50, left), strategies)(examples)
        found = Chance(batch[CODES_KEY], step, seed)(2)
        for r, (row, own) in enumerate(zip(rows, found, strict=True)):
            at = 50 - len(examples[r]["input_ids"]) if left else 0
            for doc in row:
                for t in range(1, len(doc.input_ids)):
                    expected = [literature.uniform(doc.input_ids, t, k, seed, step) for k in (0, 1)]
                    assert own[at + t].tolist() == expected
                at += len(doc.input_ids)
        return found

    numbers([[doc] for doc in docs], left=False)
    numbers([[doc] for doc in reversed(docs)], left=True)
    numbers([docs[:2], docs[2:5], docs[5:]], left=False)
    first, other = (numbers([[docs[0]]], False, step=step) for step in (0, 1))
    assert not torch.equal(first, other)


def test_a_token_s_numbers_are_evenly_distributed():
    """Over tokens, steps and draws: their mean, their variance, and none that says anything of its neighbour."""
    doc = {"input_ids": list(range(3, 403)), "labels": [-100] * 200 + list(range(203, 403))}
    codes = torch.from_numpy(WeightedCollator(None, ActiveStrategies({"wit": WIT})).codes(doc))[None]
    made = torch.stack([Chance(codes, step, 42)(3)[0, 1:] for step in range(50)]).double().numpy()  # [50, 399, 3]
    assert abs(made.mean() - 0.5) < 4 * math.sqrt(1 / 12 / made.size)
    assert abs(made.var() - 1 / 12) < 0.001
    for axis in range(3):
        a, b = np.delete(made, 0, axis).ravel(), np.delete(made, -1, axis).ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(a.size)


class Reading:
    """Records what it was given, and has the model read something else."""

    def __init__(self):
        self.progress, self.outside = [], None

    @hookimpl
    def change_inputs(self, input_ids, progress):
        self.progress.append(progress)
        return input_ids if self.outside is None else input_ids.clamp(min=self.outside)


def test_inputs_are_changed_in_training_and_not_in_evaluation(tmp_path):
    reading = Reading()
    with registered(reading, "reading"):
        trainer = trainkit.make_trainer(tmp_path, max_steps=3)
        plain = trainer.evaluate()
        attach(trainer, WITConfig(prompt_weight=0.0, strategies=["reading"]))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
        assert reading.progress == []
        trainer.train()
        assert reading.progress == [0, 1 / 3, 2 / 3]
        reading.outside = 61
        trainer = trainkit.make_trainer(tmp_path)
        attach(trainer, WITConfig(prompt_weight=0.0, strategies=["reading"]))
        with pytest.raises(ValueError, match=r"'reading' returned an id \(61\) that the model does not know; .*to 60"):
            trainer.train()


def test_targets_are_drawn_in_training_and_not_in_evaluation(tmp_path):
    trainer = trainkit.make_trainer(tmp_path, per_device_eval_batch_size=12)
    plain = trainer.evaluate()["eval_loss"]
    attach(
        trainer,
        WITConfig(prompt_weight=0.0, strategies={"otr": {"samples": 2, "beta": 0.0, "temperature": 1.0}}),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


class Drawing:
    def __init__(self, answer):
        self.answer = answer

    @hookimpl
    def draw_targets(self, probabilities, targets):
        return self.answer(targets)


def test_drawn_targets_that_are_none():
    with registered(Drawing(lambda y: (y, y.float())), "flat"), pytest.raises(ValueError, match=r"both are \[2, K\]"):
        ActiveStrategies({"wit": WIT, "flat": {}}).on_device.draw_targets(
            torch.ones(2, 3), torch.tensor([0, 1]), None, None
        )
    with registered(Drawing(lambda y: None), "none"):
        active = ActiveStrategies({"wit": WIT, "none": {}})
        assert active.on_device.draw_targets(torch.ones(2, 3), torch.tensor([0, 1]), None, None) is None
        both = {"wit": WIT, "none": {}, "otr": {"samples": 1, "beta": 0, "temperature": 1}}
        with pytest.raises(WITConfigError, match="none and otr both put other targets in the place"):
            ActiveStrategies(both)
