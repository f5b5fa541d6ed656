"""One active strategy: its hooks, its options, and what its hooks are marked with."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy

from wit_plugins.contract.plugins import HOOKS_OF_A_STRATEGY, plugin_manager, print_call, traced
from wit_plugins.errors import WITConfigError

Options = Mapping[str, Any] | Sequence[Any]
RAW_ARGUMENT = "raw_example"  # of a `static_weights` that is called while the framework tokenises
TEXT_ARGUMENTS = frozenset({"tokenizer", "text", "offsets"})  # of hooks that are called with a document
ON_TOKENS = ("dynamic_weights", "select_tokens")  # called with the predicted tokens of a micro-batch
CONCENTRATION = -1  # stands among the numbers of tokens that entropies are of for Σ p² over all tokens


class Strategy:
    """One active strategy: its own hooks, its options, and nobody who could answer in its place."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        manager = plugin_manager()
        self.plugin = manager.get_plugin(name)
        self._hooks: dict[str, pluggy.HookImpl] = {}
        for hook in ("validate_options", "find_spans", "logged_spans", *HOOKS_OF_A_STRATEGY):
            for impl in getattr(manager.hook, hook).get_hookimpls():
                if impl.plugin is self.plugin:
                    self._hooks[hook] = impl

    def has(self, hook: str) -> bool:
        """Whether the strategy implements a hook."""
        return hook in self._hooks

    def call(self, hook: str, **arguments: Any) -> Any:
        """The result of a hook, called with the arguments that it names; `None` without one."""
        impl = self._hooks.get(hook)
        if impl is None:
            return None
        if traced():
            print_call(hook, [self.name], arguments)
        arguments["options"] = self.options
        return impl.function(*(arguments[name] for name in impl.argnames))

    def asks_for(self, argument: str) -> bool:
        """Whether one of its hooks names an argument."""
        return any(argument in impl.argnames for impl in self._hooks.values())

    def mark(self, hook: str, name: str) -> Any:
        """What a hook's function is marked with, by the decorators beside the hooks; `None` without."""
        return getattr(self._hooks[hook].function, name, None) if hook in self._hooks else None

    @property
    def reads_raw(self) -> bool:
        """Whether its `static_weights` reads the example as it is before tokenisation."""
        impl = self._hooks.get("static_weights")
        return impl is not None and RAW_ARGUMENT in impl.argnames

    @property
    def code(self) -> str:
        """A hash of the code of its `static_weights`: what was prepared by other code is told by it.

        It is of the file that the hook stands in, and where that is in a package, of the files beside it. Without a
        file (in a notebook) it is of the compiled function alone.
        """
        function = inspect.unwrap(self._hooks["static_weights"].function)
        function = getattr(function, "__func__", function)
        digest = hashlib.sha256()
        file = Path(inspect.getfile(function))
        in_package = bool(getattr(sys.modules.get(function.__module__), "__package__", None))
        for path in sorted(file.parent.glob("*.py")) if in_package else [file]:
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        if not file.is_file():
            digest.update(repr((function.__code__.co_code, function.__code__.co_names)).encode())
            digest.update(repr([c for c in function.__code__.co_consts if not inspect.iscode(c)]).encode())
        return digest.hexdigest()[:16]

    @property
    def per_token(self) -> bool:
        """Whether it may be asked for some tokens at a time."""
        mark = self.mark("dynamic_weights", "wit_per_token")
        if isinstance(mark, tuple):
            option, default = mark
            mark = not (self.options.get(option, default) if isinstance(self.options, Mapping) else default)
        return bool(mark) and not self.has("select_tokens")

    @property
    def top_k(self) -> int | None:
        """Of how many most likely tokens its `topk_entropy` is; `None` if it does not ask for it.

        Raises:
            WITConfigError: if nothing says so, or the option that does is no number of tokens.
        """
        if not self.asks_for("topk_entropy"):
            return None
        marks = [mark for hook in ON_TOKENS if (mark := self.mark(hook, "wit_top_k")) is not None]
        if not marks:
            raise WITConfigError(
                f"strategies: {self.name}: asks for topk_entropy and does not say of how many tokens; put "
                "@entropy_of_top(20) above it"
            )
        default, option = marks[0]
        k = self.options.get(option, default) if isinstance(self.options, Mapping) else default
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise WITConfigError(f"strategies: {self.name}: {option} = {k!r}: is a whole number of tokens, at least 2")
        return k

    @property
    def share(self) -> float:
        """The share of the tokens that it keeps, for the denominator; 1 if it does not say.

        Raises:
            WITConfigError: if the option that says so is no share.
        """
        mark = self.mark("select_tokens", "wit_share")
        if mark is None:
            return 1.0
        option, default, _ = mark
        share = self.options.get(option, default) if isinstance(self.options, Mapping) else None
        if share is None:
            raise WITConfigError(f"strategies: {self.name}: {option} is required: a share above 0 and at most 1")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise WITConfigError(f"strategies: {self.name}: {option} = {share!r}: is a share above 0 and at most 1")
        return float(share)

    @property
    def reference(self) -> str | None:
        """The folder of scores that it compares with; `None` for the model without its adapter.

        Raises:
            WITConfigError: if the option that says so is no folder's name.
        """
        options = [mark for hook in ON_TOKENS if (mark := self.mark(hook, "wit_reference")) is not None]
        folder = self.options.get(options[0]) if options and isinstance(self.options, Mapping) else None
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise WITConfigError(
                f"strategies: {self.name}: {options[0]} = {folder!r}: is the name of a folder that `wit score` wrote"
            )
        return folder

    @property
    def anchor_model(self) -> str | None:
        """The model that it holds the trained one near; `None` for the model without its adapter.

        Raises:
            WITConfigError: if the option that says so is no name.
        """
        option = self.mark("anchor_weight", "wit_anchor_model")
        name = self.options.get(option) if option and isinstance(self.options, Mapping) else None
        if name is not None and (not isinstance(name, str) or not name):
            raise WITConfigError(f"strategies: {self.name}: {option} = {name!r}: is the path or the name of a model")
        return name

    @property
    def renewed_every(self) -> int | None:
        """After how many steps the model of its `snapshot_log_probs` is renewed; `None` if it does not ask for them.

        Raises:
            WITConfigError: if nothing says so, or the option that does is no number of steps.
        """
        if not self.asks_for("snapshot_log_probs"):
            return None
        marks = [mark for hook in ON_TOKENS if (mark := self.mark(hook, "wit_snapshot")) is not None]
        if not marks:
            raise WITConfigError(
                f"strategies: {self.name}: asks for snapshot_log_probs and does not say after how many steps they are "
                'renewed; put @snapshot_every("renew_steps", default=8) above it'
            )
        option, default = marks[0]
        steps = self.options.get(option, default) if isinstance(self.options, Mapping) else default
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise WITConfigError(
                f"strategies: {self.name}: {option} = {steps!r}: is a whole number of optimizer steps, at least 1"
            )
        return steps

    @property
    def shares_each_response(self) -> bool:
        """Whether that share is of each document's response tokens, rounded up, so that what is kept can be counted."""
        mark = self.mark("select_tokens", "wit_share")
        return mark is not None and bool(mark[2])
