"""`python -m wit_trl sft …`: what `trl sft …` does, with weights."""

from __future__ import annotations

import sys

from wit_plugins.user_errors import report

_USAGE = """usage: python -m wit_trl sft --prompt_weight 0.2 [--response_weight 0.8] [everything that `trl sft` takes]

Supervised fine-tuning with TRL, with one weight for prompt tokens and one for response tokens.
`python -m wit_trl sft --help` lists all arguments; `--config FILE.yaml` reads them from a file.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if argv[0] != "sft":
        report(ValueError(f"{argv[0]!r} has no prompt and response weights; use `trl {argv[0]}`"), "wit_trl")
        return 2
    from wit_trl.sft import launch

    return launch(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
