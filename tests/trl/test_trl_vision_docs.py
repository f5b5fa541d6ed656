"""The script in docs/vision.md, and the command beside it, run with a small model and pictures drawn here."""

import json
import re
from pathlib import Path

import pytest
import yaml
from commandkit import ARGS, first_loss, run
from packaging.version import Version
from trlcases import TRL
from trlvisionkit import batches_of, data, vision_trainer
from visionkit import rows, seeing, weighted_step

PAGE = next(p / "docs" / "vision.md" for p in Path(__file__).parents if (p / "docs" / "vision.md").is_file())
pytestmark = pytest.mark.skipif(Version("1.16") > TRL, reason="its transformers reads no image without torchvision")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A model folder with its processor, and a file of rows that name pictures."""
    monkeypatch.chdir(tmp_path)
    model, processor, _ = seeing("Llava")
    model.save_pretrained("model")
    processor.save_pretrained("model")
    with open("train.jsonl", "w", encoding="utf-8") as file:
        for number, row in enumerate(rows([1, 2, 1])):
            names = [f"{number}-{index}.png" for index in range(len(row["images"]))]
            for image, name in zip(row["images"], names, strict=True):
                image.save(name)
            file.write(json.dumps({**row, "images": names}) + "\n")
    return tmp_path


def expected_loss(tmp_path):
    trainer, special = vision_trainer(tmp_path, "Llava", data([1, 2, 1]))
    return weighted_step(trainer.model, batches_of(trainer), special, 0.2, 0.8)[0]


def test_the_script(workplace):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    small = '"out", per_device_train_batch_size=3, max_steps=1, logging_steps=1, report_to=[], '
    for old, new in {'"Qwen/Qwen2.5-VL-3B-Instruct"': '"model"', '"out", ': small}.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    scope = {}
    exec(compile(code, str(PAGE), "exec"), scope)
    (logged,) = [entry for entry in scope["trainer"].state.log_history if "response_loss" in entry]
    assert logged["loss"] == pytest.approx(expected_loss(workplace), rel=1e-5)


def test_the_command(workplace):
    Path("data").mkdir()
    data([1, 2, 1]).to_parquet("data/train.parquet")
    shown, *_ = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    config = {**ARGS, **yaml.safe_load(shown)}
    assert config["max_length"] is None
    Path("sft.yaml").write_text(yaml.safe_dump({**config, "model_name_or_path": "model"}))
    done = run(workplace, "sft", "--config", "sft.yaml", "--prompt_weight", "0.2", "--response_weight", "0.8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert first_loss(workplace) == pytest.approx(expected_loss(workplace), rel=1e-5)
