"""``python -m glm_image_gateway``: see ``server``."""

from __future__ import annotations

import sys

from glm_image_gateway.server import main

sys.exit(main())
