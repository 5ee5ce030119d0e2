"""`python -m mnist_cli`."""

import sys

from mnist_cli.cli import main

sys.exit(main())
