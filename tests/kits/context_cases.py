"""What is trained with rows that are cut over ranks, and what must come of it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from span_reference import expected, from_ids, span_logs, weighted_loss
from support import (
    Document,
    all_relative_error,
    document_logits,
    documents,
    llama,
    plain_copy,
    reference_step,
    role_losses,
    subprocess_env,
)
from words import tokenizer

HERE = Path(__file__).parent
LEARNING_RATE = 0.05
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
SPANS = [{"match": "w[1-4][0-9]", "weight": 0.5, "name": "mine"}]
EVALUATED = 7  # rows, three at a time, which two data-parallel ranks do not share evenly

# `weights` are (0.2, 0.8) where none are named. In `silent` rows one token weighs anything, and one rank of a group has
# it: which, the place in the row decides.
CASES: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL accumulated": {"args": {"gradient_accumulation_steps": 2}},
    "TRL, gradients checkpointed": {"args": {"gradient_checkpointing": True}},
    "TRL, tied head": {"tied": True},
    "TRL, LoRA": {"lora": True},
    "TRL, logits": {"settings": {"loss_impl": "logits"}},
    "TRL, weight_sum": {"settings": {"normalization": "weight_sum"}},
    "TRL, spans that are logged": {"settings": {"strategies": {"spans": SPANS}}},
    # Its gradients are small, and are read off float32 parameters.
    "TRL, DFT": {"settings": {"strategies": {"dft": {}}}, "args": {"learning_rate": 2.0}},
    "TRL, ranks without weighted tokens": {"silent": True, "weights": (0.0, 0.8)},
    "TRL, ranks without weighted tokens, accumulated": {
        "silent": True,
        "weights": (0.0, 0.8),
        "args": {"gradient_accumulation_steps": 4},
    },
    "transformers": {"trainer": "transformers"},
    "transformers accumulated": {"trainer": "transformers", "args": {"gradient_accumulation_steps": 2}},
    "transformers, spans that are logged": {
        "trainer": "transformers",
        "settings": {"strategies": {"spans": SPANS}},
    },
    "transformers, ranks without weighted tokens": {
        "trainer": "transformers",
        "silent": True,
        "weights": (0.0, 0.8),
    },
}
# Under DeepSpeed each rank reads a part of it.
STREAMED: dict[str, dict[str, Any]] = {
    "a stream": {
        "stream": True,
        "trainer": "transformers",
        "args": {"accelerator_config": {"dispatch_batches": False}},
    },
}
# In each of them, a rank would train on something else than its share of the rows.
DEALT_OUT: dict[str, dict[str, Any]] = {
    "a stream that the main process deals out": {
        "stream": True,
        "trainer": "transformers",
        "args": {"accelerator_config": {"dispatch_batches": True}},
        "error": "were given different batches.*set dispatch_batches to False",
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "padding-free rows": {"args": {"padding_free": True, "max_length": None}, "error": "hold several documents"},
    "padding on the left": {"trainer": "transformers", "side": "left", "error": "pad on the right"},
    "a strategy that looks at more than one token": {
        "settings": {"strategies": {"rho1": {"share": 0.5}}},
        "lora": True,
        "error": "rho1 looks at more than one token at a time",
    },
}


def documents_of(case: dict[str, Any]) -> list[Document]:
    """Eight documents: prompts and responses of any length at any place; or one response token in each."""
    if not case.get("silent"):
        made = documents(8, seed=3, low=5, high=24)
        return [Document([6 + i % 52 for i in doc.input_ids], doc.is_response) for doc in made]  # ids that are words
    draw = random.Random(0)
    return [Document([draw.randrange(6, 58) for _ in range(16)], [i == 15 for i in range(16)]) for _ in range(8)]


def model_of(case: dict[str, Any]) -> Any:
    return llama(tie_word_embeddings=case.get("tied", False), num_attention_heads=4)  # four ranks have one each


def _parameters(case: dict[str, Any], parameters: dict[str, torch.Tensor]) -> Any:
    model = model_of(case)
    if case.get("lora"):
        model = get_peft_model(model, LoraConfig(**LORA))
    model.load_state_dict(parameters, strict=False)
    return model


def expected_step(
    case: dict[str, Any], before: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """The loss, the gradients and the logged roles' and spans' losses of a step over all documents, in one process."""
    model, docs = _parameters(case, before), documents_of(case)
    weights, settings = case.get("weights", (0.2, 0.8)), case.get("settings", {})
    strategies = settings.get("strategies", {})
    if not strategies:
        loss, grads = reference_step(
            model, docs, *weights, normalization=settings.get("normalization", "nonzero_tokens")
        )
    else:
        loss, grads = _step_of_strategies(model, docs, weights, strategies)
    logged = role_losses(model, docs)
    if 0.0 in weights:
        logged = {key: value for key, value in logged.items() if not key.startswith("prompt")}
    return loss, grads, {**logged, **_span_losses(model, docs, strategies, training=True)}


def expected_evaluation(case: dict[str, Any], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """The roles' and spans' losses over the documents that are evaluated."""
    model, docs = _parameters(case, after), documents_of(case)[:EVALUATED]
    strategies = case.get("settings", {}).get("strategies", {})
    return {**role_losses(model, docs), **_span_losses(model, docs, strategies, training=False)}


def _span_weights(docs: list[Document]) -> tuple[list[Any], list[np.ndarray]]:
    written = [from_ids(tokenizer(), doc.input_ids, doc.is_response) for doc in docs]
    return written, [expected(document, SPANS, 0.2, 0.8) for document in written]


def _step_of_strategies(
    model: Any, docs: list[Document], weights: tuple[float, float], strategies: dict[str, Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Σ w·f·nll over the number of tokens with a weight: f is the target's probability, or the span's factor."""
    model = plain_copy(model).train()
    scored = list(document_logits(model, docs))
    by_token: Any = _span_weights(docs)[1]
    if "dft" in strategies:
        by_token = [
            [
                float(np.float32(weights[is_response[t]])) * logits[t - 1].detach().softmax(-1)[ids[t]]
                for t in range(len(ids))
            ]
            for logits, ids, is_response in scored
        ]
    loss = weighted_loss(scored, by_token)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _span_losses(model: Any, docs: list[Document], strategies: dict[str, Any], training: bool) -> dict[str, float]:
    if "spans" not in strategies:
        return {}
    written, weights = _span_weights(docs)
    with torch.no_grad():
        scored = list(document_logits(plain_copy(model).eval(), docs))
    return span_logs(scored, written, SPANS, ["mine"], weights if training else None)


