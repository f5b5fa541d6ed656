"""LLaMA-Factory's part of the table of hostile inputs (tests/kits/hostile.py)."""

import pytest
import yaml
from hostile import changed, check, rows
from lfkit import Place, run_command


@pytest.mark.parametrize("row", rows("llamafactory"))
def test_row(row, tmp_path, monkeypatch, capfd):
    block = changed({"prompt_weight": 0.2, "response_weight": 0.8}, row.weights) if row.block is None else row.block
    path = tmp_path / "config.yaml"
    text = yaml.safe_dump(Place(tmp_path).config(**row.settings, wit=block)) if row.text is None else row.text
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    argv = [part.replace("{config}", str(path)) for part in row.argv] or [str(path)]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    try:
        code = run_command(monkeypatch, "train", *argv)
    except SystemExit as end:
        code = end.code
    check(row, code, *capfd.readouterr())
    assert not (tmp_path / "out").exists()
