"""`wit sweep`: a grid over the weights, or a search for the best; one run of the framework's launcher a cell.

How a sweep works. There is no head: every `wit sweep` on the same folder is a worker, and all they share is a study in
Optuna's storage (`study.py`).

1. `command.py` opens the study, or begins it: a grid's cells are queued in it, or a search's references and a few
   ratios (`grid.py`, `space.py`: what a trial means as weights and overrides).
2. The loop of `runner.py` takes a trial where a device is free: one that waits in the queue or, of a search, a new one
   of Optuna's sampler. The cell is a folder that is named after the trial, and a process (`runs.py`), which goes on
   from a checkpoint if an earlier attempt left one. What came of it is noted in the trial as soon as it has ended; then
   the user's own evaluation is another process.
3. The run writes what it logs into its folder (`training/recorder.py`). Every evaluation is reported to the study and,
   of a search, judged by its pruner; if the cell cannot win, the file `stop` appears in the folder, and the run ends as
   one that is done, at the next step at which all its ranks look.
4. When all is done the trial ends: complete with a value, pruned, or failed with a reason.
5. Meanwhile the worker says that it lives (`workers.py`). Whoever looks for a trial puts back what dead workers had;
   one with nothing to do waits while others run. A trial that is put back has the same key, and so the same folder.
6. When no trial of a search is open, the repetitions with other seeds are queued, if they are asked for; then each
   worker draws the report (`results.py`, `outcomes.py`, `report.py`).

What is in the study is true for all workers, and a sweep keeps nothing else; what is in a cell's folder is its run's.
"""