def launch_environment(folder: Path, way: str, ranks: int, parts: int) -> dict[str, str]:
    """What `accelerate launch` makes of a configuration that docs/scale.md shows, for these sizes.

    Args:
        way (`str`): `cp_size` or `sp_size`, by which the rows are cut.
    """
    page = (HERE.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    (block,) = (b for b in (part.split("```")[0] for part in page.split("```yaml\n")[1:]) if f"_{way}: 4" in b)
    groups = "dp_shard_size: 2" if way == "cp_size" else "dp_replicate_size: 2"
    for line, size in {f"{way}: 4": parts, "num_processes: 8": ranks, groups: ranks // parts}.items():
        assert block.count(line) == 1
        block = block.replace(line, f"{line.split(':')[0]}: {size}")
    file = folder / "accelerate.yaml"
    file.write_text(block)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "run_context.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if way == "sp_size":
        arguments.main_process_port = 0  # any
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    made = prepare_multi_gpu_env(arguments) if way == "cp_size" else prepare_deepspeed_cmd_env(arguments)[1]
    return {key: value for key, value in made.items() if any(word in key for word in ("FSDP", "PARALLELISM", "SPEED"))}


def launch(
    folder: Path,
    ranks: int,
    parts: int,
    device: str,
    cases: dict[str, dict[str, Any]],
    way: str = "cp_size",
    **given: str,
) -> str:
    """Train all cases on so many ranks, rows cut over `parts` of them; what was printed.

    Args:
        way (`str`): `cp_size` or `sp_size`, by which the rows are cut.
        given (`str`): more environment variables.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE / "run_context.py"), str(folder), str(parts), device, json.dumps(list(cases.values()))]
    environment = subprocess_env(**launch_environment(folder, way, ranks, parts), **given)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr


def check_case(case: dict[str, Any], ranks: int, parts: int, result: dict[str, Any], saved: dict[str, Any]) -> None:
    """That rows were cut, and that what came of them is what comes of whole ones."""
    rows = max(len(doc.input_ids) for doc in documents_of(case))
    pieces = 2 if result["way"] == "cp_size" else 1  # of a row, that each rank has
    assert max(result["lengths"]["training"]) == math.ceil(rows / (pieces * parts)) * pieces < rows
    if result["mesh"] is not None:
        assert result["mesh"]["cp"] == parts
        assert math.prod(result["mesh"].values()) == ranks
    if result["exchanges"] is not None:
        assert min(result["exchanges"].values()) > 0
    assert result["chosen"] == ("logits" if case.get("settings", {}).get("loss_impl") == "logits" else "fused")

    loss, grads, logged = expected_step(case, saved["before"])
    first, *_ = result["logs"]
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert {key: value for key, value in first.items() if _is_ours(key)} == pytest.approx(logged, rel=1e-5)
    before, after = saved["before"], saved["after"]
    assert set(after) == set(before) == set(grads)
    rate = case.get("args", {}).get("learning_rate", LEARNING_RATE)
    assert all_relative_error({n: (before[n] - after[n]) / rate for n in grads}, grads) < 1e-4

    own = {key.removeprefix("eval_"): value for key, value in result["evaluation"].items()}
    evaluated = expected_evaluation(case, after)
    assert {key: value for key, value in own.items() if _is_ours(key)} == pytest.approx(evaluated, rel=1e-5)


def _is_ours(key: str) -> bool:
    return key.startswith(("prompt_", "response_"))
