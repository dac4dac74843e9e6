"""Replaces itself by a program that gets SIGTERM when the process that started it dies: with_parent.py CMD..."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
