"""What a run logs, says at its ends and leaves behind."""

import io
import json
import sys
import warnings
from importlib.metadata import version

import pytest
from support import (
    llama,
    role_losses,
)
from trainkit import CONFIG, DOCS, EXAMPLES, first_log, make_trainer, tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
)

from wit_plugins import WITConfig, attach


def test_logs_cover_the_steps_since_the_last_log(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=3, learning_rate=0.0)
    attach(trainer, CONFIG)
    trainer.train()
    expected = role_losses(trainer.model, DOCS)
    log = first_log(trainer)
    assert log["step"] == 3
    assert {k: log[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_logs_of_a_callback_are_its_own(tmp_path):
    """On several ranks the main process may log alone: nothing is reduced then, nothing taken from the next log."""
    logged = []

    class Logs(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            logs = {"loss": 1.0}
            trainer.log(logs)
            logged.append(logs)

    trainer = make_trainer(tmp_path, learning_rate=0.0, logging_steps=3)
    trainer.add_callback(Logs())
    attach(trainer, CONFIG)
    trainer.train()
    assert [set(logs) - {"epoch"} for logs in logged] == [{"loss"}] * 3
    expected = role_losses(trainer.model, DOCS)
    log = next(entry for entry in trainer.state.log_history if "prompt_loss" in entry)
    assert {k: log[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_the_end_of_training_says_what_was_trained(tmp_path, capsys):
    trainer = make_trainer(tmp_path, eval_strategy="epoch")
    attach(trainer, CONFIG)
    trainer.train()
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in printed if "WIT" in line)
    rules = [i for i, line in enumerate(printed) if line == "=" * 80]
    assert len(rules) == 4  # around both
    assert printed[rules[0] + 1].startswith("WIT on: prompt_weight=0.2, response_weight=0.8")
    end = "\n".join(printed[rules[2] + 1 : rules[3]])
    history = trainer.state.log_history
    for key in ("prompt_loss", "response_loss"):
        losses = [entry[key] for entry in history if key in entry]
        assert f"{key}: {losses[0]:.4f} -> {losses[-1]:.4f} (first and last log)" in end
    (evaluated,) = [entry["eval_response_loss"] for entry in history if "eval_response_loss" in entry]
    assert f"eval_response_loss: {evaluated:.4f} (the only evaluation)" in end
    assert "WIT done: 3 steps with prompt_weight=0.2, response_weight=0.8" in end
    assert str(tmp_path / "out") in end


def test_how_the_loss_is_computed_has_a_line_of_its_own(tmp_path, monkeypatch):
    """The progress bar has begun by then, and stands on the same terminal."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    attach(trainer, CONFIG)
    trainer.train()
    before, _, after = screen.getvalue().partition("WIT loss: fused")
    assert "| 0/3 [" in before
    assert before[-1] in "\r\n"
    assert after.startswith("\n")


def test_the_end_of_training_compares_means_of_several_logs(tmp_path, capsys):
    """Twelve logs of four documents each: the first five are 20 documents, and those of the last five are the last."""
    trainer = make_trainer(tmp_path, num_train_epochs=4)
    attach(trainer, CONFIG)
    trainer.train()
    logs = [(e["response_loss"], e["response_tokens"]) for e in trainer.state.log_history if "response_loss" in e]
    assert len(logs) == 12
    ends = [sum(loss * n for loss, n in part) / sum(n for _, n in part) for part in (logs[:5], logs[-5:])]
    line = f"response_loss: {ends[0]:.4f} -> {ends[1]:.4f} (mean of the first and of the last 5 of 12 logs)"
    assert line in capsys.readouterr().out


class TestSumsStayInTheirRun:
    """Each training loop begins with nothing summed, as the trainer's own sums do."""

    def test_trained_twice(self, tmp_path):
        """Four documents a step and a log every second step: the third step of the first run is in no log."""
        trainer = make_trainer(tmp_path, logging_steps=2, learning_rate=0.0)
        attach(trainer, CONFIG)
        trainer.train()
        trainer.train()
        first = role_losses(trainer.model, DOCS)
        log = first_log(trainer)
        assert log["step"] == 2
        assert log["prompt_tokens"] + log["response_tokens"] < first["prompt_tokens"] + first["response_tokens"]

    @pytest.mark.parametrize("another_model", [False, True])
    def test_after_an_interruption(self, tmp_path, another_model):
        """With `model_init` the second run has a model of its own, and so has its first log."""

        class Interrupts(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        trainer, made = make_trainer(tmp_path, logging_steps=3, learning_rate=0.0), []

        def model_init():
            made.append(llama(seed=len(made) + 1))
            return made[-1]

        if another_model:
            trainer = Trainer(
                model_init=model_init,
                args=trainer.args,
                data_collator=DataCollatorForSeq2Seq(tokenizer()),
                train_dataset=EXAMPLES,
                processing_class=tokenizer(),
            )
        attach(trainer, CONFIG)
        callback = Interrupts()
        trainer.add_callback(callback)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(callback)
        trainer.train()
        expected = role_losses(trainer.model, DOCS)
        assert {k: first_log(trainer)[k] for k in expected} == pytest.approx(expected, rel=1e-5)

    def test_a_smaller_batch_after_running_out_of_memory(self, tmp_path):
        class Full(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                if args.train_batch_size == 4 and not self.failed:
                    self.failed = True
                    raise RuntimeError("CUDA out of memory.")

            failed = False

        trainer = make_trainer(
            tmp_path, logging_steps=1, learning_rate=0.0, auto_find_batch_size=True, gradient_accumulation_steps=3
        )
        attach(trainer, CONFIG)
        trainer.add_callback(Full())
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        expected = role_losses(trainer.model, DOCS)
        counted = sum(entry["prompt_tokens"] + entry["response_tokens"] for entry in logs)
        assert counted == expected["prompt_tokens"] + expected["response_tokens"]


class TestRecords:
    def test_settings_with_every_checkpoint_and_on_the_card(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
        attach(trainer, CONFIG)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-3", tmp_path / "final"):
            recorded = json.loads((folder / "wit_config.json").read_text())
            assert recorded.pop("wit_plugins_version") == version("wit-plugins")
            assert recorded == CONFIG.model_dump(exclude={"verify"})
        for _ in range(2):
            trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("prompt tokens weigh 0.2, response tokens 0.8") == 1

    def test_resuming(self, tmp_path):
        """The same settings resume silently and exactly; others, or none, warn."""
        whole = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
        attach(whole, CONFIG)
        whole.train()
        checkpoint = str(tmp_path / "out" / "checkpoint-2")

        again = make_trainer(tmp_path)
        attach(again, WITConfig(prompt_weight=0.2, response_weight=0.8))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*it is resumed with.*")
            again.train(resume_from_checkpoint=checkpoint)
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

        other = make_trainer(tmp_path)
        attach(other, WITConfig(prompt_weight=0.4))
        with pytest.warns(UserWarning, match=r"trained with prompt_weight=0\.2.*resumed with prompt_weight=0\.4"):
            other.train(resume_from_checkpoint=checkpoint)

        (tmp_path / "out" / "checkpoint-3" / "wit_config.json").unlink()
        with pytest.warns(UserWarning, match="checkpoint-3 was trained without weights"):
            again.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [("", "Expecting value"), ("{broken", "Expecting"), ("[1]", "mapping"), ('{"of_tomorrow": 1}', "of_tomorrow")],
    )
    def test_resuming_with_a_record_that_cannot_be_read(self, tmp_path, text, reason):
        """Damaged, or written by a newer version: no reason not to resume."""
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
        attach(trainer, CONFIG)
        trainer.train()
        checkpoint = tmp_path / "out" / "checkpoint-2"
        (checkpoint / "wit_config.json").write_text(text)
        with pytest.warns(UserWarning, match=f"cannot be read .*{reason}.*resumed with prompt_weight=0.2"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3
