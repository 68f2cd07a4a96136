"""``python -m gpucnn``: the same as the command ``gpucnn``."""

import sys

from gpucnn.cli import main

sys.exit(main())
