"""``python -m glm_image.plan``."""

import sys

from glm_image.plan.cli import main

sys.exit(main())
