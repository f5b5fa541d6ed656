"""`llamafactory-wit train` with two Ray workers on a machine without a GPU: `python ray_on_cpu.py cfg.yaml`."""

import sys

import ray
from llamafactory.train import tuner
from ray.util.placement_group import placement_group
from wit_llamafactory.command import main

# On a CPU LLaMA-Factory asks for ten times the cores that there are, and Ray's address from a dashboard.
worker = tuner.get_ray_remote_config_for_worker
tuner.get_placement_group = lambda count: (placement_group([{"CPU": 1}] * 2), {"CPU": 1})
tuner.get_ray_remote_config_for_worker = lambda **options: {**worker(**options), "num_cpus": 1}
sys.argv = ["llamafactory-wit", "train", sys.argv[1], f"master_addr={ray.util.get_node_ip_address()}"]
sys.exit(main())
