"""The program: `mnist-cli`, or `python -m mnist_cli`."""

import sys

from mnist_cli.cli import main
from mnist_cli.signals import ignore_them


def program() -> int:
    """Run the command line of this process; its exit code, which no signal changes any more."""
    code = main()
    ignore_them()
    return code


if __name__ == "__main__":
    sys.exit(program())
