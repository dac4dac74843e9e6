"""``python -m glm_image.supervisor``: see ``cli``."""

from __future__ import annotations

import sys

from glm_image.supervisor.cli import main

sys.exit(main())
