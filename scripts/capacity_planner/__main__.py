"""Runs the command line of ``scripts/plan``."""

import sys

from capacity_planner.cli import main

sys.exit(main())
