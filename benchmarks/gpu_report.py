"""The tables of a run of `gpu.py`, from the numbers that its parts wrote, and their place in docs/performance.md."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu: written by benchmarks/gpu.py -->", "<!-- end of gpu -->"
MEASURED = ("gpu-head.json", "gpu-step-trl.json", "gpu-step-axolotl.json", "gpu-step-llamafactory.json")
BAR = 1.02  # of Liger's head without weights, and of a framework's own step
NAMES = {"trl": "TRL", "axolotl": "Axolotl", "llamafactory": "LLaMA-Factory"}


def tables(folder: Path) -> str:
    """Markdown: what ran, the head, the sums of its gradient, the steps. What is not there is left out.

    Args:
        folder: where the results are. What is in it from an earlier run is shown with its own date.
    """
    parts = []
    for name, part in (("summary", ran), ("head", head), ("head_gradient", sums)):
        numbers = read(folder / f"gpu-{name}.json")
        if numbers:
            parts.append(part(numbers))
    parts.append(steps({name: numbers for name in NAMES if (numbers := read(folder / f"gpu-step-{name}.json"))}))
    if (folder / "gpu-head.png").is_file():
        parts.append("![Time and memory of the methods at every shape](../benchmarks/results/gpu-head.png)\n")
    return "\n".join(filter(None, parts))


def read(path: Path) -> dict[str, Any]:
    """A file of results; nothing if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write(page: Path, text: str) -> None:
    """Put the tables between the marks of a page.

    Raises:
        ValueError: if the page has no such marks.
    """
    old = page.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{page} needs one line {BEGIN} and, after it, one line {END}: the tables go between them")
    before, rest = old.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}")


def ran(summary: dict[str, Any]) -> str:
    """What ran and what did not, and why."""
    lines = [
        f"`{summary['command']}`, {summary['date'][:10]}; {', '.join(summary['hardware'].get('gpus', ['no GPU']))}.",
        "",
    ]
    lines += ["| part | | tests passed | skipped | failed | seconds |", "|---|---|---:|---:|---:|---:|"]
    for part in summary["parts"]:
        counts = [str(part["counts"].get(what, "")) for what in ("passed", "skipped", "failed")]
        lines.append(f"| {part['name']} | {part['status']} | {' | '.join(counts)} | {part['seconds']:.0f} |")
    lines.append("")
    for part in summary["parts"]:
        if part["reason"]:
            lines.append(f"- {part['name']}: {part['reason']}.")
        if part["skipped"] and part["status"] != "skipped":
            reasons = "; ".join(f"{count} × {reason}" for reason, count in part["skipped"].items())
            lines.append(f"- {part['name']} skipped {reasons}.")
        if part["failures"]:
            lines.append(f"- {part['name']} failed: {', '.join(part['failures'])}.")
    if summary["left_out"]:
        lines.append(f"- Not run: {', '.join(summary['left_out'])}.")
    return "\n".join(lines) + "\n"


def machine(numbers: dict[str, Any]) -> str:
    """The command, the date, the versions and the hardware of a file of results."""
    hardware = numbers["hardware"]
    if isinstance(hardware, dict):
        hardware = hardware.get("gpu", hardware.get("cpu"))
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    return f"`{numbers['command']}`, {numbers['date'][:10]}; {hardware}, {numbers['dtype']}; {versions}."


