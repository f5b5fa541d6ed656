"""`llamafactory-wit`: LLaMA-Factory's own command line, with weights where there is a `wit:` block."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from lfkit import (
    LOSS,
    alone,
    chatml,
    history,
    place,
    plain_copy,
    run,
    run_command,
    start_command,
    step,
)
from wit_llamafactory import command

import wit_plugins

WIT = {"prompt_weight": 0.4, "response_weight": 0.6}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("command"))


def expected(workplace, *weights):
    return pytest.approx(step(plain_copy(workplace.model()), alone(chatml()), *weights)[0], **LOSS)


def losses(out):
    return [entry["loss"] for entry in history(out) if "loss" in entry]


def test_it_is_installed():
    (script,) = entry_points(group="console_scripts", name="llamafactory-wit")
    assert script.load() is command.main


def test_a_yaml_file_in_a_process_of_its_own(workplace, tmp_path):
    config = workplace.write(f"{tmp_path.name}.yaml", wit=WIT, output_dir=str(tmp_path))
    done = start_command(workplace.folder, "train", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == [expected(workplace, 0.4, 0.6)]
    assert "WIT on: prompt_weight=0.4, response_weight=0.6" in done.stdout
    assert "WIT loss: fused" in done.stdout


@pytest.mark.parametrize("name", ["cfg.yaml", "cfg.yml", "cfg.json"])
def test_kinds_of_files(workplace, tmp_path, monkeypatch, name):
    config = workplace.write(name, wit=WIT, output_dir=str(tmp_path))
    assert run_command(monkeypatch, "train", str(config)) == 0
    assert losses(tmp_path) == [expected(workplace, 0.4, 0.6)]


@pytest.mark.parametrize("wit", [None, {"prompt_weight": 0.9, "response_weight": 0.6}])
def test_overrides(workplace, tmp_path, monkeypatch, wit):
    """They change the block, or are the block; LLaMA-Factory's own are as ever."""
    config = workplace.write(f"{tmp_path.name}.yaml", wit=wit, output_dir="nowhere")
    overrides = ["wit.prompt_weight=0.4", "wit.response_weight=0.6", f"output_dir={tmp_path}", "logging_steps=1"]
    assert run_command(monkeypatch, "train", str(config), *overrides) == 0
    assert losses(tmp_path) == [expected(workplace, 0.4, 0.6)]


def test_all_settings_go_through(workplace, tmp_path, monkeypatch, capsys):
    wit = {**WIT, "normalization": "weight_sum", "loss_impl": "logits", "strategies": ["dft"]}
    wit |= {"message_weight_keys": ["loss"], "sample_weight_key": "quality"}
    config = workplace.write(f"{tmp_path.name}.yaml", wit=wit, output_dir=str(tmp_path))
    assert run_command(monkeypatch, "train", str(config)) == 0
    recorded = json.loads((tmp_path / "wit_config.json").read_text())
    assert recorded == {**wit, "strategies": {"dft": {}}, "wit_plugins_version": wit_plugins.__version__}
    assert "WIT loss: logits" in capsys.readouterr().out


def test_without_a_block_it_is_llamafactory(workplace, tmp_path, monkeypatch, capsys):
    config = workplace.write(f"{tmp_path.name}.yaml", output_dir=str(tmp_path / "out"))
    assert run_command(monkeypatch, "train", str(config)) == 0
    own = run(workplace.config(output_dir=str(tmp_path / "own")))
    assert losses(tmp_path / "out") == own.logged()
    assert "WIT" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "wit_config.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("notes.txt", "wit: {}", "reads its configuration from a .yaml, .yml or .json file"),
        ("list.yaml", "- wit\n- stage", "holds no mapping of keys to values, but a list"),
        ("list.json", "[1]", "holds no mapping of keys to values, but a list"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, monkeypatch, capsys, name, text, says):
    (tmp_path / name).write_text(text)
    assert run_command(monkeypatch, "train", str(tmp_path / name)) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / name}: " in err
    assert says in err
    assert "Traceback" not in err


