"""`llamafactory-wit`: `llamafactory-cli` with the weights on.

Every sub-command is LLaMA-Factory's own. `train` with a `wit:` block is too, launcher and all: only what its launcher
runs in the end is exchanged, in this process or, under torchrun, in every worker.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wit_llamafactory.refusals import check_arguments, check_version
from wit_plugins import WITConfigError
from wit_plugins.errors import WITError
from wit_plugins.foreign import exchanged
from wit_plugins.user_errors import report

PROG = "llamafactory-wit"


def main() -> int:
    """Run the command line; returns the exit code."""
    from llamafactory import cli
    from llamafactory.extras.misc import is_env_enabled

    try:
        if not _is_weighted(sys.argv[1:]):
            cli.main()
            return 0
        check_version()
        if is_env_enabled("USE_V1"):
            raise WITConfigError(
                "USE_V1 = 1: LLaMA-Factory's new engine is not supported yet; take USE_V1 out of the environment, or "
                "the wit block out of the configuration"
            )
        check_arguments({"use_mca": is_env_enabled("USE_MCA"), "use_kt": is_env_enabled("USE_KT")})
        _find_torchrun()
        with _weighted_launcher():
            cli.main()
    except WITError as error:
        report(error, PROG)
        return 1
    except subprocess.CalledProcessError as error:
        # torchrun has said which worker failed, and of what; LLaMA-Factory's call of it says nothing more.
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    return 0


def _find_torchrun() -> None:
    """Let LLaMA-Factory's launcher, which starts torchrun by its name, find the one of this environment.

    It is beside the interpreter, which the command itself was started with, whether or not the environment is active.
    """
    if shutil.which("torchrun") is None:
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def _is_weighted(argv: list[str]) -> bool:
    from wit_llamafactory.train import weighted_arguments

    return argv[:1] == ["train"] and weighted_arguments(argv[1:]) is not None


@contextmanager
def _weighted_launcher() -> Iterator[None]:
    """While it lasts, LLaMA-Factory's launcher runs `wit_llamafactory.train` where it would run itself.

    Under torchrun it starts its own file again in every worker, `__file__`; without, it imports `run_exp`.
    """
    from llamafactory import launcher
    from llamafactory.train import tuner

    from wit_llamafactory import train
    from wit_llamafactory.versions import require

    require(launcher.launch, "file_name=__file__", "from .train.tuner import run_exp\n", "run_exp()")
    run_exp = tuner.run_exp

    def weighted_run_exp() -> None:
        with exchanged(tuner, "run_exp", run_exp):
            train.train()

    with exchanged(launcher, "__file__", train.__file__), exchanged(tuner, "run_exp", weighted_run_exp):
        yield
