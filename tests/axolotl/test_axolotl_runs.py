"""The other ways to start Axolotl: several processes, its launchers, preprocess, evaluate, resuming, sweeping."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from apart import apart
from axokit import CHAT, LEARNING_RATE, PLUGINS, axolotl, from_prepared, history, rows, train, weights_of
from safetensors.torch import load_file
from support import all_relative_error, llama, reference_step, role_losses, subprocess_env

BIN = Path(sys.executable).parent


def shell(*args, cwd, **variables):
    env = subprocess_env(**variables)
    env["PATH"] = f"{BIN}:{env['PATH']}"  # Axolotl starts accelerate and torchrun by name
    done = subprocess.run([str(BIN / "axolotl"), *map(str, args)], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def logged(entries, key):
    return [entry[key] for entry in entries if key in entry]


@pytest.mark.parametrize(("launcher", "packed"), [("accelerate", False), ("torchrun", True)])
def test_two_processes_take_one_step(place, launcher, packed):
    """The ranks' token counts differ; loss and step are those of all documents at once."""
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    if packed:
        settings |= {"count": 24, "sample_packing": True, "micro_batch_size": 1, "sequence_len": 80}
    path = place.config(plugins=PLUGINS, **settings)
    axolotl("preprocess", path)
    two = {
        "accelerate": ["--multi_gpu", "--num_processes", "2"],  # accelerate's name for torchrun
        "torchrun": ["--nproc-per-node", "2"],
    }[launcher]
    # Without a GPU: gloo, which accelerate takes for as many processes only if it is told so.
    printed = shell("train", path, "--launcher", launcher, "--", *two, cwd=path.parent, ACCELERATE_USE_CPU="true")
    assert printed.count("WIT on: prompt_weight=0.2, response_weight=0.8") == 1
    alone = train(place.config(**{**settings, "gradient_accumulation_steps": 4}))
    docs = from_prepared(alone.trainer.train_dataset)
    assert len(docs) == settings.get("count", 8)
    loss, grads = reference_step(llama(vocab_size=64), docs, 0.2, 0.8)
    first, *_ = history(path.parent / "out")
    assert first["loss"] == pytest.approx(loss, rel=1e-4)
    expected = role_losses(llama(vocab_size=64), docs)
    assert {k: first[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    after = load_file(path.parent / "out" / "model.safetensors")
    before = dict(llama(vocab_size=64).named_parameters())
    taken = {name: (before[name].detach() - after[name]) / LEARNING_RATE for name in grads}
    assert all_relative_error(taken, grads) < 1e-3


def test_resuming_in_the_middle(place):
    """The same losses as running through, and the same model."""
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 3, "learning_rate": 0.01}
    settings |= {"optimizer": "adamw_torch", "lr_scheduler": "cosine", "save_strategy": "steps", "save_steps": 2}
    through = train(place.config(**settings))
    assert len(through.losses) == 6
    middle = Path(through.trainer.args.output_dir) / "checkpoint-2"
    assert json.loads((middle / "wit_config.json").read_text())["prompt_weight"] == 0.2
    resumed = train(place.config(**settings, resume_from_checkpoint=str(middle)))
    assert resumed.losses == pytest.approx(through.losses, rel=1e-6)  # the first two come with the checkpoint
    assert len(resumed.seen) == 8  # and were not trained again
    after, expected = weights_of(resumed.trainer.model), weights_of(through.trainer.model)
    assert all_relative_error(after, expected) < 1e-6


def test_resuming_with_other_weights_warns(place):
    settings = {"micro_batch_size": 4, "num_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    first = train(place.config(**settings))
    checkpoint = str(Path(first.trainer.args.output_dir) / "checkpoint-1")
    with pytest.warns(UserWarning, match="was trained with prompt_weight=0.2.*resumed with prompt_weight=0.4"):
        train(place.config(**settings, wit={"prompt_weight": 0.4}, resume_from_checkpoint=checkpoint))


def test_the_best_model_by_the_weighted_loss_of_the_whole_set(place):
    held_out = {"path": str(place.data("chat", 6)), "ds_type": "json", "split": "train", **CHAT}
    settings = {"test_datasets": [held_out], "eval_batch_size": 2, "eval_strategy": "steps", "save_strategy": "steps"}
    settings |= {"eval_steps": 1, "save_steps": 1, "num_epochs": 3, "val_set_size": 0.0, "learning_rate": 0.0}
    run = train(place.config(**settings, metric_for_best_model="eval_weighted_loss", load_best_model_at_end=True))
    assert run.trainer.state.best_metric == min(run.logged("eval_weighted_loss"))
    docs = from_prepared(run.trainer.eval_dataset)
    assert len(docs) == 6
    expected, _ = reference_step(run.trainer.model, docs, 0.2, 0.8)
    assert run.logged("eval_weighted_loss") == pytest.approx([expected] * 4, rel=1e-5)  # once before the first step


def test_what_a_run_leaves_behind(place):
    run = train(place.config(save_strategy="epoch"))
    out = Path(run.trainer.args.output_dir)
    for folder in (out, out / "checkpoint-1"):
        assert json.loads((folder / "wit_config.json").read_text())["response_weight"] == 0.8
    assert "prompt tokens weigh 0.2" in (out / "README.md").read_text()


def test_preprocess_writes_what_axolotl_alone_would(place, tmp_path):
    """Where nothing in the data weighs other than 1 it is the same file, in a folder of another name."""
    for plugins, wit in ((["axokit.Recorder"], None), (PLUGINS, {"prompt_weight": 0.5})):
        prepared = tmp_path / str(len(plugins))
        axolotl("preprocess", place.config(plugins=plugins, wit=wit, dataset_prepared_path=str(prepared)))
    (theirs,), (ours,) = (list((tmp_path / name).rglob("*.arrow")) for name in "13")
    assert theirs.read_bytes() == ours.read_bytes()
    assert theirs.parent.name != ours.parent.name


def test_evaluate_is_axolotl_s_own(place, tmp_path):
    """`axolotl evaluate` builds its trainer past the plugins; its loss is the response's, whatever weights above 0."""
    weighted = [{**row, "weight": 0.5 + index} for index, row in enumerate(rows("chat", 6))]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighted))
    held_out = {"path": str(tmp_path / "held_out.jsonl"), "ds_type": "json", "split": "train", **CHAT}
    settings = {"test_datasets": [held_out], "eval_batch_size": 6, "micro_batch_size": 6}
    summaries = []
    for plugins, wit in ((["axokit.Recorder"], None), (PLUGINS, {"prompt_weight": 0.5})):
        path = place.config(plugins=plugins, wit=wit, **settings)
        axolotl("evaluate", path, "--launcher", "python")
        with (path.parent / "out" / "eval_summary.csv").open() as file:
            summaries.append(
                {row["metric"]: float(row["validation"]) for row in csv.DictReader(file) if row["validation"]}
            )
    assert summaries[0]["loss"] == pytest.approx(summaries[1]["loss"], rel=1e-6)


def test_axolotl_s_own_sweep(place, tmp_path):
    """A list of whole `wit:` blocks is a sweep that Axolotl runs by itself."""
    path = place.config(save_strategy="epoch")
    blocks = [{"prompt_weight": 0.0}, {"prompt_weight": 0.4, "response_weight": 0.6}]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"wit": blocks}))
    axolotl("train", path, "--launcher", "python", "--sweep", tmp_path / "sweep.yaml")
    saved = [json.loads(file.read_text()) for file in (path.parent / "out").glob("sweep*/wit_config.json")]
    assert sorted(config["prompt_weight"] for config in saved) == [0.0, 0.4]


def test_the_block_without_the_plugin_line_is_ignored(place):
    """What the guide warns of: Axolotl does not know the key and says nothing; no line `WIT on` is how one sees it."""
    printed = apart(axolotl, "train", place.config(plugins=["axokit.Recorder"]), "--launcher", "python")
    assert "'train_loss'" in printed
    assert "WIT on" not in printed
