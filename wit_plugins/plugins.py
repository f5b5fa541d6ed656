"""The one plugin manager, and the strategies that are active in one run."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pluggy
import torch

from wit_plugins import hookspecs
from wit_plugins.config import did_you_mean
from wit_plugins.errors import WITConfigError

ENTRY_POINT_GROUP = "wit_plugins"

# Built-in strategies come in through the same door as everyone else's: a registered name.
DEFAULT_STRATEGIES = {
    "wit": "wit_plugins.strategies.wit",
    "dft": "wit_plugins.strategies.dft",
}
_HOOKS_OF_A_STRATEGY = ("static_weights", "dynamic_weights")


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The process's plugin manager, with the built-in strategies and all entry points of the group `wit_plugins`.

    With the environment variable `WIT_TRACE_HOOKS=1`, every hook call is printed to stderr.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    for name, module in DEFAULT_STRATEGIES.items():
        manager.register(importlib.import_module(module), name=name)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if manager.has_plugin(entry_point.name):
            continue
        try:
            plugin = entry_point.load()
        except Exception as error:  # one broken package must not stop runs that do not name it
            warnings.warn(
                f"wit_plugins: the plugin {entry_point.name!r} ({entry_point.value}) failed to import and is off: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            continue
        manager.register(plugin, name=entry_point.name)
    if os.environ.get("WIT_TRACE_HOOKS"):
        manager.add_hookcall_monitoring(_print_call, lambda *_: None)
    return manager


def _print_call(hook_name: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
    names = ", ".join(impl.plugin_name for impl in impls)
    print(f"wit_plugins: {hook_name}({', '.join(arguments)}) -> {names or 'nobody'}", file=sys.stderr)


def register(plugin: Any, name: str) -> None:
    """Register a strategy (a module or an object with hook implementations) under a name for this process.

    Packages use an entry point in the group `wit_plugins` instead, which also reaches every other process.

    Raises:
        WITConfigError: if the name is taken by another plugin.
    """
    manager = plugin_manager()
    if manager.get_plugin(name) is plugin:
        return
    if manager.has_plugin(name):
        raise WITConfigError(f"a strategy named {name!r} is registered already; choose another name")
    manager.register(plugin, name=name)


def strategy_names() -> list[str]:
    """Names of all registered strategies, sorted."""
    manager = plugin_manager()
    return sorted(
        name
        for name, plugin in manager.list_name_plugin()
        if plugin is not None and any(hasattr(plugin, hook) for hook in _HOOKS_OF_A_STRATEGY)
    )


class ActiveStrategies:
    """The strategies of one run, each with its own options; their weights are multiplied.

    Picklable, so that a collator that holds it can go to spawned data-loader workers.

    Args:
        options_by_name (`Mapping[str, Mapping]`): registered name to options.

    Raises:
        WITConfigError: for a name that is not registered, or options that the strategy refuses.
    """

    def __init__(self, options_by_name: Mapping[str, Mapping[str, Any]]):
        self.options_by_name = {name: dict(options) for name, options in options_by_name.items()}
        known = strategy_names()
        for name, options in self.options_by_name.items():
            if name not in known:
                raise WITConfigError(f"strategies: {name!r} is not a registered strategy{did_you_mean(name, known)}")
            try:
                self._caller(name, "validate_options")(options=options)
            except ValueError as error:
                raise WITConfigError(f"strategies: {name}: {error}") from error
        self._bind()

    def _bind(self) -> None:
        plugins = {name: plugin_manager().get_plugin(name) for name in self.options_by_name}
        self._static = {
            n: self._caller(n, "static_weights") for n, p in plugins.items() if hasattr(p, "static_weights")
        }
        self._dynamic = {
            n: self._caller(n, "dynamic_weights") for n, p in plugins.items() if hasattr(p, "dynamic_weights")
        }

    @staticmethod
    def _caller(name: str, hook: str) -> pluggy.HookCaller:
        # One strategy at a time, since each has options of its own.
        manager = plugin_manager()
        plugin = manager.get_plugin(name)
        return manager.subset_hook_caller(hook, remove_plugins=[p for p in manager.get_plugins() if p is not plugin])

    def static_weights(self, input_ids: np.ndarray, roles: np.ndarray, example: Mapping[str, Any]) -> np.ndarray:
        """The product of the strategies' static weights for one document, float32 `[T]`, 0 where the role is neither.

        Raises:
            ValueError: if a strategy returns the wrong shape, or weights that are negative or not finite.
        """
        weights = (roles != 0).astype(np.float32)
        for name, call in self._static.items():
            own = call(input_ids=input_ids, roles=roles, example=example, options=self.options_by_name[name])
            if own is None:
                continue
            own = np.asarray(own, dtype=np.float32)
            if own.shape != weights.shape:
                raise ValueError(f"strategy {name!r} returned weights of shape {own.shape} for {len(roles)} tokens")
            if not np.isfinite(own).all() or (own < 0).any():
                raise ValueError(f"strategy {name!r} returned weights that are negative or not finite")
            weights *= own
        return weights

    @property
    def has_dynamic_weights(self) -> bool:
        """Whether any strategy rescales weights on the device."""
        return bool(self._dynamic)

    def dynamic_weights(self, log_probs: torch.Tensor, roles: torch.Tensor) -> torch.Tensor | None:
        """The product of the strategies' factors, shaped like `log_probs` `[N]`, or `None` if there is none.

        Args:
            log_probs (`torch.Tensor`): detached log-probabilities of the targets, `[N]`, float32 or float64.
            roles (`torch.Tensor`): uint8 `[N]`.

        Raises:
            ValueError: if a strategy returns the wrong shape.
        """
        product: torch.Tensor | None = None
        for name, call in self._dynamic.items():
            factor = call(log_probs=log_probs, roles=roles, options=self.options_by_name[name])
            if factor is None:
                continue
            if factor.shape != log_probs.shape:
                raise ValueError(
                    f"strategy {name!r} returned factors of shape {tuple(factor.shape)} for {tuple(log_probs.shape)}"
                )
            factor = factor.detach().to(log_probs.dtype)
            product = factor if product is None else product * factor
        return product

    def __getstate__(self) -> dict[str, Any]:
        plugins = {name: plugin_manager().get_plugin(name) for name in self.options_by_name}
        # Modules do not pickle; their names do.
        refs = {n: p.__name__ if isinstance(p, types.ModuleType) else p for n, p in plugins.items()}
        return {"options_by_name": self.options_by_name, "plugins": refs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options_by_name = state["options_by_name"]
        for name, plugin in state["plugins"].items():
            # A spawned worker has the entry points, but not what the parent registered by hand.
            if not plugin_manager().has_plugin(name):
                register(importlib.import_module(plugin) if isinstance(plugin, str) else plugin, name)
        self._bind()
