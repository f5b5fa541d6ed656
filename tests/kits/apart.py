"""Processes of a test's own, several ranks among them, which have the frameworks imported when they start.

They are forked from one process in which nothing but imports has run (Python's fork server), since importing is what
costs: ten seconds of a processor for a framework, where what a rank then does takes one. What is started is a function
of a test's module and not the text of a script, and nothing that it patches outlives it.

Ranks get the variables and the store that torchrun gives its own. What torchrun and accelerate do before is not shown
by these tests, but by those of each framework's command line, and by the `ranks` session.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import ProcessException, start_processes

# Those that are not installed are passed over.
_IMPORTED = ["pytest", "datasets", "peft", "transformers.trainer", "trl.trainer.sft_trainer"]
_IMPORTED += ["axolotl.cli.main", "axolotl.cli.train", "axolotl.core.builders", "llamafactory.train.tuner"]


class Failed(Exception):
    """A process did not end well: the traceback of the first that did not, and what was printed."""


def apart(function: Callable[..., Any], *args: Any) -> str:
    """Run a function of a module in a process of its own; what it printed.

    Raises:
        Failed: if it raised, or its process ended in another way.
    """
    return _start(function, args, [{}])


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> str:
    """The same on so many ranks of this machine. When one of them fails, the others are ended."""
    # The launcher holds the store, as torchrun does, so that no port has to be guessed.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return _start(function, args, [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)])


def _start(function: Callable[..., Any], args: tuple[Any, ...], variables: list[dict[str, Any]]) -> str:
    multiprocessing.set_forkserver_preload(_IMPORTED)
    method = multiprocessing.get_start_method()
    environments = [{**os.environ, **{key: str(value) for key, value in own.items()}} for own in variables]
    with TemporaryDirectory() as folder:
        failed = ""
        try:
            given = (function, args, environments, method, folder)
            start_processes(_run, given, nprocs=len(variables), start_method="forkserver")
        except ProcessException as error:
            failed = str(error)
        printed = "".join(file.read_text(errors="replace") for file in sorted(Path(folder).iterdir()))
    if failed:
        raise Failed(f"{printed[-6000:]}\n{failed}")
    return printed


def _run(
    index: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environments: list[dict[str, str]],
    method: str,
    folder: str,
) -> None:
    with open(os.path.join(folder, str(index)), "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()  # the fork server's own is of when it was started
    os.environ.update(environments[index])
    multiprocessing.set_start_method(method, force=True)  # of data loaders' workers; it would be the fork server's
    gc.freeze()  # what was imported is no garbage, which the frameworks look for in every run
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