def head(numbers: dict[str, Any]) -> str:
    """Time and memory of every method at every shape, and whether `wit` is within the bar."""
    lines = ["#### The head", "", machine(numbers), ""]
    for shape, results in numbers["results"].items():
        by_name = {r["method"]: r for r in results}
        bar = by_name.get("liger mean", {})
        of = "of Liger without weights" if bar.get("times") else "of full"
        base = bar if bar.get("times") else by_name.get("full", {})
        lines += [f"{shape} (tokens × hidden × vocabulary):", ""]
        lines += [f"| | time | {of} | extra memory | in all, {of} | error |", "|---|---:|---:|---:|---:|---:|"]
        for r in results:
            if not r["times"]:
                lines.append(f"| {r['method']} | {r['note']} | | | | |")
                continue
            time, memory = ratio(median(r), median(base)), ratio(in_all(shape, r), in_all(shape, base))
            error = "–" if not_a_number(r["error"]) else f"{r['error']:.1e}"
            cells = [f"{1000 * median(r):.1f} ms", time, f"{r['peak'] / 1e6:,.0f} MB", memory, error]
            lines.append(f"| {r['method']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, verdict(numbers["results"])])


def verdict(results: dict[str, list[dict[str, Any]]]) -> str:
    """At which shapes the weighted head is within the bar, in time and in memory; and of Liger's as exact as it."""
    against = {
        "liger mean": "Liger without weights",
        "liger mean float32": "Liger that sums its gradient in float32, too,",
    }
    sentences = [sentence for bar, words in against.items() if (sentence := within(results, bar, words))]
    return "\n".join(sentences) or "Liger's head without weights, the bar, did not run here.\n"


def within(results: dict[str, list[dict[str, Any]]], method: str, words: str) -> str:
    """At which shapes the weighted head is within the bar of another method; nothing if that did not run."""
    compared, slower, larger = 0, [], []
    for shape, rows in results.items():
        by_name = {r["method"]: r for r in rows}
        mine, bar = by_name.get("wit", {}), by_name.get(method, {})
        if not (mine.get("times") and bar.get("times")):
            continue
        compared += 1
        if median(mine) > BAR * median(bar):
            slower.append(f"{shape} ({ratio(median(mine), median(bar))})")
        if in_all(shape, mine) > BAR * in_all(shape, bar):
            larger.append(f"{shape} ({ratio(in_all(shape, mine), in_all(shape, bar))})")
    if not compared:
        return ""
    return (
        f"Within {BAR} × {words} in time at {compared - len(slower)} of {compared} shapes"
        f"{', not at ' + ', '.join(slower) if slower else ''}; in memory (inputs and gradients included) at "
        f"{compared - len(larger)} of {compared}{', not at ' + ', '.join(larger) if larger else ''}.\n"
    )


def in_all(shape: str, result: dict[str, Any]) -> float:
    """Bytes of inputs, gradients and what a step allocates beyond them, the first two in half precision."""
    if "peak" not in result:
        return math.nan
    tokens, hidden, vocabulary = (int(size) for size in shape.split()[0].split("x"))
    return 4 * hidden * (tokens + vocabulary) + result["peak"]


def sums(numbers: dict[str, Any]) -> str:
    """Ways to sum the gradient of the head."""
    lines = ["#### The sum of the head's gradient", "", machine(numbers), ""]
    for shape, rows in numbers["costs"].items():
        lines += [f"{shape}:", "", "| sum | fastest step | extra memory | error |", "|---|---:|---:|---:|"]
        for name, row in rows.items():
            if row.get("note"):
                lines.append(f"| {name} | {row['note']} | | |")
                continue
            fastest, memory = 1000 * min(row["times"]), row["memory"] / 1e6
            lines.append(f"| {name} | {fastest:.1f} ms | {memory:,.0f} MB | {row['error']:.1e} |")
        lines.append("")
    return "\n".join(lines)


def steps(numbers: dict[str, dict[str, Any]]) -> str:
    """Whole steps, own loss against weighted."""
    if not numbers:
        return ""
    lines = ["#### A whole training step", ""]
    lines += [
        "| | own loss | (0.2, 0.8) | of own | fastest, of own | peak memory, of own |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    within = []
    for name, run in numbers.items():
        own, mine = ({"note": "", **run["results"][variant]} for variant in ("own", "wit"))
        title = f"{NAMES[name]} {run['versions'].get(name, '')}".strip()
        shown = [f"{1000 * statistics.median(r['steps']):.0f} ms" if r["steps"] else r["note"] for r in (own, mine)]
        if not own["steps"] or not mine["steps"]:
            lines.append(f"| {title} | {' | '.join(shown)} | – | – | – |")
            continue
        time = statistics.median(mine["steps"]) / statistics.median(own["steps"])
        fastest, memory = (min(mine[what]) / min(own[what]) for what in ("steps", "memory"))
        lines.append(f"| {title} | {' | '.join([*shown, f'{time:.3f}', f'{fastest:.3f}', f'{memory:.3f}'])} |")
        within.append(f"{title} {'yes' if max(time, memory) <= BAR else 'no'}")
    lines.append("")
    if within:
        lines += [f"Within {BAR} × the framework's own step, in time and in memory: {', '.join(within)}.", ""]
    for run in numbers.values():
        sizes = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in run["sizes"].items())
        lines.append(f"{machine(run)} {sizes}.\n")
    return "\n".join(lines)


def median(result: dict[str, Any]) -> float:
    """Of a method's times; nan if it has none."""
    return statistics.median(result["times"]) if result.get("times") else math.nan


def ratio(value: float, of: float) -> str:
    """Two numbers' ratio, or a dash."""
    return "–" if not_a_number(value) or not_a_number(of) or not of else f"{value / of:.3f}"


def not_a_number(value: float | None) -> bool:
    """Whether there is no number."""
    return value is None or math.isnan(value)
