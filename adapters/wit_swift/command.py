"""`swift-wit`: ms-swift's command `swift` with the weights on.

Every sub-command is ms-swift's own. `sft` and `pt` with a `wit:` block in the YAML, or with `--wit_prompt_weight 0.2`
and its like on the command line, are too: the settings are taken out, and a plugin is added that attaches the weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.errors import WITError
from wit_plugins.user_errors import report

PROG, PREFIX = "swift-wit", "--wit_"
TRAINS = ("sft", "pt")


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        with tempfile.TemporaryDirectory(prefix="wit-") as folder:
            argv, settings = weighted_arguments(sys.argv[1:], Path(folder))
            if settings is not None:
                from wit_swift.versions import check_version

                check_version()
                os.environ["WIT_SWIFT"] = json.dumps(settings)
            sys.argv[1:] = argv
            from swift.cli.main import cli_main

            cli_main()
    except WITError as error:
        report(error, PROG)
        return 1
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def weighted_arguments(argv: Sequence[str], folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The arguments for `swift`, and the settings that were taken out of them; `None` if there are none.

    Args:
        argv (`Sequence[str]`): what stands behind `swift-wit`.
        folder (`Path`): for a configuration file without the block.

    Raises:
        WITConfigError: if a setting is wrong, or stands where it would not be read.
    """
    rest, settings = list(argv), dict[str, Any]()
    if len(rest) > 1 and Path(rest[1]).suffix in (".yaml", ".yml", ".json") and Path(rest[1]).is_file():
        values = yaml.safe_load(Path(rest[1]).read_text(encoding="utf-8"))
        if isinstance(values, dict) and "wit" in values:
            block = values.pop("wit")
            if not isinstance(block, dict):
                raise WITConfigError(
                    f"{rest[1]}: wit = {block!r} is no block of settings; write prompt_weight: 0.2 under it"
                )
            settings |= block
            path = folder / Path(rest[1]).with_suffix(".yaml").name
            path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
            rest[1] = str(path)
    kept: list[str] = []
    at = 0
    while at < len(rest):
        name, equals, value = rest[at].partition("=")
        if not name.startswith(PREFIX):
            kept.append(rest[at])
            at += 1
            continue
        if not equals:
            at += 1
            if at == len(rest) or rest[at].startswith("--"):
                raise WITConfigError(f"{name}: has no value; write {name} 0.2")
            value = rest[at]
        settings[name.removeprefix(PREFIX)] = yaml.safe_load(value)
        at += 1
    if not settings:
        return list(argv), None
    command = kept[0].replace("_", "-") if kept else "no sub-command"
    if command not in TRAINS:
        raise WITConfigError(f"{command}: weights are for {' and '.join(TRAINS)}; take them out of its configuration")
    WITConfig.parse(settings, "wit")  # a mistake is said before ms-swift and a model are loaded
    spec = importlib.util.find_spec("wit_swift")
    assert spec is not None
    assert spec.origin is not None
    return _with_plugin(kept, str(Path(spec.origin).parent / "external" / "plugin.py")), settings


def _with_plugin(argv: list[str], plugin: str) -> list[str]:
    """The arguments with one more external plugin: in the file, whose list the command line would replace."""
    if "--external_plugins" in argv:
        at = argv.index("--external_plugins")
        return [*argv[: at + 1], plugin, *argv[at + 1 :]]
    path = Path(argv[1]) if len(argv) > 1 else Path()
    if path.suffix == ".yaml" and path.is_file():
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        own = values.get("external_plugins") or []
        own = [own] if isinstance(own, str) else own
        return [*argv, "--external_plugins", *own, plugin]
    return [*argv, "--external_plugins", plugin]


if __name__ == "__main__":
    sys.exit(main())
