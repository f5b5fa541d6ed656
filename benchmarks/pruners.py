"""Which pruner suits the choice of weights? Optuna's own, on learning curves that were recorded beforehand.

    python benchmarks/pruners.py                # records the curves that are missing, then simulates all searches

Each curve is the response loss of one run of `benchmarks/search.py`, evaluated at every fifth step, for 25 ratios that
are evenly spaced on the axis that is searched; between them it is interpolated. The first pair of sources is that of
`benchmarks/search.py`, on which a pruner may be chosen; the others are there to see whether the choice holds. A
simulated search does what `wit sweep --trials` does: the same first cells, sampler and pruners, cells one after
another, a run stopped at the evaluation after which the pruner says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from search import STEPS, train

from wit_plugins.cli.sweep.space import POSITION, Space, position, ratio_at

SOURCES, RATIOS, FINE, EVERY = (0, 1, 2), 25, 5, 10
GRID = 35 * STEPS
PLACES = np.linspace(0, position(1.0), RATIOS)
Curve = dict[int, float]


def record(path: Path, sources: int) -> list[Curve]:
    """The curves of one pair of sources by their place; what is recorded already is read."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = known.setdefault(str(sources), {})
    for place in PLACES:
        ratio = str(ratio_at(place))
        if ratio not in found:
            trainer = train(float(ratio), 1.0, seed=0, output=path.parent / "run", sources=sources, every=FINE)
            logged = [entry for entry in trainer.state.log_history if "eval_response_loss" in entry]
            found[ratio] = [round(entry["eval_response_loss"], 5) for entry in logged]
            path.write_text(json.dumps(known, indent=0) + "\n", encoding="utf-8")
    return [dict(zip(range(FINE, STEPS + 1, FINE), curve, strict=True)) for curve in found.values()]


def at(curves: list[Curve], place: float, step: int) -> float:
    """The loss of a run at a step."""
    return float(np.interp(place, PLACES, [curve[step] for curve in curves]))


def pruners() -> dict[str, Callable[[], Any]]:
    """All that are compared, by their options; looks at evaluations, from a share of the steps on."""
    from optuna import pruners as known

    made: dict[str, Callable[[], Any]] = {"none": known.NopPruner}
    for share in (6, 4, 3, 2):
        for factor in (2, 3, 4):
            options = {"min_resource": STEPS // share, "reduction_factor": factor}
            made[f"halving, from 1/{share}, best 1/{factor}"] = lambda o=options: known.SuccessiveHalvingPruner(**o)
        for percent in (50, 25, 15, 10, 5):
            options = {"percentile": percent, "n_startup_trials": 3, "n_warmup_steps": STEPS // share}
            made[f"percentile, from 1/{share}, best {percent} %"] = lambda o=options: known.PercentilePruner(**o)
    made["hyperband"] = lambda: known.HyperbandPruner(EVERY, STEPS, 3)
    for patience in (1, 2):
        made[f"halving from 1/6, patience {patience}"] = lambda p=patience: known.PatientPruner(
            known.SuccessiveHalvingPruner(min_resource=STEPS // 6, reduction_factor=3), p
        )
    for value in (0.05, 0.2):
        made[f"Wilcoxon, p < {value}"] = lambda p=value: known.WilcoxonPruner(p_threshold=p, n_startup_steps=2)
    return made


def searched(curves: list[Curve], pruner: Any, seed: int, trials: int) -> tuple[int, float, float]:
    """One search: the steps it trains, its best cell's loss, and that of its best cell that is no reference."""
    import optuna

    first = Space().first(None, None)  # type: ignore[arg-type]  # without --param, they are not asked
    sampler = optuna.samplers.TPESampler(n_startup_trials=len(first), seed=seed)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    for params, notes in first:
        study.enqueue_trial(params, user_attrs=notes)
    steps, best, found = 0, np.inf, np.inf
    for _ in range(trials):
        trial = study.ask()
        place = trial.suggest_float(POSITION, 0.0, position(1.0))
        reference = "reference" in trial.user_attrs
        for step in range(EVERY, STEPS + 1, EVERY):
            trial.report(at(curves, place, step), step)
            if trial.should_prune() and not reference and step < STEPS:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            loss = at(curves, place, STEPS)
            study.tell(trial, loss)
            best, found = min(best, loss), found if reference else min(found, loss)
        steps += step
    return steps, best, found


def main() -> None:
    """Record, simulate, write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pruners"), help="folder to write to (%(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="of the sampler (%(default)s)")
    parser.add_argument("--trials", type=int, nargs="+", default=[8, 9, 12], help="cells of a search (%(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for sources in SOURCES:
        curves = record(options.output / "curves.json", sources)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore")
        references = min(at(curves, position(ratio), STEPS) for ratio in (0, 0.25, 1))
        lowest = min(curve[STEPS] for curve in curves)
        print(f"\nsources {sources}: lowest {lowest:.4f}, best reference {references:.4f}")
        for trials in options.trials:
            for name, make in pruners().items():
                runs = [searched(curves, make(), seed, trials) for seed in range(options.seeds)]
                row = {
                    "sources": sources, "trials": trials, "pruner": name,
                    "share": round(statistics.fmean(steps for steps, *_ in runs) / GRID, 4),
                    "largest_share": round(max(steps for steps, *_ in runs) / GRID, 4),
                    "above_lowest": round(statistics.fmean(best for _, best, _ in runs) - lowest, 4),
                    "beats_references": sum(found < references for *_, found in runs) / options.seeds,
                }  # fmt: skip
                rows.append(row)
                print(*row.values(), sep="\t")
    kept = json.loads((options.output / "curves.json").read_text(encoding="utf-8"))
    result = {"steps": STEPS, "grid": GRID, "seeds": options.seeds, "searches": rows, "curves": kept}
    (options.output / "results.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
