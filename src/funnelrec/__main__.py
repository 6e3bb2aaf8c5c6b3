"""The command line: `funnelrec` or `python -m funnelrec`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a mistake is one line on standard error and exit code 2 (`--debug` shows the traceback)."""
    from funnelrec.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
