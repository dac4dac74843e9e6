"""``python -m capacity_planner``: see ``cli``."""

import sys

from capacity_planner.cli import main

sys.exit(main())