def own_command(folder, *argv):
    script = [sys.executable, "-c", "import sys; from llamafactory.cli import main; sys.exit(main())"]
    return subprocess.run([*script, *argv], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("argv", [["version"], ["help"], [], ["nonsense"]], ids=" ".join)
def test_other_sub_commands_are_llamafactory_s(tmp_path, monkeypatch, capsys, argv):
    assert run_command(monkeypatch, *argv) == 0
    mine = capsys.readouterr().out
    from llamafactory import cli

    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", *argv])
    cli.main()
    assert capsys.readouterr().out == mine
    assert mine


def test_every_sub_command_goes_to_llamafactory_untouched(monkeypatch):
    from llamafactory import cli

    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(list(sys.argv[1:])))
    commands = [["api", "x.yaml"], ["chat", "x.yaml", "wit.x=1"], ["export", "x.yaml"], ["webui"], ["webchat"], ["env"]]
    for argv in commands:
        assert run_command(monkeypatch, *argv) == 0
    assert seen == commands


@pytest.mark.parametrize(
    ("argv", "wit"),
    [(["train", "cfg.yaml", "no_such_key=1"], WIT), (["eval"], None)],
)
def test_exit_codes_of_mistakes(workplace, tmp_path, argv, wit):
    """Those of LLaMA-Factory, with weights and without."""
    workplace.write("cfg.yaml", output_dir=str(tmp_path / "out"))
    own = own_command(workplace.folder, *argv)
    assert own.returncode != 0
    workplace.write("cfg.yaml", wit=wit, output_dir=str(tmp_path / "out"))
    done = start_command(workplace.folder, *argv)
    assert done.returncode == own.returncode
    assert done.stderr.strip().splitlines()[-1] == own.stderr.strip().splitlines()[-1]


def test_torchrun_is_found_where_the_environment_is_not_active(workplace, tmp_path, monkeypatch):
    """The command started by its path: LLaMA-Factory's launcher asks the PATH for torchrun."""
    started = []

    def start(arguments, env, **kwargs):
        started.append(shutil.which(arguments[0], path=env["PATH"]))
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    config = workplace.write(f"{tmp_path.name}.yaml", wit=WIT)
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, "train", str(config))
    assert ended.value.code == 0
    assert started == [str(Path(sys.executable).parent / "torchrun")]


def test_a_failing_worker_fails_the_command(workplace, tmp_path):
    config = workplace.write(f"{tmp_path.name}.yaml", wit=WIT, template="nonsense", output_dir=str(tmp_path))
    done = start_command(workplace.folder, "train", str(config), FORCE_TORCHRUN="1", NPROC_PER_NODE="1")
    assert done.returncode == 1
    assert "CalledProcessError" not in done.stderr
    assert "Template nonsense does not exist" in done.stderr


def test_the_launcher_is_given_back(workplace, tmp_path, monkeypatch):
    from llamafactory import launcher
    from llamafactory.train import tuner

    before = launcher.__file__, tuner.run_exp
    config = workplace.write(f"{tmp_path.name}.yaml", wit=WIT, template="nonsense", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="Template nonsense"):
        run_command(monkeypatch, "train", str(config))
    assert (launcher.__file__, tuner.run_exp) == before


def test_several_nodes_are_started_as_llamafactory_starts_them(workplace, tmp_path, monkeypatch):
    """NNODES and its like end in torchrun's arguments; only the file that torchrun starts is another."""
    from llamafactory import cli, launcher
    from wit_llamafactory import train

    started = []

    def start(arguments, **kwargs):
        started.append(arguments)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", start)
    environment = {"FORCE_TORCHRUN": "1", "NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4"}
    for name, value in {**environment, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    config = workplace.write(f"{tmp_path.name}.yaml", wit=WIT)
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, "train", str(config), "wit.prompt_weight=0.3")
    assert ended.value.code == 0
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", str(config), "wit.prompt_weight=0.3"])
    with pytest.raises(SystemExit):
        cli.main()
    mine, own = started
    assert [train.__file__ if part == launcher.__file__ else part for part in own] == mine
    assert train.__file__ in mine
    assert "--nnodes" in mine
