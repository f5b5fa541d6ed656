"""The one plugin manager: which strategies and adapters are registered, and the checks before they are."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import pluggy

from wit_plugins.config import did_you_mean
from wit_plugins.contract import hookspecs
from wit_plugins.errors import WITConfigError

ENTRY_POINT_GROUP = "wit_plugins"

# Built-in strategies are registered by name, as everybody's are. A module is imported when its name is first asked for,
# since most runs name one or two.
DEFAULT_STRATEGIES = {
    "wit": "wit_plugins.strategies.wit",
    "dft": "wit_plugins.strategies.dft",
    "coba": "wit_plugins.strategies.coba",
    "deft": "wit_plugins.strategies.deft",
    "eaft": "wit_plugins.strategies.eaft",
    "fait": "wit_plugins.strategies.fait",
    "iw_sft": "wit_plugins.strategies.iw_sft",
    "masked_thought": "wit_plugins.strategies.masked_thought",
    "mftcoder": "wit_plugins.strategies.mftcoder",
    "mile": "wit_plugins.strategies.mile",
    "otr": "wit_plugins.strategies.otr",
    "power": "wit_plugins.strategies.power",
    "psft": "wit_plugins.strategies.psft",
    "qtuning": "wit_plugins.strategies.qtuning",
    "rho1": "wit_plugins.strategies.rho1",
    "spans": "wit_plugins.strategies.spans",
    "sstoken": "wit_plugins.strategies.sstoken",
    "talr": "wit_plugins.strategies.talr",
    "tl_training": "wit_plugins.strategies.tl_training",
    "unlikelihood": "wit_plugins.strategies.unlikelihood",
}
HOOKS_OF_A_STRATEGY = (
    "static_weights",
    "dynamic_weights",
    "select_tokens",
    "draw_targets",
    "replace_nll",
    "change_inputs",
    "sample_groups",
    "group_weights",
)


class _Manager(pluggy.PluginManager):
    """Checks a plugin before it is registered: mistakes that pluggy ignores are errors here.

    Built-in strategies are registered when they are first asked for by name.
    """

    def get_plugin(self, name: str) -> Any | None:
        """The plugin of a name, or `None`."""
        plugin = super().get_plugin(name)
        if plugin is None and name in DEFAULT_STRATEGIES:
            plugin = importlib.import_module(DEFAULT_STRATEGIES[name])
            self.register(plugin, name=name)
        return plugin

    def has_plugin(self, name: str) -> bool:
        """Whether a plugin has this name. Nothing is imported to find out."""
        return name in DEFAULT_STRATEGIES or super().has_plugin(name)

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a plugin.

        Raises:
            pluggy.PluginValidationError: if the plugin has no such hook, a misspelt one, one without `@hookimpl`,
                or one that names arguments that do not exist.
        """
        implemented = self._hooks_of(plugin)
        known = [hook for hook in vars(hookspecs) if getattr(vars(hookspecs)[hook], f"{self.project_name}_spec", None)]
        for hook, attribute in implemented.items():
            if hook not in known:
                self._refuse(plugin, f"{attribute} is marked as a hook, but there is none of this name", hook, known)
        for hook in known:
            if hook not in implemented and callable(getattr(plugin, hook, None)):
                self._refuse(plugin, f"{hook} is not marked, so it would never be called; put @hookimpl above it")
        if not implemented:
            self._refuse(plugin, f"it implements no hook; the hooks are {', '.join(known)}")
        try:
            return super().register(plugin, name)
        except pluggy.PluginValidationError:
            if self.is_registered(plugin):  # older versions of pluggy keep what they have just refused
                self.unregister(plugin)
            raise

    def _hooks_of(self, plugin: Any) -> dict[str, str]:
        """The hooks that a plugin implements: the hook's name, and the name of the function that implements it."""
        implemented = {}
        for attribute in dir(plugin):
            options = self.parse_hookimpl_opts(plugin, attribute)
            if options is not None:
                if options["hookwrapper"] or options["wrapper"]:
                    self._refuse(plugin, f"{attribute} is a wrapper; strategies are called one by one, without any")
                implemented[options["specname"] or attribute] = attribute
        return implemented

    def _refuse(self, plugin: Any, reason: str, name: str = "", known: Sequence[str] = ()) -> None:
        raise pluggy.PluginValidationError(plugin, reason + (did_you_mean(name, known) if name else ""))


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The process's plugin manager, with the built-in strategies and all entry points of the group `wit_plugins`.

    With the environment variable `WIT_TRACE_HOOKS=1`, every hook call is printed to stderr.
    """
    manager = _Manager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        where = f"wit_plugins: the plugin {entry_point.name!r} ({entry_point.value})"
        if manager.has_plugin(entry_point.name):
            if entry_point.value != DEFAULT_STRATEGIES.get(entry_point.name):
                warnings.warn(f"{where} is off: another plugin has its name", stacklevel=2)
            continue
        # A broken package must not stop a run that does not name it. A run that does is told that it is not registered.
        try:
            plugin = entry_point.load()
        except Exception as error:
            warnings.warn(f"{where} failed to import and is off: {type(error).__name__}: {error}", stacklevel=2)
            continue
        try:
            manager.register(plugin, name=entry_point.name)
        except (pluggy.PluginValidationError, ValueError) as error:
            warnings.warn(f"{where} is off: {error}", stacklevel=2)
    if traced():
        manager.add_hookcall_monitoring(
            lambda hook, impls, arguments: print_call(hook, [impl.plugin_name for impl in impls], arguments),
            lambda *_: None,
        )
    return manager


def traced() -> bool:
    """Whether every hook call is to be printed."""
    return bool(os.environ.get("WIT_TRACE_HOOKS"))


def print_call(hook: str, plugins: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Print a hook call, and the plugins that are called."""
    print(f"wit_plugins: {hook}({', '.join(arguments)}) -> {', '.join(plugins) or 'nobody'}", file=sys.stderr)


def register(plugin: Any, name: str) -> None:
    """Register a strategy (a module or an object with hook implementations) under a name for this process.

    Packages use an entry point in the group `wit_plugins` instead, which also reaches every other process.

    Raises:
        WITConfigError: if the name is taken by another plugin, or the plugin has no hook, a misspelt one, one that is
            not marked with `hookimpl`, or one that asks for arguments that do not exist.
    """
    manager = plugin_manager()
    if manager.get_plugin(name) is plugin:
        return
    if manager.has_plugin(name):
        raise WITConfigError(f"a strategy named {name!r} is registered already; choose another name")
    try:
        manager.register(plugin, name=name)
    except (pluggy.PluginValidationError, ValueError) as error:
        raise WITConfigError(f"the strategy {name!r} cannot be registered: {error}") from error


def strategy_names() -> list[str]:
    """Names of all strategies, built-in and registered, sorted."""
    hooks = plugin_manager().hook
    registered = {impl.plugin_name for name in HOOKS_OF_A_STRATEGY for impl in getattr(hooks, name).get_hookimpls()}
    return sorted(registered | DEFAULT_STRATEGIES.keys())
