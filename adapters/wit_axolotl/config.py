"""The `wit:` block of an Axolotl configuration, and what it cannot stand beside. No Axolotl in here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, Field

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.contract.active import ActiveStrategies

PLUGIN = "wit_axolotl.WITPlugin"


class WITArgs(BaseModel):
    """The key that the plugin adds to Axolotl's schema; its content is checked by [`read_config`] before."""

    wit: dict[str, Any] | None = Field(
        default=None,
        json_schema_extra={"description": "Weights of prompt and response tokens (wit_plugins.WITConfig)."},
    )


def is_listed(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration has the plugin line.

    Raises:
        WITConfigError: if `plugins` is a text and not a list, whose letters Axolotl takes for names.
    """
    plugins = cfg.get("plugins") or []
    if isinstance(plugins, str):
        raise WITConfigError(f"plugins = {plugins!r}: Axolotl takes a list; write plugins: [{plugins}]")
    return any(re.split("[.:]", str(name))[0] == "wit_axolotl" for name in plugins)  # module.Class or module:Class


def read_config(cfg: Mapping[str, Any]) -> WITConfig:
    """The settings of the weights in an Axolotl configuration as the user wrote it.

    Args:
        cfg (`Mapping`): the whole configuration, before Axolotl validates it.

    Raises:
        WITConfigError: if the block is missing or wrong, or stands beside an option under which the weights could not
            be exact. Names the key, its value and the way out.
    """
    values = cfg.get("wit")
    if not values:
        raise WITConfigError(
            f"wit: the plugin {PLUGIN} is on, but there is no wit: block; add\n"
            "    wit:\n      prompt_weight: 0.4\n      response_weight: 0.6\n"
            "or take the plugin line out to train without weights"
        )
    config = WITConfig.parse(plain(values), "wit")
    ActiveStrategies(config.active_strategies())  # finds strategies that do not exist or refuse their options
    for key, refused, reason in _REFUSALS:
        value = cfg.get(key)
        if refused(value):
            raise WITConfigError(f"{key} = {_shown(value)}: {reason}")
    for name in cfg.get("plugins") or []:
        for part, reason in _REFUSED_PLUGINS.items():
            if part in str(name):
                raise WITConfigError(f"plugins: {name} {reason}")
    return config


class _NeedsThisPackage(float):
    """A number that cannot be unpickled where this package is missing."""


def require_where_unpickled(cfg: Any) -> None:
    """Make a configuration with a `wit:` block unreadable, once pickled, to a process that has not this package.

    Axolotl prints the ImportError of a plugin and trains on without it. Under Ray that happens in workers, whose
    environment may be another than the command's, which sends them the configuration.

    Args:
        cfg (`DictDefault`): the whole configuration, for which [`read_config`] has been called.
    """
    cfg["wit"]["prompt_weight"] = _NeedsThisPackage(cfg["wit"]["prompt_weight"])


def _true(value: Any) -> bool:
    return bool(value)


def _above_one(value: Any) -> bool:
    return value is not None and int(value) > 1


def _cuts_rows(value: Any) -> bool:
    return isinstance(value, Mapping) and _above_one(value.get("size"))


_NO_LOSS = "it would replace the weighted loss"
_CUTS_ROWS = (
    "Axolotl's context parallelism cuts the labels of a row and not their weights, and puts a count of its own in the "
    "place of the step's denominator, so the loss would not be exact; set it to 1"
)
_REFUSALS: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "train_on_inputs",
        _true,
        "then nothing is masked, so there is no prompt to weight; set it to false (wit decides how much the prompt "
        "counts: prompt_weight 1 and response_weight 1 train on everything alike)",
    ),
    ("rl", _true, "preference and reinforcement learning have no prompt and response weights; take wit out"),
    ("reward_model", _true, "a reward model has no prompt and response weights; take wit out"),
    ("process_reward_model", _true, "a reward model has no prompt and response weights; take wit out"),
    ("pretraining_dataset", _true, "pretraining has no prompt to weight; use datasets, or take wit out"),
    ("orpo_alpha", _true, f"{_NO_LOSS}; take it out"),
    (
        "use_dft",
        _true,
        f"{_NO_LOSS}; take it out, and set wit: strategies: [dft], which does the same",
    ),
    ("diffusion_lm", _true, f"{_NO_LOSS} (diffusion); take it or wit out"),
    (
        "use_eaft",
        _true,
        f"{_NO_LOSS}; take it out, and set wit: strategies: {{eaft: {{divisor: 1}}}}, which does the same (alpha and "
        "top_k are eaft_alpha and eaft_k)",
    ),
    (
        "chunked_cross_entropy",
        _true,
        "wit computes the loss chunk by chunk by itself, with less memory; take the option out",
    ),
    ("liger_use_token_scaling", _true, f"{_NO_LOSS}; take it out, and set wit: strategies: [dft], which does the same"),
    ("kd_trainer", _true, "knowledge distillation replaces the loss; take it or wit out"),
    ("context_parallel_size", _above_one, _CUTS_ROWS),
    ("sequence_parallel_degree", _above_one, _CUTS_ROWS),
    ("context_parallel", _cuts_rows, _CUTS_ROWS),
    ("tensor_parallel_size", _above_one, "a tensor-parallel head is not supported; set it to 1 and use FSDP"),
]
_REFUSED_PLUGINS = {
    "integrations.kd": "replaces the loss (knowledge distillation); take it or wit out",
    "integrations.diffusion": "replaces the loss (diffusion); take it or wit out",
    "integrations.hatchery": "trains on a remote service, past the trainer; take it or wit out",
}


def plain(values: Any) -> Any:
    """A block of Axolotl's configuration as what YAML made of it."""
    return values.to_dict() if hasattr(values, "to_dict") else values


def _shown(value: Any) -> str:
    return repr(plain(value))
