"""Every shape that LLaMA-Factory's users train in: the first step of a real run equals the formula."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from lfkit import (
    LEARNING_RATE,
    LLAMAFACTORY,
    LOSS,
    NEAT,
    Doc,
    Version,
    alone,
    alpaca,
    assert_exact,
    assistant,
    by_hand,
    chatml,
    environment,
    history,
    pairs,
    place,
    plain_copy,
    run,
    run_command,
    step,
    tokenizer,
    user,
)
from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
from llamafactory.data.template import TEMPLATES
from llamafactory.train.tuner import run_exp
from support import VOCAB_SIZE, all_relative_error, llama, mixtral
from transformers import Trainer
from wit_llamafactory import WITCallback

from wit_plugins import WITConfig, WITConfigError, attach, detach
from wit_plugins.loss.reference import reference_loss
from wit_plugins.plugins import ActiveStrategies
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.tokens.transport import decode

WEIGHTS = (0.4, 0.6)


@pytest.fixture
def workplace(tmp_path):
    return place(tmp_path)


def conversations(count=4):
    """Two questions, two answers."""
    texts = pairs(2 * count, seed=3)
    return [(*texts[2 * i], *texts[2 * i + 1]) for i in range(count)]


OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def openai(turns, system=None):
    roles = ["user", "assistant"] * (len(turns) // 2)
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, *({"role": r, "content": t} for r, t in zip(roles, turns, strict=True))]}


class TestDatasets:
    def check(self, workplace, rows, info, docs, **changes):
        workplace.dataset("other", rows, **info)
        recorder = run(workplace.config(dataset="other", **changes), WEIGHTS)
        found = recorder.docs()
        assert sorted((d.input_ids, d.targets, d.is_response) for d in found) == sorted(
            (d.input_ids, d.targets, d.is_response) for d in docs
        )
        assert_exact(recorder, alone(docs), WEIGHTS)

    def test_alpaca_with_system_and_history(self, workplace):
        rows = [
            {"instruction": q2, "input": "", "output": a2, "system": "be kind", "history": [[q1, a1]]}
            for q1, a1, q2, a2 in conversations()
        ]
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        info = {"columns": {**columns, "system": "system", "history": "history"}}
        system = ("<|im_start|>system\nbe kind<|im_end|>\n", False)
        docs = [by_hand(system, user(q1), assistant(a1), user(q2), assistant(a2)) for q1, a1, q2, a2 in conversations()]
        self.check(workplace, rows, info, docs)

    def test_sharegpt(self, workplace):
        rows = [
            {"conversations": [{"from": f, "value": v} for f, v in zip(["human", "gpt"] * 2, turns, strict=True)]}
            for turns in conversations()
        ]
        docs = [by_hand(user(q1), assistant(a1), user(q2), assistant(a2)) for q1, a1, q2, a2 in conversations()]
        self.check(workplace, rows, {"formatting": "sharegpt"}, docs)

    @pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
    def test_openai_messages(self, workplace, formatting):
        rows = [openai(turns, system="be kind") for turns in conversations()]
        added = "\ndetailed thinking off" if formatting == "openai" else ""  # by LLaMA-Factory
        system = (f"<|im_start|>system\nbe kind{added}<|im_end|>\n", False)
        docs = [by_hand(system, user(q1), assistant(a1), user(q2), assistant(a2)) for q1, a1, q2, a2 in conversations()]
        self.check(workplace, rows, {**OPENAI, "formatting": formatting}, docs)

    def test_mask_history_turns_earlier_answers_into_prompt(self, workplace):
        docs = [by_hand(user(q1), assistant(a1, False), user(q2), assistant(a2)) for q1, a1, q2, a2 in conversations()]
        self.check(workplace, [openai(turns) for turns in conversations()], OPENAI, docs, mask_history=True)

    def test_efficient_eos(self, workplace):
        """The first token after an answer is there, but the end of the text is what is to be predicted in its place."""
        docs = []
        for q1, a1, q2, a2 in conversations():
            first = [(f"User: {q1}\nFalcon:", False), (f"{a1}\n", True)]
            doc = by_hand(*first, (f"User: {q2}\nFalcon:", False), (f"{a2}\n", True), ("<eos>", True))
            turn = len(by_hand(*first).input_ids)
            doc.targets[turn], doc.is_response[turn] = tokenizer().eos_token_id, True
            docs.append(doc)
        self.check(workplace, [openai(turns) for turns in conversations()], OPENAI, docs, template="falcon")

    @pytest.mark.parametrize("thinking", [True, False])
    def test_reasoning_template(self, workplace, thinking):
        """An empty thought belongs to the answer if the model is to think, and to the prompt if it is not."""
        empty = ("<think>\n\n</think>\n\n", thinking)
        docs = [by_hand(user(q), empty, assistant(a)) for q, a in pairs(4)]
        rows = [openai(turns) for turns in pairs(4)]
        self.check(workplace, rows, OPENAI, docs, template="qwen3", enable_thinking=thinking)

    def test_tool_calls(self, workplace):
        tools = json.dumps(
            [{"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}]
        )
        rows = [
            {
                "conversations": [
                    {"from": "human", "value": q},
                    {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
                    {"from": "observation", "value": "[]"},
                    {"from": "gpt", "value": a},
                ],
                "tools": tools,
            }
            for q, a in pairs(4)
        ]
        columns = {"messages": "conversations", "tools": "tools"}
        workplace.dataset("tools", rows, formatting="sharegpt", columns=columns)
        recorder = run(workplace.config(dataset="tools", template="qwen", cutoff_len=2048), WEIGHTS)
        docs = recorder.docs()
        for (_, answer), row in zip(pairs(4), recorder.dataset, strict=True):
            doc = Doc.of(row)
            said = tokenizer().decode([i for i, r in zip(doc.input_ids, doc.is_response, strict=True) if r])
            assert (
                said
                == f'<tool_call>\n{{"name": "look", "arguments": {{}}}}\n</tool_call><|im_end|>\n{answer}<|im_end|>\n'
            )
        assert_exact(recorder, alone(docs), WEIGHTS)

    @pytest.mark.parametrize("mixing", [{}, {"mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5"}])
    def test_several_datasets(self, workplace, mixing):
        workplace.dataset("more", [openai(turns) for turns in conversations()], **OPENAI)
        args = {"dataset": "train,more", "per_device_train_batch_size": 64, **mixing}
        recorder = run(workplace.config(**args), WEIGHTS)
        both = chatml() + [
            by_hand(user(q1), assistant(a1), user(q2), assistant(a2)) for q1, a1, q2, a2 in conversations()
        ]
        found = recorder.docs()
        assert {tuple(d.input_ids) for d in found} == {tuple(d.input_ids) for d in both}
        docs = {tuple(d.input_ids): d for d in both}
        assert_exact(recorder, alone([docs[tuple(d.input_ids)] for d in found]), WEIGHTS)

    def test_streaming(self, workplace):
        # Without a data-loader worker LLaMA-Factory makes no shard of a local file.
        args = {"streaming": True, "max_steps": 1, "buffer_size": 8, "dataloader_num_workers": 1}
        recorder = run(workplace.config(**args), WEIGHTS)
        loss, _ = step(recorder.initial, alone(chatml()), *WEIGHTS)
        assert recorder.logged() == [pytest.approx(loss, **LOSS)]

    def test_truncation(self, workplace):
        recorder = run(workplace.config(cutoff_len=40), WEIGHTS)
        docs = recorder.docs()
        assert max(len(d.input_ids) for d in docs) == 40
        assert_exact(recorder, alone(docs), WEIGHTS)

    @pytest.mark.parametrize("first", ["own", "weighted"])
    def test_tokenized_path(self, workplace, first):
        """A cache written without the plugin works with it, and the reverse: the same files."""
        expected, _ = step(plain_copy(workplace.model()), alone(chatml()), *WEIGHTS)
        cached = {"tokenized_path": str(workplace.folder / "cache")}
        results = {}
        for name in ["own", "weighted"] if first == "own" else ["weighted", "own"]:
            out = str(workplace.folder / name)
            recorder = run(workplace.config(output_dir=out, **cached), WEIGHTS if name == "weighted" else None)
            results[name] = recorder.logged()[0]
            assert set(recorder.dataset.column_names) <= {
                "input_ids",
                "attention_mask",
                "labels",
                "images",
                "videos",
                "audios",
            }
        assert results["weighted"] == pytest.approx(expected, **LOSS)
        plain, _ = step(plain_copy(workplace.model()), alone(chatml()), 0.0, 1.0)
        assert results["own"] == pytest.approx(plain, **LOSS)


class TestEvaluation:
    def roles(self, model, docs):
        return {
            "eval_prompt_loss": step(model, alone(docs), 1.0, 0.0)[0],
            "eval_response_loss": step(model, alone(docs), 0.0, 1.0)[0],
        }

    @pytest.mark.parametrize("source", ["val_size", "eval_dataset"])
    def test_both_roles(self, workplace, source):
        workplace.dataset("held_out", alpaca(5, seed=9))
        chosen = {"val_size": 3} if source == "val_size" else {"eval_dataset": "held_out"}
        evaluation = {"eval_strategy": "epoch", "per_device_eval_batch_size": 2, "learning_rate": 0.0}
        recorder = run(workplace.config(**chosen, **evaluation), WEIGHTS)
        if source == "eval_dataset":
            docs = chatml(5, seed=9)
        else:
            trained_on = {tuple(d.input_ids) for d in recorder.docs()}
            docs = [d for d in chatml() if tuple(d.input_ids) not in trained_on]
            assert len(docs) == 3
        entry = next(e for e in recorder.state.log_history if "eval_loss" in e)
        expected = self.roles(recorder.initial, docs)
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-5)

    def test_each_dataset_on_its_own(self, workplace):
        workplace.dataset("a", alpaca(3, seed=9))
        workplace.dataset("b", alpaca(4, seed=10))
        evaluation = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4, "learning_rate": 0.0}
        recorder = run(workplace.config(eval_dataset="a,b", eval_on_each_dataset=True, **evaluation), WEIGHTS)
        for name, docs in {"a": chatml(3, seed=9), "b": chatml(4, seed=10)}.items():
            entry = next(e for e in recorder.state.log_history if f"eval_{name}_loss" in e)
            expected = self.roles(recorder.initial, docs)
            assert entry[f"eval_{name}_response_loss"] == pytest.approx(expected["eval_response_loss"], rel=1e-5)
            assert entry[f"eval_{name}_prompt_loss"] == pytest.approx(expected["eval_prompt_loss"], rel=1e-5)

    def test_accuracy_means_what_it_meant(self, workplace):
        """The accuracy on the response, as without weights; here with weights that only train the prompt."""
        workplace.dataset("held_out", alpaca(60, seed=9))
        args = {
            "eval_dataset": "held_out",
            "compute_accuracy": True,
            "eval_strategy": "epoch",
            "per_device_eval_batch_size": 60,
            "learning_rate": 0.0,
        }
        seen = []
        for weights in (None, (1.0, 0.0)):
            out = str(workplace.folder / f"out-{weights}")
            recorder = run(workplace.config(output_dir=out, **args), weights)
            seen.append(next(e for e in recorder.state.log_history if "eval_loss" in e))
        assert seen[1]["eval_accuracy"] == seen[0]["eval_accuracy"] > 0
        assert seen[1]["eval_response_loss"] == pytest.approx(seen[0]["eval_loss"], **LOSS)

    def test_generation_means_what_it_meant(self, workplace):
        """The same texts, the same scores, file for file."""
        workplace.dataset("held_out", alpaca(5, seed=9))
        args = {
            "eval_dataset": "held_out",
            "predict_with_generate": True,
            "do_eval": True,
            "do_predict": True,
            "eval_strategy": "epoch",
            "per_device_eval_batch_size": 2,
            "max_new_tokens": 6,
            "do_sample": False,
        }
        outs = []
        for name, weights in {"own": None, "weighted": (0.0, 1.0)}.items():
            outs.append(workplace.folder / name)
            recorder = run(workplace.config(output_dir=str(outs[-1]), **args), weights)
            assert len(recorder.logged()) == 1
        texts = [(out / "generated_predictions.jsonl").read_text() for out in outs]
        assert texts[0] == texts[1]
        assert len(texts[0].splitlines()) == 5
        scores = [json.loads((out / "predict_results.json").read_text()) for out in outs]
        for key in ("predict_bleu-4", "predict_rouge-l"):
            assert scores[0][key] == scores[1][key]
        assert "eval_bleu-4" in json.loads((outs[1] / "all_results.json").read_text())

    def test_curves(self, workplace, monkeypatch):
        """`plot_loss: true` draws LLaMA-Factory's own curves, and those of the roles."""
        workplace.dataset("held_out", alpaca(5, seed=9))
        config = workplace.write(
            "curves.yaml",
            wit={"prompt_weight": 0.4, "response_weight": 0.6},
            plot_loss=True,
            eval_dataset="held_out",
            eval_strategy="epoch",
            num_train_epochs=2.0,
        )
        assert run_command(monkeypatch, "train", str(config)) == 0
        out = workplace.folder / "out"
        names = ["loss", "eval_loss", "prompt_loss", "response_loss", "eval_prompt_loss", "eval_response_loss"]
        assert {p.name for p in out.glob("*.png")} == {f"training_{name}.png" for name in names}
        assert len([e for e in history(out) if "prompt_loss" in e]) == 2
        logged = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
        assert [e["loss"] for e in logged if "loss" in e] == [e["loss"] for e in history(out) if "loss" in e]

    def test_curves_of_a_role_that_is_not_trained(self, workplace):
        run(workplace.config(plot_loss=True), (0.0, 1.0))
        assert {p.name for p in (workplace.folder / "out").glob("*.png")} == {
            "training_loss.png",
            "training_response_loss.png",
        }

    def test_evaluation_alone(self, workplace):
        workplace.dataset("held_out", alpaca(5, seed=9))
        args = {"do_train": False, "do_eval": True, "eval_dataset": "held_out", "per_device_eval_batch_size": 5}
        run(workplace.config(**args), WEIGHTS)
        seen = json.loads((workplace.folder / "out" / "all_results.json").read_text())
        expected = self.roles(plain_copy(workplace.model()), chatml(5, seed=9))
        assert {key: seen[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def packed_row(lengths, cutoff, neat):
    """A row as LLaMA-Factory's processor packs it: padding with attention 1 and position 0, or with attention 0."""
    ids, mask, positions, labels = [], [], [], []
    for index, length in enumerate(lengths):
        document = list(range(10 + 20 * index, 10 + 20 * index + length))
        ids += document
        labels += [-100] * (length // 2) + document[length // 2 :]
        mask += [index + 1 if neat else 1] * length
        positions += range(length)
    rest = cutoff - len(ids)
    return {
        "input_ids": ids + [0] * rest,
        "attention_mask": mask + [0 if neat else 1] * rest,
        "position_ids": positions + [0] * rest,
        "labels": labels + [-100] * rest,
        "images": None,
        "videos": None,
        "audios": None,
    }


class TestCollator:
    """LLaMA-Factory's own collator, wrapped: all of its branches, on a CPU."""

    def collate(self, rows, **options):
        settings = {
            "template": TEMPLATES["chatml"],
            "pad_to_multiple_of": 8,
            "label_pad_token_id": -100,
            "tokenizer": tokenizer(),
            "block_diag_attn": options.get("neat_packing", False),
            **options,
        }
        collator = SFTDataCollatorWith4DAttentionMask(**settings)
        strategies = ActiveStrategies({"wit": {"prompt_weight": 0.4, "response_weight": 0.6}})
        return collator([dict(row) for row in rows]), WeightedCollator(collator, strategies)(
            [dict(row) for row in rows]
        )

    def expected(self, lengths, width):
        weights = []
        for length in lengths:
            weights += [0.0, *[0.4] * (length // 2 - 1), *[0.6] * (length - length // 2)]
        return weights + [0.0] * (width - len(weights))

    def assert_equal_but_for_the_weights(self, own, batch):
        assert set(batch) - set(own) == {CODES_KEY}
        for key, value in own.items():
            assert value is batch[key] is None or torch.equal(value, batch[key]), key

    def weights_of(self, batch):
        return decode(batch[CODES_KEY])[2]

    @pytest.mark.parametrize("neat", [False, pytest.param(True, marks=NEAT)])
    def test_padding_inside_packed_rows(self, neat):
        lengths = [[5, 7, 6], [8, 4]]
        rows = [packed_row(row, 24, neat) for row in lengths]
        options = {"neat_packing": True, "attn_implementation": "sdpa"} if neat else {}
        own, batch = self.collate(rows, **options)
        self.assert_equal_but_for_the_weights(own, batch)
        expected = torch.tensor([self.expected(row, 24) for row in lengths])
        assert torch.equal(self.weights_of(batch), expected)
        assert own["attention_mask"].dim() == (4 if neat else 2)

    def test_padding_to_a_multiple_of_8(self):
        rows = [
            {
                "input_ids": [*range(10, 10 + n)],
                "attention_mask": [1] * n,
                "labels": [-100] * (n // 2) + [9] * (n - n // 2),
            }
            for n in (5, 11)
        ]
        own, batch = self.collate(rows)
        assert own["input_ids"].shape == (2, 16)
        self.assert_equal_but_for_the_weights(own, batch)
        assert torch.equal(self.weights_of(batch), torch.tensor([self.expected([n], 16) for n in (5, 11)]))

    @NEAT
    def test_flash_attention_trims_the_padding(self):
        lengths = [5, 7, 6]
        own, batch = self.collate(
            [packed_row(lengths, 24, True)], neat_packing=True, attn_implementation="flash_attention_2"
        )
        assert own["attention_mask"] is None
        assert own["input_ids"].shape == (1, 18)
        self.assert_equal_but_for_the_weights(own, batch)
        assert torch.equal(self.weights_of(batch), torch.tensor([self.expected(lengths, 18)]))

    @NEAT
    def test_flash_attention_and_padding_to_a_multiple_of_8(self):
        row = packed_row([5, 7, 6], 18, True)
        own, batch = self.collate([row], neat_packing=True, attn_implementation="flash_attention_2")
        self.assert_equal_but_for_the_weights(own, batch)
        assert torch.equal(self.weights_of(batch), torch.tensor([self.expected([5, 7, 6], own["labels"].shape[1])]))

    @NEAT
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_float_tensors_are_cast_and_the_weights_are_not(self, dtype):
        own, batch = self.collate(
            [packed_row([5, 7], 16, True)], neat_packing=True, attn_implementation="sdpa", compute_dtype=dtype
        )
        assert own["attention_mask"].dtype == dtype
        assert torch.equal(self.weights_of(batch)[0], torch.tensor(self.expected([5, 7], 16)))


class TestModels:
    @pytest.mark.parametrize(
        "args",
        [
            {"disable_gradient_checkpointing": True},
            {"use_reentrant_gc": False},
            {"flash_attn": "auto"},
            {"flash_attn": "sdpa"},
            {"flash_attn": "fa2"},  # without a GPU LLaMA-Factory goes on without it
            {"flash_attn": "disabled"},
            {"upcast_lmhead_output": True},
            {"upcast_layernorm": True},
            {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
            {"dataloader_num_workers": 2},
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj", "use_dora": True},
            {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj", "additional_target": "lm_head"},
            {"finetuning_type": "oft", "oft_target": "q_proj", "oft_block_size": 4, "oft_rank": 0},
        ],
        ids=str,
    )
    def test_options(self, workplace, args):
        recorder = run(workplace.config(**args), WEIGHTS)
        if args.get("finetuning_type") == "freeze":
            names = set(recorder.before)
            assert names
            assert all(name.startswith("model.layers.1.") for name in names)
        assert_exact(recorder, alone(chatml()), WEIGHTS)

    def test_bf16(self, workplace):
        """Autocast: at (0, 1) what LLaMA-Factory computes in bfloat16, at other weights near the formula."""
        own = run(workplace.config(bf16=True, output_dir=str(workplace.folder / "own")))
        same = run(workplace.config(bf16=True, output_dir=str(workplace.folder / "same")), (0.0, 1.0))
        assert same.logged() == pytest.approx(own.logged(), rel=2e-3)
        recorder = run(workplace.config(bf16=True), WEIGHTS)
        assert recorder.logged() == [pytest.approx(step(recorder.initial, alone(chatml()), *WEIGHTS)[0], rel=2e-2)]

    def test_pure_bf16(self, tmp_path, monkeypatch):
        """LLaMA-Factory asks for a GPU before it allows this; nothing after that needs one."""
        from llamafactory.hparams import parser

        monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)
        workplace = place(tmp_path, llama(torch.bfloat16, vocab_size=len(tokenizer())))
        own = run(workplace.config(pure_bf16=True, output_dir=str(workplace.folder / "own")))
        assert {p.dtype for p in own.after.values()} == {torch.bfloat16}
        same = run(workplace.config(pure_bf16=True, output_dir=str(workplace.folder / "same")), (0.0, 1.0))
        assert same.logged() == pytest.approx(own.logged(), rel=2e-3)
        recorder = run(workplace.config(pure_bf16=True), WEIGHTS)
        assert recorder.logged() == [pytest.approx(step(recorder.initial, alone(chatml()), *WEIGHTS)[0], rel=2e-2)]

    @pytest.mark.skipif(Version("0.9.5") > LLAMAFACTORY, reason="bitsandbytes is in the newer environment only")
    def test_qlora(self, tmp_path):
        """At (0, 1) what LLaMA-Factory computes; at other weights as near the formula as kernels of 4 bits are."""
        workplace = place(tmp_path, llama(vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=128))
        args = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "quantization_bit": 4}
        own = run(workplace.config(output_dir=str(tmp_path / "own"), **args))
        same = run(workplace.config(output_dir=str(tmp_path / "same"), **args), (0.0, 1.0))
        assert same.logged() == pytest.approx(own.logged(), **LOSS)
        assert all_relative_error(same.after, own.after) < 1e-5
        recorder = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), WEIGHTS)
        assert "Linear4bit" in {type(module).__name__ for module in recorder.model.modules()}
        model = recorder.model.eval()
        for name, parameter in model.named_parameters():
            if name in recorder.before:
                parameter.data.copy_(recorder.before[name])
        with torch.no_grad():
            scored = [(logits.double(), *rest) for logits, *rest in alone(chatml())(model)]
        assert recorder.logged() == [pytest.approx(reference_loss(scored, *WEIGHTS).item(), rel=2e-3)]

    def test_a_mixture_of_experts_keeps_its_auxiliary_loss(self, tmp_path):
        """At (0, 1) step for step what LLaMA-Factory does by itself."""
        model = mixtral()
        model.resize_token_embeddings(512)
        assert VOCAB_SIZE < 512
        workplace = place(tmp_path, model=model)
        args = {
            "moe_aux_loss_coef": 0.3,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
        }
        own = run(workplace.config(output_dir=str(tmp_path / "own"), **args))
        weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), (0.0, 1.0))
        assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
        assert all_relative_error(weighted.after, own.after) < 1e-5

    def test_liger_kernel(self, workplace):
        """Liger's layers stay, its head is not asked. Triton interprets its kernels on a CPU in a process of its own.

        The interpreter cannot run the kernels that take scalars (RMSNorm, SwiGLU); the rotary embedding's it can.
        """
        config = workplace.config(enable_liger_kernel=True)
        script = (
            "import functools, json, sys\n"
            "import liger_kernel.transformers as liger\n"
            "own = liger.apply_liger_kernel_to_llama\n"
            "def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True):\n"
            "    own(rope, cross_entropy, fused_linear_cross_entropy, rms_norm=False, swiglu=False)\n"
            "liger.apply_liger_kernel_to_llama = apply\n"
            "from lfkit import *\n"
            "recorder = run(json.loads(sys.argv[1]), (0.4, 0.6))\n"
            "import liger_kernel.transformers.rope as rope, transformers.models.llama.modeling_llama as modeling\n"
            "assert modeling.apply_rotary_pos_emb is rope.liger_rotary_pos_emb\n"
            "assert 'liger' in modeling.LlamaForCausalLM.forward.__module__\n"
            "modeling.apply_rotary_pos_emb = __import__('reference').apply\n"
            "assert_exact(recorder, alone(chatml()))\n"
        )
        # The reference runs in float64, which the kernel does not: it gets the plain rotary embedding back.
        (workplace.folder / "reference.py").write_text(
            "import torch\n"
            "def half(x):\n"
            "    a, b = x.chunk(2, dim=-1)\n"
            "    return torch.cat((-b, a), dim=-1)\n"
            "def apply(q, k, cos, sin, **_):\n"
            "    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)\n"
            "    return q * cos + half(q) * sin, k * cos + half(k) * sin\n"
        )
        env = environment(TRITON_INTERPRET="1", LLAMAFACTORY_VERBOSITY="ERROR")
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(config)],
            env=env,
            cwd=workplace.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_checkpoints_are_resumed(workplace, recwarn):
    """LLaMA-Factory resumes from `output_dir` by itself; other weights than before are said."""
    args = {"save_strategy": "epoch", "num_train_epochs": 2.0}
    whole = run(workplace.config(output_dir=str(workplace.folder / "whole"), **args), WEIGHTS)
    first = workplace.config(output_dir=str(workplace.folder / "parts"), max_steps=1, save_strategy="epoch")
    run(first, WEIGHTS)
    assert (workplace.folder / "parts" / "checkpoint-1" / "wit_config.json").is_file()
    resume = {"resume_from_checkpoint": str(workplace.folder / "parts" / "checkpoint-1")}
    second = run(workplace.config(output_dir=str(workplace.folder / "parts"), **resume, **args), WEIGHTS)
    assert second.logged() == whole.logged()
    assert not [w for w in recwarn if "was trained with" in str(w.message)]
    run(workplace.config(output_dir=str(workplace.folder / "parts"), **resume, **args), (0.2, 0.8))
    assert [w for w in recwarn if "was trained with" in str(w.message)]


def test_collators_go_to_spawned_workers(workplace):
    """LLaMA-Factory's holds the model, whose patched forward does not pickle."""
    weights = WITCallback(*WEIGHTS)
    run_exp(workplace.config(), callbacks=[weights])
    collator = weights.trainer.data_collator
    rows = [weights.trainer.train_dataset[i] for i in range(3)]
    copied = pickle.loads(pickle.dumps(collator))
    here, there = collator([dict(row) for row in rows]), copied([dict(row) for row in rows])
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    detach(weights.trainer)
    assert weights.trainer.data_collator.model is weights.trainer.model


def test_a_trainer_of_llamafactory_can_be_attached_to(workplace, monkeypatch):
    """`attach` on its trainer, without callback and command; refused where its options replace the loss."""
    recorder = run(workplace.config(), WEIGHTS)
    assert np.isfinite(recorder.logged()[0])
    trainers = []
    own = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *args, **kwargs: trainers.append(self) or own(self))
    run(workplace.config(output_dir=str(workplace.folder / "attached"), learning_rate=0.0))
    (trainer,) = trainers
    attach(trainer, WITConfig(prompt_weight=0.4, response_weight=0.6))
    trainer.args.learning_rate = LEARNING_RATE
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(recorder.logged()[0], **LOSS)
    detach(trainer)
    trainer.finetuning_args.use_eaft_loss = True
    with pytest.raises(WITConfigError, match="use_eaft_loss = True"):
        attach(trainer, WITConfig(prompt_weight=0.4))
