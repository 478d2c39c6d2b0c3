"""``python -m veneer`` runs the command line."""

from __future__ import annotations

import sys

from veneer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
