#!/usr/bin/env bash
# One image without a server: the command runs both engines itself.
set -euo pipefail

glm-image generate "A red fox reading a newspaper that says “NEWS”" \
  --offline --checkpoint checkpoints/tiny --device cpu --size 256x256 --steps 20 --seed 42 -o offline.png
