"""``python -m capacity_planner``."""

import sys

from capacity_planner.cli import main

sys.exit(main())
