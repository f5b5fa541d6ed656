"""Evaluation and prediction in LLaMA-Factory."""

import json

import pytest
from lfcases import WEIGHTS
from lfkit import (
    LOSS,
    alone,
    alpaca,
    chatml,
    history,
    plain_copy,
    run,
    run_command,
    step,
)


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
        expected["eval_weighted_loss"], _ = step(recorder.initial, alone(docs), *WEIGHTS)
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
