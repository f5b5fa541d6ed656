"""What stands in configs/axolotl and docs/axolotl.md is what Axolotl takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from axokit import Workplace, axolotl, train
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from support import subprocess_env

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "axolotl.md").is_file())
RECIPES = sorted((ROOT / "configs" / "axolotl").glob("*.yaml"))
H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_axolotl_s_own_validation(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    PluginManager.get_instance().plugins.clear()
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    cfg = DictDefault(dict(written))
    prepare_plugins(cfg)
    validated = validate_config(cfg, H100, {"torch_version": "2.13.0"}).to_dict()
    assert validated["wit"] == {"prompt_weight": 0.2, "response_weight": 0.8}
    # Axolotl drops keys that it does not know: every one that is written must still be there
    assert set(written) <= set(validated)
    for dataset in written["datasets"] + written["test_datasets"]:
        assert (ROOT / dataset["path"]).is_file()
    assert Path(written.get("deepspeed", __file__)).is_file()


def test_the_cpu_example(tmp_path):
    """The documented command, shortened; from a copy of what it reads."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, "configs/axolotl/demo.py", "--max-steps", "2", "--logging-steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("WIT on:")]
    guide = (ROOT / "docs" / "axolotl.md").read_text(encoding="utf-8")
    assert re.sub(r"Axolotl [0-9.]+", "Axolotl 0.19.0", line) in guide
    assert "'response_loss'" in done.stdout + done.stderr


def blocks(language):
    text = (ROOT / "docs" / "axolotl.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_first_block_added_to_a_configuration(tmp_path):
    """The guide's two keys, pasted under a configuration that has neither."""
    path = Workplace(tmp_path).config(plugins=None, wit=None)
    path.write_text(path.read_text() + blocks("yaml")[0])
    axolotl("preprocess", path)
    pasted = yaml.safe_load(path.read_text())
    pasted["plugins"].insert(0, "axokit.Recorder")
    path.write_text(yaml.safe_dump(pasted))
    assert train(path).trainer._wit.config.prompt_weight == 0.4
