"""The `wit` command: see the weights before training, choose them after it.

Exit codes: 0, all is well; 1, a problem was found (`check`, `preview`) or a run failed (`sweep`); 2, the command line
or the configuration cannot be used; 130, interrupted.
"""

from wit_plugins.cli.main import main

__all__ = ["main"]
