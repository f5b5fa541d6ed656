"""Configurations and data for the tests of the preview."""

import re

import yaml
from datasets import Dataset
from support import from_dataset
from trlkit import sft_trainer
from wit_trl.driver import TRLDriver

from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.summary import summarise, warnings

SHAPES = {
    "padded": {},
    "bfd": {"packing": True, "max_length": 24},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
    "cut": {"max_length": 9},
    "cut at the start": {"max_length": 9, "truncation_mode": "keep_end"},
    "shuffled": {"shuffle_dataset": True, "seed": 3},
}


def prepare(path, **overrides):
    return TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text()), overrides))


def reference_trainer(tmp_path, kind, **shape):
    """TRL's own trainer with its weights, made without this command."""
    return sft_trainer(tmp_path / "reference", kind, **shape)


def by_hand(trainer, prompt_weight, response_weight):
    """Totals from the prepared dataset with nothing of this project: first tokens out, labels decide."""
    totals = {"documents": 0, "tokens": 0, "prompt": 0, "response": 0, "first": 0}
    for document in from_dataset(trainer.train_dataset):
        totals["documents"] += 1
        totals["tokens"] += len(document.input_ids)
        totals["first"] += 1
        totals["response"] += sum(document.is_response[1:])
        totals["prompt"] += len(document.input_ids) - 1 - sum(document.is_response[1:])
    masses = [w * totals[name] for name, w in (("prompt", prompt_weight), ("response", response_weight))]
    return totals, masses[0] / sum(masses)


def map_batches(prepared, split):
    for row in split.rows:
        yield prepared.collator([row])


def found_warnings(path, **overrides):
    prepared = prepare(path, **overrides)
    return warnings(summarise(prepared, prepared.splits["train"]), prepared.config, prepared)


def tokenised(*documents):
    return Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in documents])


HOSTILE = [
    "<script>alert(1)</script> </span> \" onmouseover='alert(2)' &lt; &amp; <!-- ]]>",
    "\x1b[31m red \x1b[2J \x1b]0;title\x07 \x9b1m \r over \x08\x08 \x7f",
    "\u202e right \u2066 left \u200b \u200d \ufeff \u00ad \U000e0041 \u3164",
    "Z" + "\u0300" * 50 + " 漢字 かな 😀👩\u200d👩 عربي",
    "{{ 7*7 }} {% raw %} [bold red]markup[/] :smile: ${x}",
]


def byte_level_tokenizer(folder):
    """Every byte is a token, so that every character of several bytes comes in pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i + 3 for i, c in enumerate(alphabet)} | {"<|end|>": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.save_pretrained(folder)
    return made


def assert_harmless(text):
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", text)
    assert not re.search(
        "[\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u00ad\U000e0000-\U000e007f\ud800-\udfff]", text
    )
    assert not re.search("[\u0300-\u036f]{3}", text)
