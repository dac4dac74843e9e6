"""One instance over several devices: process groups, worker processes, and commands sent to all of them."""
