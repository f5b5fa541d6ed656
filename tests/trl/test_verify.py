"""`wit verify`: honest runs of every kind pass, and a fault planted anywhere in what trains is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apart import on_ranks
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import VOCAB_SIZE, llama
from transformers import BambaConfig, BambaForCausalLM, Gemma2Config, Gemma2ForCausalLM
from trlkit import dataset, sft_trainer
from wit_trl import WITCallback, prepare_dataset
from wit_trl.sft import WITArguments
from words import tokenizer

from wit_plugins.cli import main
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.loss import fused, model_patch
from wit_plugins.strategies import spans
from wit_plugins.tokens import example_reader
from wit_plugins.training import trainer_mixin
from wit_plugins.verify.characters import Data
from wit_plugins.verify.recompute import Verdict, verify
from wit_plugins.verify.record import read_record

SPANS = {"spans": [{"between": ["w05", "w20"], "weight": 0.5}, {"match": r"w1\d w", "role": "response", "weight": 3.0}]}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"w0{i} w11 w12 w0{i}"},
            {"role": "assistant", "content": f"w2{i} w21 w05 w22", "weight": 0.25 if i % 2 else 2.0},
            {"role": "user", "content": "w30 w31"},
            {"role": "assistant", "content": f"w4{i} w20 w1{i} w11 w45"},
        ],
        "weight": 1.0 + i,
    }
    for i in range(8)
]


PLAIN_CHATS = [{"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]} for row in CHATS]


def train(folder: Path, data: Any = "tokenised", model: Any = None, wit: Any = None, kwargs: Any = None, **args: Any):
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, **args}
    trainer = sft_trainer(folder, data, model, kwargs, **args)
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "verify": 3, **(wit or {})}
    trainer.add_callback(WITCallback(trainer, **wit))
    trainer.train()
    return folder / "out"


def chats(folder: Path) -> Dataset:
    from trl import SFTConfig

    settings = SFTConfig(str(folder), bf16=False, use_cpu=True, assistant_only_loss=True)
    return prepare_dataset(Dataset.from_list(CHATS), tokenizer(), settings)


def opinion(run: Path, rows: Any = None, **options: Any) -> Verdict:
    record = read_record(run)
    return verify(record, None if rows is None else Data(rows, record.settings), **options)


def gemma() -> Gemma2ForCausalLM:
    """A model with a soft cap that matters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB_SIZE, **sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.5,
            initializer_range=0.4, pad_token_id=0, bos_token_id=None, eos_token_id=1, attn_implementation="eager",
        )
    )  # fmt: skip


HONEST: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32, "num_train_epochs": 6},
    "padding-free": {"padding_free": True, "max_length": None},
    "weight_sum": {"wit": {"normalization": "weight_sum"}},
    "dft": {"wit": {"strategies": ["dft"]}},
    "eaft": {"wit": {"strategies": {"eaft": {"alpha": 2.0}}}},
    "spans": {"data": "conversational", "wit": {"strategies": SPANS}},
    "soft cap": {"model": gemma},
    "one step": {"wit": {"verify": 1}, "max_steps": 1},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_run_is_what_the_formula_gives(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = dict(HONEST[name])
    if "model" in case:
        case["model"] = case["model"]()
    run = train(tmp_path, **case)
    steps = 1 if name == "one step" else 3
    verdict = opinion(run)
    assert (verdict.problems, verdict.not_recomputed, verdict.missing) == ([], [], [])
    assert [line.rank for line in verdict.lines] == ["0", "log"] * steps
    assert not verdict.differs, verdict.lines
    assert main(["verify", str(run)]) == 0
    assert f"{steps} steps are what the formula gives" in capsys.readouterr().out


def test_weights_in_the_data_are_recomputed_from_the_text(tmp_path: Path) -> None:
    run = train(tmp_path, chats(tmp_path), wit={"strategies": SPANS})
    assert opinion(run).differs  # without the file nobody knows them
    verdict = opinion(run, CHATS)
    assert not verdict.differs, verdict
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in CHATS), encoding="utf-8")
    assert main(["verify", str(run), "--data", str(file)]) == 0


def lora(folder: Path, wit: Any = None, second: bool = False) -> tuple[Path, str]:
    base = folder / "base"
    llama().save_pretrained(base)
    model = type(llama()).from_pretrained(base)
    config = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    if second:
        from peft import get_peft_model

        model = get_peft_model(model, config)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default." in name)
        return train(folder, model=model, wit=wit), str(base)
    return train(folder, model=model, wit=wit, kwargs={"peft_config": config}), str(base)


