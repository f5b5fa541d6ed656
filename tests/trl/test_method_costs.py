"""`benchmarks/methods.py` measures what each method costs: all methods, and docs/dev/measurements.md lists the same."""

import re
from pathlib import Path

import pytest

from wit_plugins.contract.plugins import DEFAULT_STRATEGIES

ROOT = next(p for p in Path(__file__).parents if (p / "benchmarks").is_dir())


def test_every_method_is_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods

    measured = {strategy for own in methods.METHODS.values() for strategy in own}
    assert measured == set(DEFAULT_STRATEGIES) - {"wit", "spans"}
    page = (ROOT / "docs" / "dev" / "measurements.md").read_text(encoding="utf-8")
    page = page.partition("## The methods of the literature\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE) == list(methods.METHODS)

    some = ["wit", "fait", "otr", "rho1, scores", "coba", "wit, LoRA", "sstoken, LoRA"]  # whatever has code of its own
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in some})
    seen, memory = methods.measure(methods.QUICK, 1)
    assert {name: len(steps) for name, steps in seen.items()} == dict.fromkeys(some, 2)
    assert min(min(steps) for steps in seen.values()) > 0
    assert memory["otr"] > memory["wit"]  # which holds the distribution's cumulative sums
    assert memory["fait"] == pytest.approx(memory["wit"], rel=1e-3)  # whose weights are there before the model is asked
    methods.draw(seen, memory, tmp_path / "costs.png")
    assert len(methods.table(seen, memory).splitlines()) == 2 + len(some)
