#!/usr/bin/env bash
# One image with the command-line client.
set -euo pipefail

glm-image generate "A red fox reading a newspaper that says “NEWS”" \
  --url 127.0.0.1:8001 --size 256x256 --steps 20 --seed 42 -o command.png
