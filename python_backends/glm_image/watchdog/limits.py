"""The limits and signals of the server's process, set before it starts."""

from __future__ import annotations

import ctypes
import resource
import signal

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Triton 2.51 parses nested JSON recursively, with some 300 bytes of stack a level: with the usual 8 MiB a request of
# 50 kB crashes the server, with this stack one of 1.6 MB does. Untouched stack takes no memory.
SERVER_STACK_BYTES = 256 * 1024 * 1024
MAX_DESCRIPTORS = 1 << 20
"""Some systems allow a billion, and programs exist that visit every descriptor they may have."""


def prctl(option: int, value: int) -> None:
    """Sets an option of this process that takes one value."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def stack_limit(soft: int, hard: int, address_space: int) -> int:
    """Returns the stack of the server's threads in bytes, from the present limits.

    Where the address space is limited, the stacks of its hundred threads would fill it: the limit stays as it is.
    """
    if address_space != resource.RLIM_INFINITY:
        return soft
    # With an unlimited stack glibc gives threads 2 MiB.
    stack = SERVER_STACK_BYTES if soft == resource.RLIM_INFINITY else max(soft, SERVER_STACK_BYTES)
    return stack if hard == resource.RLIM_INFINITY else min(stack, hard)


def descriptor_limit(soft: int, hard: int) -> int:
    """Returns the number of files and connections that the server may have open: the hard limit, up to a million."""
    allowed = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    return soft if soft != resource.RLIM_INFINITY and soft >= allowed else allowed


def prepare_server() -> None:
    """Runs in the server's process before exec: it dies with this process, and gets large stacks and many files."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_STACK, (stack_limit(soft, hard, address_space), hard))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor_limit(soft, hard), hard))
