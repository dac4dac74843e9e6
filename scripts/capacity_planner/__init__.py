"""How much a layout serves, worked out before it is bought: pictures a second, latency, memory of each card."""
