"""The limit of a process's open files, of which every connection is one."""

from __future__ import annotations

import resource
from contextlib import suppress

MAX_FILES = 1 << 20  # Linux' own bound; elsewhere the hard limit may be infinite, and cannot be set


def file_limit() -> int:
    """The number of files that this process may open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def raise_file_limit() -> int:
    """Raises the soft limit to the hard one, as far as the system allows, and returns it. Shells set the soft one to 1024
    for the sake of programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return file_limit()
