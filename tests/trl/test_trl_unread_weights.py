"""Weights in the data are never lost silently: not by a script that forgot them, not by a cache, not by truncation."""

import copy
import json
import subprocess
import sys

import pytest
import trl
import wit_trl.label_weights
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from support import subprocess_env
from weightkit import OPTIONS, config, conversation, dataset, fingerprints, prepared, tokenizer, trainer
from wit_trl import WITCallback, prepare_dataset
from wit_trl.driver import _splits
from wit_trl.row_weights import own_labels
from wit_trl.unread_weights import NOTES, _as_they_are

from wit_plugins import WITConfig, WITConfigError, attach
from wit_plugins.data_weights.reader import UnreadWeightWarning


def one(place):
    """Four conversations; in the last one a weight stands somewhere."""
    made = [conversation(index) for index in range(4)]
    for row in made:
        row["weight" if place == "sample" else "note"] = None
        row["messages"][1] |= {"train": None}
    if place == "sample":
        made[3]["weight"] = 0.5
    elif place == "message":
        made[3]["messages"][1]["train"] = False
    elif place in ("part", "mixed"):
        for message in made[3]["messages"] if place == "part" else made[3]["messages"][:1]:
            message["content"] = [{"type": "text", "text": "x", "weight": 0.5}]
        for row in made[:3] if place == "part" else ():
            for message in row["messages"]:
                message["content"] = [{"type": "text", "text": "x", "weight": None}]
    return [{k: v for k, v in row.items() if v is not None or k == "weight"} for row in made]


def lines(made):
    """Rows as a stream whose columns nobody knows before they come, and that counts what is read."""
    yield from made


