"""The limit of a process's open files, of which every connection is one."""

from __future__ import annotations

import resource
from contextlib import suppress

# more than any process needs; children may look at each number, and an infinite limit cannot be set
MAX_FILES = 1 << 20


def file_limit() -> int:
    """The number of files that this process may open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def raise_file_limit() -> int:
    """Raises the soft limit to the hard one, as far as the system allows, and returns it. Shells set the soft one to 1024
    for the sake of programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return file_limit()
