"""Every format of data that LLaMA-Factory reads."""

import json

import pytest
from lfcases import OPENAI, WEIGHTS, conversations, openai
from lfkit import (
    LOSS,
    Doc,
    alone,
    assert_exact,
    assistant,
    by_hand,
    chatml,
    pairs,
    plain_copy,
    run,
    step,
    tokenizer,
    user,
)


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
        """A cache written without the plugin works with it where no weights are read from data, and the reverse."""
        expected, _ = step(plain_copy(workplace.model()), alone(chatml()), *WEIGHTS)
        cached = {"tokenized_path": str(workplace.folder / "cache")}
        unread = {"message_weight_keys": [], "sample_weight_key": None} if first == "own" else {}
        weights = {"prompt_weight": WEIGHTS[0], "response_weight": WEIGHTS[1], **unread}
        results = {}
        for name in ["own", "weighted"] if first == "own" else ["weighted", "own"]:
            out = str(workplace.folder / name)
            recorder = run(workplace.config(output_dir=out, **cached), weights if name == "weighted" else None)
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