def test_a_lora_keeps_its_adapter_and_names_its_base(tmp_path: Path) -> None:
    run, base = lora(tmp_path)
    kept = read_record(run).steps[0].model
    assert not list(kept.rglob("model.safetensors"))
    assert sum(f.stat().st_size for f in kept.rglob("*.safetensors")) < 20_000
    assert not opinion(run).differs
    assert not opinion(run, base=base).differs


def test_strategies_that_need_the_run_are_said_to_be_not_recomputed(tmp_path: Path, capsys: Any) -> None:
    run = train(tmp_path, wit={"strategies": {"masked_thought": {"mask_token_id": 0}}})
    assert main(["verify", str(run)]) == 0
    assert "not recomputed: strategies: masked_thought" in capsys.readouterr().out


def test_nothing_is_kept_by_default(tmp_path: Path, capsys: Any) -> None:
    run = train(tmp_path, wit={"verify": 0})
    assert not (run / "wit_verify").exists()
    assert main(["verify", str(run)]) == 2
    assert "train with verify: 3" in capsys.readouterr().err


def test_dropout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention_dropout"):
        train(tmp_path, model=llama(attention_dropout=0.1))


def lora_on_a_rank(folder: Path) -> None:
    """Packed, two micro-batches a step."""
    model = type(llama()).from_pretrained(folder / "base")
    config = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    packed = {"packing": True, "max_length": 16, "per_device_train_batch_size": 1, "num_train_epochs": 6}
    train(folder, model=model, kwargs={"peft_config": config}, **packed)


