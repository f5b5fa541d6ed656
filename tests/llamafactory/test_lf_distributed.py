"""Two CPU processes, under LLaMA-Factory's own torchrun and forked: the same loss and the same step as one."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from apart import Failed
from lfkit import (
    COUNT,
    LEARNING_RATE,
    LLAMAFACTORY,
    LOSS,
    NEAT,
    RAY,
    Version,
    WITCallback,
    alone,
    alpaca,
    chatml,
    environment,
    history,
    in_rows,
    layout_args,
    lora_before,
    place,
    plain_copy,
    rows_of,
    run,
    saved,
    start_command,
    start_with_ray,
    step,
    train_on_ranks,
    trained,
)
from support import all_relative_error

TORCHRUN = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
WEIGHTS = {"prompt_weight": 0.4, "response_weight": 0.6}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("distributed"), count=COUNT)


def scored_by(workplace, layout):
    docs = chatml(COUNT)
    if layout != "packing":
        return alone(docs)
    own = run(workplace.config(packing=True, learning_rate=0.0, output_dir=str(workplace.folder / "rows")))
    return in_rows(rows_of(own.dataset, docs))


def assert_taken(out, before, scored, weights):
    """The loss that a finished run logged, and the SGD step that it took from this model, are the formula's."""
    (entry,) = [entry for entry in history(out) if "loss" in entry]
    loss, grads = step(plain_copy(before), scored, *weights)
    assert entry["loss"] == pytest.approx(loss, **LOSS)
    after = saved(out)
    taken = {n: (p - after[n.replace(".default.", ".")]) / LEARNING_RATE for n, p in trained(before).items()}
    assert all_relative_error({n: taken[n] for n in grads}, grads) < 1e-4


@pytest.mark.parametrize(
    ("weights", "layout", "batch", "accumulation", "tuning"),
    [
        ((0.4, 0.6), "unpacked", 2, 4, "full"),  # by the command and its own launcher
        ((0.0, 1.0), "packing", 1, 2, "full"),
        pytest.param((1.0, 0.2), "neat_packing", 2, 1, "lora", marks=NEAT),
    ],
)
def test_two_processes_take_the_step_of_one(workplace, tmp_path, weights, layout, batch, accumulation, tuning):
    cache = {"tokenized_path": str(tmp_path / "cache")} if layout == "packing" else {}
    if cache:  # older than its data, and of other rows: one of the ranks deletes it, and both read what is written anew
        workplace.dataset("train", alpaca(COUNT + 8)[8:])
        first = workplace.config(output_dir=str(tmp_path / "first"), packing=True, **cache)
        run(first, {"prompt_weight": weights[0], "response_weight": weights[1]})
        for file in (tmp_path / "cache").rglob("*"):
            os.utime(file, (1, 1))
        workplace.dataset("train", alpaca(COUNT))
    config = workplace.write(
        f"{tmp_path.name}.yaml",
        wit={"prompt_weight": weights[0], "response_weight": weights[1]},
        **cache,
        finetuning_type=tuning,
        lora_target="q_proj,v_proj,down_proj" if tuning == "lora" else None,
        lora_rank=4 if tuning == "lora" else None,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        output_dir=str(tmp_path),
        **layout_args(layout),
    )
    if layout == "unpacked":
        done = start_command(workplace.folder, "train", str(config), **TORCHRUN)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "distributed tasks at" in done.stdout + done.stderr
    else:
        train_on_ranks([str(config)], [str(config)])
    (entry,) = [entry for entry in history(tmp_path) if "loss" in entry]
    assert entry["response_tokens"] == sum(sum(d.is_response) for d in chatml(COUNT))
    before = lora_before(workplace, tmp_path) if tuning == "lora" else workplace.model()
    assert_taken(tmp_path, before, scored_by(workplace, layout), weights)


FAILS_ONCE = """
import os, sys
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "1":
    print("rank 1 is lost", file=sys.stderr)
    os._exit(3)
"""


