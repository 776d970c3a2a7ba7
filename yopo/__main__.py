"""``python -m yopo``, as for ``torchrun -m yopo``: the same as the command ``yopo``."""

from __future__ import annotations

import sys

from yopo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
