"""`wit verify`: honest runs of every kind pass, and a fault planted anywhere in what trains is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support import VOCAB_SIZE, llama
from transformers import Gemma2Config, Gemma2ForCausalLM
from trlkit import dataset, sft_trainer
from wit_trl import WITCallback, prepare_dataset
from words import WORDS, tokenizer

from wit_plugins.cli import main
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
    config = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
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
    run = train(tmp_path, wit={"strategies": ["otr"]})
    assert main(["verify", str(run)]) == 0
    assert "not recomputed: strategies: otr" in capsys.readouterr().out


def test_nothing_is_kept_by_default(tmp_path: Path, capsys: Any) -> None:
    run = train(tmp_path, wit={"verify": 0})
    assert not (run / "wit_verify").exists()
    assert main(["verify", str(run)]) == 2
    assert "train with verify: 3" in capsys.readouterr().err


def test_dropout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention_dropout"):
        train(tmp_path, model=llama(attention_dropout=0.1))


# Faults: each takes something out of what trains, and leaves all checks of the run silent.


def _ignore_prompt_weight(patch: Any, folder: Path) -> Path:
    import wit_plugins.strategies.wit as wit

    patch.setattr(wit, "static_weights", None, raising=False)
    from wit_plugins.contract.active import ActiveStrategies

    own = ActiveStrategies.static_weights

    def alike(self: Any, *args: Any, **kwargs: Any) -> Any:
        return np.where(own(self, *args, **kwargs) > 0, np.float32(0.8), np.float32(0))

    patch.setattr(ActiveStrategies, "static_weights", alike)
    return train(folder)


FAULTS: dict[str, Any] = {}
