"""`wit sweep`: train a grid over the weights, or search for the best ones. Each cell is one run of the framework.

No process leads a sweep. Each `wit sweep` on a folder is a worker, and the workers share one study in Optuna's storage.

1. `command.py` checks the configuration and opens the study. A grid queues all its cells there (`grid.py`). A search
   queues its references and a few ratios (`space.py`).
2. `runner.py` takes a trial whenever a device is free: a queued one or, in a search, a new one from Optuna's sampler.
   The trial's key names the cell's folder. `runs.py` starts the process, from the last checkpoint if there is one.
3. The run writes what it logs into the cell's folder (`training/recorder.py`). The worker reports each evaluation to
   the study. If the pruner says that the cell cannot win, the worker writes the file `stop`, and the run ends early.
4. When the run and the user's own evaluation have ended, the trial ends: complete with a value, pruned, or failed.
5. Each worker shows that it is alive (`workers.py`). A worker that looks for a trial queues the trials of dead workers
   again (`study.py`). The new trial has the old one's key, and so its folder.
6. When no trial is left, a search with `--seeds` queues the repetitions. Then each worker writes the report.

The study may come from elsewhere, so `checked.py` checks every trial when it is read.
"""