def test_two_ranks_packed_with_lora(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    on_ranks(lora_on_a_rank, tmp_path)
    verdict = opinion(tmp_path / "out")
    assert [line.rank for line in verdict.lines] == ["0", "1", "log"] * 3
    assert not verdict.differs, verdict
    (tmp_path / "out" / "wit_verify" / "step-000000" / "rank-1.json").unlink()
    assert main(["verify", str(tmp_path / "out")]) == 2


def test_the_command_of_trl_takes_it() -> None:
    assert WITArguments(prompt_weight=0.2, wit_verify=3).config().verify == 3


# Faults: each takes something out of what trains, or of what was kept, and leaves all checks of the run silent.


def ignored_prompt_weight(patch: Any, folder: Path) -> Path:
    own = ActiveStrategies.static_weights
    alike = lambda *args, **kwargs: np.where(own(*args, **kwargs) > 0, np.float32(0.8), np.float32(0))  # noqa: E731
    patch.setattr(ActiveStrategies, "static_weights", alike)
    return train(folder)


def dropped_weight(patch: Any, folder: Path) -> Path:
    """The last token of every example weighs 0."""
    own = ActiveStrategies.static_weights

    def without_last(*args: Any, **kwargs: Any) -> Any:
        weights = own(*args, **kwargs)
        weights[-1] = 0
        return weights

    patch.setattr(ActiveStrategies, "static_weights", without_last)
    return train(folder)


def wrong_denominator(patch: Any, folder: Path) -> Path:
    """The labels alone, as the framework counts them."""
    labels = lambda batches, *_, **__: torch.stack([(b["labels"] != -100).sum() for b in batches]).sum()  # noqa: E731
    patch.setattr(trainer_mixin, "step_denominator", labels)
    return train(folder)


def denominator_of_one_micro_batch(patch: Any, folder: Path) -> Path:
    own = trainer_mixin.step_denominator
    patch.setattr(trainer_mixin, "step_denominator", lambda batches, *a, **k: own(batches[-1:], *a, **k))
    return train(folder)


def padding_as_prompt(patch: Any, folder: Path) -> Path:
    """Rows that were padded before the trainer got them, without a mask."""
    patch.setattr(example_reader.ExampleReader, "_check_padding", lambda *args: None)
    rows = [
        {"input_ids": [*row["input_ids"], 0, 0], "labels": [*row["labels"], -100, -100]} for row in dataset("tokenised")
    ]
    return train(folder, Dataset.from_list(rows))


def ignored_soft_cap(patch: Any, folder: Path) -> Path:
    patch.setattr(fused, "logit_postprocessing", lambda config: (1.0, None))
    patch.setattr(fused, "_close", lambda *args: True)
    return train(folder, model=gemma())


def wrong_scale(patch: Any, folder: Path) -> Path:
    patch.setattr(fused, "logit_postprocessing", lambda config: (1.001, None))
    patch.setattr(fused, "_close", lambda *args: True)
    return train(folder)


def z_loss_left_out(patch: Any, folder: Path) -> Path:
    patch.setattr(model_patch, "check_own_loss", lambda *args: None)
    mamba = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_chunk_size": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = BambaConfig(**mamba, **sizes, **ids, num_key_value_heads=2, attn_layer_indices=[0], z_loss_coefficient=0.1)
    return train(folder, model=BambaForCausalLM(config), wit={"verify": 1}, max_steps=1, per_device_train_batch_size=1)


def shifted_span(patch: Any, folder: Path) -> Path:
    own = spans._Document.touched
    patch.setattr(spans._Document, "touched", lambda self, ranges: np.roll(own(self, ranges), 1))
    return train(folder, "conversational", wit={"strategies": SPANS})


def shifted_mask(patch: Any, folder: Path) -> Path:
    """Labels and roles agree with each other, and are all one token too late."""
    own = example_reader.example_roles

    def late(example: Any) -> Any:
        return own({**example, "labels": [-100, *example["labels"][:-1]]})

    data = Dataset.from_list([{"messages": row["messages"]} for row in PLAIN_CHATS])
    patch.setattr(example_reader, "example_roles", late)
    return train(folder, data, assistant_only_loss=True)


def unread_weights(patch: Any, folder: Path) -> Path:
    """A prepared cache from before weights were written into the data."""
    return train(folder, Dataset.from_list(PLAIN_CHATS), assistant_only_loss=True)


def other_rows(patch: Any, folder: Path) -> Path:
    """A prepared cache of a file that was changed since."""
    old = [{"messages": [*row["messages"][:-1], {"role": "assistant", "content": "w50 w51"}]} for row in PLAIN_CHATS]
    return train(folder, Dataset.from_list(old), assistant_only_loss=True)


def double_bos(patch: Any, folder: Path) -> Path:
    words = tokenizer()
    words.bos_token = "<u>"
    rows = [
        {"input_ids": [3, 3, *row["input_ids"]], "labels": [-100, -100, *row["labels"]]} for row in dataset("tokenised")
    ]
    return train(folder, Dataset.from_list(rows), kwargs={"processing_class": words})


def second_adapter(patch: Any, folder: Path) -> Path:
    """A frozen adapter beside the trained one changes what the model computes."""
    return lora(folder, second=True)[0]


def other_parameters(patch: Any, folder: Path) -> Path:
    """The checkpoint beside the step is not what the step began from."""
    run = train(folder)
    path = read_record(run).steps[1].model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(tensors, path, {"format": "pt"})
    return run


def other_log(patch: Any, folder: Path) -> Path:
    """What is logged is not what was trained on."""
    run = train(folder)
    path = read_record(run).steps[2].model.parent / "logged.json"
    path.write_text(json.dumps({"loss": json.loads(path.read_text())["loss"] * 2}))
    return run


# Each with the rows that are given to the command, and what it says beside the table.
FAULTS: dict[Any, tuple[Any, str]] = {
    ignored_prompt_weight: (None, ""),
    dropped_weight: (None, "the run divided by"),
    wrong_denominator: (None, "the run divided by"),
    denominator_of_one_micro_batch: (None, "the run divided by"),
    padding_as_prompt: (None, "ends with padding"),
    ignored_soft_cap: (None, ""),
    wrong_scale: (None, ""),
    z_loss_left_out: (None, "it has a loss of its own"),
    shifted_span: (None, ""),
    shifted_mask: (PLAIN_CHATS, "have no label"),
    unread_weights: (CHATS, ""),
    other_rows: (PLAIN_CHATS, "is made from no row"),
    double_bos: (None, "begins twice"),
    second_adapter: (None, ""),
    other_parameters: (None, ""),
    other_log: (None, ""),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Any
) -> None:
    run = fault(monkeypatch, tmp_path)
    rows, says = FAULTS[fault]
    arguments = ["verify", str(run)]
    if rows is not None:
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        arguments += ["--data", str(tmp_path / "rows.json")]
    capsys.readouterr()
    assert main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert says in printed
    assert says or "DIFFERS" in printed
