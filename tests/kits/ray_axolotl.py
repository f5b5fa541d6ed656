"""`axolotl train` under Ray on a machine without a GPU: a script that takes the command's arguments.

    python ray_axolotl.py HIDDEN train config.yaml --use-ray --ray-num-workers 2

Axolotl asks Ray for workers with a GPU each. Ray's GPUs are numbers that it is told, so it is told two. What still asks
for one is answered where it asks which device there is: the process group is gloo's, and `OnCPU` says where the model
is. What starts the workers, sends them the configuration and trains there is Axolotl's and Ray's own. HIDDEN is a
module that workers do not find, as if it were not installed where they run, or empty.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from axokit import UseCPU


class OnCPU(UseCPU):
    """An Axolotl plugin; of a worker's plugins the first that is asked, before accelerate is."""

    def register(self, cfg: Any) -> None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # Ray writes the number of its GPU there


def main(hidden: str, *arguments: str) -> None:
    """Start Ray on this machine, then the command."""
    import ray
    import ray.train.torch
    from axolotl.cli.main import cli

    def hide() -> None:
        sys.modules[hidden] = None  # type: ignore[assignment]

    os.environ["CUDA_VISIBLE_DEVICES"] = "-1,-1"  # that Ray hands out, and are none
    runtime_env = {"worker_process_setup_hook": hide} if hidden else None
    resources: dict[str, Any] = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 10**8}
    ray.init("local", include_dashboard=False, runtime_env=runtime_env, **resources)
    trainer = ray.train.torch.TorchTrainer
    gloo = ray.train.torch.TorchConfig("gloo")  # with GPUs it would be NCCL, which newer releases of Axolotl name

    def with_gloo(*args: Any, **kwargs: Any) -> Any:
        return trainer(*args, **{**kwargs, "torch_config": gloo})

    ray.train.torch.TorchTrainer = with_gloo
    cli.main([*arguments], prog_name="axolotl")


if __name__ == "__main__":
    main(*sys.argv[1:])