def test_an_elastic_restart_with_overrides(workplace, tmp_path):
    """LLaMA-Factory's elastic launch: a worker dies, all are started again. The weights are only overrides here."""
    at_exit = Path(__file__).parents[1] / "exit" / "sitecustomize.py"  # there can only be one of that name
    (tmp_path / "sitecustomize.py").write_text(at_exit.read_text() + FAILS_ONCE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    config = workplace.write(f"{tmp_path.name}.yaml", per_device_train_batch_size=8, output_dir=str(tmp_path))
    done = start_command(
        workplace.folder,
        *["train", str(config), "wit.prompt_weight=0.4", "wit.response_weight=0.6"],
        **{**TORCHRUN, "RDZV_ID": "7", "MIN_NNODES": "1", "MAX_NNODES": "1", "MAX_RESTARTS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("rank 1 is lost") == 1
    (entry,) = [entry for entry in history(tmp_path) if "loss" in entry]
    loss, _ = step(plain_copy(workplace.model()), alone(chatml(COUNT)), 0.4, 0.6)
    assert entry["loss"] == pytest.approx(loss, **LOSS)


def test_a_worker_without_weights_stops_the_run(workplace, tmp_path):
    """What a second node with another configuration would be: nothing is trained anywhere."""
    args = {"per_device_train_batch_size": 8, "output_dir": str(tmp_path / "out")}
    for rank, wit in enumerate((WEIGHTS, None)):
        (tmp_path / f"rank{rank}.yaml").write_text(workplace.write("rank.yaml", wit=wit, **args).read_text())
    with pytest.raises(Failed, match=r"rank1.yaml: no wit block"):
        train_on_ranks(*([str(tmp_path / f"rank{rank}.yaml")] for rank in (0, 1)))
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_workers_with_other_weights_stop_the_run(workplace, tmp_path):
    config = workplace.write(f"{tmp_path.name}.yaml", per_device_train_batch_size=8, output_dir=str(tmp_path / "out"))
    with pytest.raises(Failed, match=r"(?s)prompt_weight=0\.0.*prompt_weight=0\.1"):
        train_on_ranks(*([str(config), f"wit.prompt_weight=0.{rank}"] for rank in (0, 1)))
    assert not (tmp_path / "out" / "trainer_state.json").exists()


RAY_WORKER = """
import pickle, sys
from llamafactory.train.tuner import _training_function

with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
_training_function(config)
"""


def test_a_ray_worker_gets_the_weights_with_the_pickled_callback(workplace, tmp_path):
    """What LLaMA-Factory ships to a Ray worker, in a process that has imported nothing of this project before."""
    config = workplace.config(per_device_train_batch_size=COUNT, output_dir=str(tmp_path / "out"))
    with open(tmp_path / "config.pkl", "wb") as file:
        pickle.dump({"args": config, "callbacks": [WITCallback(**WEIGHTS)]}, file)
    done = subprocess.run(
        [sys.executable, "-c", RAY_WORKER, str(tmp_path / "config.pkl")],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (entry,) = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    loss, _ = step(plain_copy(workplace.model()), alone(chatml(COUNT)), 0.4, 0.6)
    assert entry["loss"] == pytest.approx(loss, **LOSS)


def test_what_ray_sends_cannot_be_read_without_the_package(monkeypatch):
    sent = pickle.dumps({"callbacks": [WITCallback(**WEIGHTS)]})
    monkeypatch.setitem(sys.modules, "wit_llamafactory", None)
    monkeypatch.delitem(sys.modules, "wit_llamafactory.callback")
    with pytest.raises(ModuleNotFoundError, match="wit_llamafactory"):
        pickle.loads(sent)


@pytest.mark.skipif(
    Version("0.9.5") > LLAMAFACTORY, reason="0.9.4 runs Ray through ray.train, which its environment does not have"
)
def test_two_ray_workers(workplace, tmp_path):
    """`USE_RAY=1 llamafactory-wit train` with two workers of a Ray on this machine: the step of one."""
    config = workplace.write(
        f"{tmp_path.name}.yaml", wit=WEIGHTS, per_device_train_batch_size=8, output_dir=str(tmp_path / "out"), **RAY
    )
    done = start_with_ray(config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 workers for distributed training" in done.stdout + done.stderr
    (entry,) = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert entry["response_tokens"] == sum(sum(d.is_response) for d in chatml(COUNT))
    assert_taken(tmp_path / "out", workplace.model(), alone(chatml(COUNT)), (0.4, 0.6))
