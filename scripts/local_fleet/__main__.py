"""``python -m local_fleet``: see ``cli``."""

from __future__ import annotations

import sys

from local_fleet.cli import main

sys.exit(main())