PLACES = {
    "sample": "column weight",
    "message": r"messages\[\].train",
    "part": r".*messages\[\].content\[\].weight",
    "mixed": "messages",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("args", [{}, {"packing": True}], ids=["padded", "packed"])
def test_a_trainer_with_unread_weights_is_refused(tmp_path, place, args):
    data = Dataset.from_list(one(place), **({"on_mixed_types": "use_json"} if place == "mixed" else {}))
    made = trainer(tmp_path, data, **OPTIONS, **args)
    for attaching in (lambda: WITCallback(made, prompt_weight=0.2), lambda: attach(made, WITConfig(prompt_weight=0.2))):
        with pytest.raises(WITConfigError, match=rf"the train dataset \({PLACES[place]}.*wit_trl.prepare_dataset\("):
            attaching()
    # The two ways out.
    WITCallback(made, prompt_weight=0.2, message_weight_keys=[], sample_weight_key=None)
    made = trainer(tmp_path, prepared(data), **OPTIONS, **args)
    WITCallback(made, prompt_weight=0.2)


def test_data_without_weights_is_not_refused(tmp_path):
    made = trainer(tmp_path, Dataset.from_list([conversation(index) for index in range(4)]), **OPTIONS, packing=True)
    WITCallback(made, prompt_weight=0.2)


def test_nor_is_an_evaluation_set_forgotten(tmp_path):
    data = Dataset.from_list(one("message"))
    plain = Dataset.from_list([conversation(index) for index in range(4)])
    made = trainer(tmp_path, plain, trainer_kwargs={"eval_dataset": {"mine": data}}, **OPTIONS)
    with pytest.raises(WITConfigError, match="the mine dataset"):
        WITCallback(made, prompt_weight=0.2)


def test_an_evaluation_set_named_train_does_not_stand_for_the_training_set(tmp_path):
    """Neither at `attach`, also where the trainer was made before wit_trl was imported, nor for the command `wit`."""
    data = Dataset.from_list(one("message"))
    plain = Dataset.from_list([conversation(index) for index in range(5)])
    made = trainer(tmp_path, data, trainer_kwargs={"eval_dataset": {"train": plain}}, **OPTIONS)
    with pytest.raises(WITConfigError, match="the train dataset"):
        WITCallback(made, prompt_weight=0.2)
    splits = _splits(made, {"train": data, "eval_train": plain})
    assert [(name, len(split.rows), split.uncut) for name, split in splits.items()] == [
        ("train", 4, data),
        ("eval_train", 5, plain),
    ]
    kept = trainer(tmp_path, prepared(plain), trainer_kwargs={"eval_dataset": {"train": prepared(plain)}}, **OPTIONS)
    vars(kept).pop(NOTES)
    assert [name for name, _ in _as_they_are(kept)] == ["train", "train"]


@pytest.mark.parametrize("args", [{}, {"packing": True}], ids=["padded", "packed"])
def test_a_stream_is_refused_when_the_weight_comes_by(tmp_path, args):
    """Its rows alone can tell, and none is taken away to look."""
    stream = IterableDataset.from_generator(lines, gen_kwargs={"made": one("message")})
    assert stream.features is None
    made = trainer(tmp_path, stream, **OPTIONS, max_steps=1, **args)
    made.add_callback(WITCallback(made, prompt_weight=0.2))
    with pytest.raises(WITConfigError, match=r"the train dataset \(its rows\), and TRL has tokenised it without them"):
        made.train()
    made = trainer(tmp_path, prepared(stream), **OPTIONS, max_steps=1, **args)
    made.add_callback(WITCallback(made, prompt_weight=0.2))
    made.train()
    assert made.state.global_step == 1


@pytest.mark.parametrize("args", [{}, {"packing": True}], ids=["padded", "packed"])
def test_data_that_was_prepared_with_other_settings_is_refused(tmp_path, args):
    """Also where nothing of it weighed anything else under those."""
    data = Dataset.from_list(one("message"))
    other = prepared(data, message_weight_keys=["loss", "train"])
    with pytest.raises(WITConfigError, match="was prepared with other settings than these"):
        WITCallback(trainer(tmp_path, other, **OPTIONS, **args), prompt_weight=0.2)
    nothing = trainer(tmp_path, prepared(data, message_weight_keys=["loss"]), **OPTIONS, **args)
    with pytest.raises(WITConfigError, match=r"the train dataset \(messages\[\].train"):
        WITCallback(nothing, prompt_weight=0.2)
    half = concatenate_datasets([prepared(data), other])
    with pytest.raises(WITConfigError, match="was prepared with other settings than these"):
        WITCallback(trainer(tmp_path, half, **OPTIONS, **args), prompt_weight=0.2)


@pytest.mark.parametrize("args", [{}, {"packing": True}], ids=["padded", "packed"])
def test_prepared_data_does_not_train_without_weights(tmp_path, args):
    made = trainer(tmp_path, prepared(Dataset.from_list(one("message"))), **OPTIONS, **args)
    with pytest.raises(ValueError, match="'str'"):
        made.train()


def test_a_trainer_that_was_made_before_is_told_so(tmp_path, monkeypatch):
    """`import wit_trl` came too late: what can be seen is looked at, and of the rest it is said that it cannot be."""
    monkeypatch.setattr(trl.SFTTrainer, "_prepare_dataset", wit_trl.label_weights._original)
    data = Dataset.from_list(one("message"))
    made = trainer(tmp_path, data, **OPTIONS)
    with pytest.raises(WITConfigError, match=r"the train dataset \(messages\[\].train"):
        WITCallback(made, prompt_weight=0.2)
    with pytest.raises(WITConfigError, match="made before wit_trl was imported, so that .* has not dropped"):
        WITCallback(trainer(tmp_path, prepared(data), **OPTIONS), prompt_weight=0.2)
    with pytest.warns(UnreadWeightWarning, match="cannot be seen any more whether weights stood in the train dataset"):
        WITCallback(trainer(tmp_path, data, **OPTIONS, packing=True), prompt_weight=0.2)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("stream", [False, True])
def test_trl_drops_what_it_drops_without_weights(tmp_path, mode, stream):
    """Examples of which no label is left; not those whose responses weigh 0."""
    plain = [conversation(index) for index in range(6)]
    for row in plain[::2]:
        filler = [{"role": "user", "content": "two plus " * 20}]
        row["messages"] = filler + row["messages"] if mode == "keep_start" else row["messages"] + filler
    weighing = json.loads(json.dumps(plain))
    for row in weighing:
        for message in row["messages"]:
            message["weight"] = 0.0 if message["role"] == "assistant" else 2.0
    args = {**OPTIONS, "max_length": 60, "truncation_mode": mode, "max_steps": 1}
    own = trainer(tmp_path, Dataset.from_list(plain), **args).train_dataset
    assert 0 < len(own) < 6
    data = Dataset.from_list(weighing)
    made = trainer(tmp_path, prepared(data.to_iterable_dataset() if stream else data), **args).train_dataset
    assert [row["input_ids"] for row in made] == own["input_ids"]
    assert [own_labels(row["labels"]).tolist() for row in made] == own["labels"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"weight": -1.0}, r"messages\[1\].weight = -1.0: is below 0, under which the loss has no lower bound"),
        ({"weight": 0.5, "train": True}, r"messages\[1\] has two weights, weight = 0.5 and train = True; keep one"),
        ({"weight": "much"}, r"messages\[1\].weight = 'much': a weight is a finite number"),
        ({"content": [{"type": "image", "weight": 0.5}]}, r"messages\[1\].content\[0\] = .*only parts of text"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(message, said):
    made = [conversation(index) for index in range(3)]
    made[2]["messages"][1] |= message
    with pytest.raises(WITConfigError, match=f"example 2 of the train dataset: {said}"):
        prepared(dataset(made))


def test_so_is_a_sample(tmp_path):
    made = [{**conversation(index), "weight": 1 - index} for index in range(3)]
    with pytest.raises(WITConfigError, match=r"example 2 of the held_out dataset: weight = -1: is below 0"):
        prepared(DatasetDict(train=dataset(made[:2]), held_out=dataset(made)))


def test_messages_that_a_template_rewrites_are_refused():
    names = copy.deepcopy(tokenizer())
    names.chat_template = "{% for m in messages %}[{{ m['content'] | upper }}{{ m['content'] | length }}]{% endfor %}"
    with pytest.raises(WITConfigError, match="example 3 of the train dataset: the chat template does not write"):
        prepare_dataset(dataset(one("message")), names, config())


def test_weights_that_are_for_no_token_are_refused():
    """Of messages in a column from which TRL does not tokenise."""
    made = [{"prompt": "two plus", "completion": "two", **conversation(1)} for _ in range(2)]
    made[1]["messages"][0]["weight"] = 0.5
    with pytest.raises(WITConfigError, match=r"messages\[\].weight of the train dataset: TRL tokenises the columns"):
        prepare_dataset(Dataset.from_list(made), tokenizer(), config())
    made = [{"conversations": row["messages"]} for row in made]
    with pytest.raises(WITConfigError, match="example 1 of the train dataset: conversations has weights, but TRL"):
        prepare_dataset(dataset(made), tokenizer(), config(), formatting_func=lambda row: "two plus")


def test_packing_that_ignores_documents_is_refused(tmp_path):
    data = prepared(dataset(one("message")))
    with pytest.raises(WITConfigError, match="packing_strategy = 'wrapped': .*use packing_strategy = 'bfd' or"):
        trainer(tmp_path, data, **OPTIONS, packing=True, packing_strategy="wrapped")


def test_a_cache_is_used_for_the_same_settings_alone(tmp_path):
    """In this process and in the next one; the roles' weights are not in it."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one("message")))
    first, *others = said = fingerprints(tmp_path)
    assert [other == first for other in others] == [True, False]
    files = sorted(path.name for path in (tmp_path / "cache").rglob("cache-*.arrow"))
    script = f"from weightkit import fingerprints; print(*fingerprints({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=subprocess_env(PYTHONHASHSEED="7"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == said
    assert sorted(path.name for path in (tmp_path / "cache").rglob("cache-*.arrow")) == files != []


def test_trl_that_prepares_otherwise_is_noticed(monkeypatch):
    def changed(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        return self._other_tokenizer

    monkeypatch.setattr(wit_trl.label_weights, "_original", changed)
    with pytest.raises(WITConfigError, match="reads self._other_tokenizer"):
        prepared(dataset(one("message")))
