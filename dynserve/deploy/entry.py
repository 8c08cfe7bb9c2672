"""`python -m dynamo.MODULE`: the command lines of Dynamo's users, run by dynserve.

The folder `path` holds a package `dynamo` with these modules. Where it is on PYTHONPATH, a wrapper script that was written
for Dynamo starts dynserve, unchanged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from dynserve.config import exit_with
from dynserve.deploy.flags import TABLES, translate
from dynserve.errors import ConfigError

PATH = Path(__file__).parent / "path"
# Dynamo's name of an address -> ours
_RENAMED = {"NATS_SERVER": "NATS_URL", "ETCD_ENDPOINTS": "ETCD_URL"}


def main(module: str) -> None:
    """Runs the role that `python -m dynamo.MODULE` stands for, with the process's arguments."""
    try:
        adopt(os.environ)
        if {"-h", "--help"} & set(sys.argv[1:]):
            _help(module)
        translation = translate(module, sys.argv[1:])
    except ConfigError as error:
        exit_with(error)
    for note in translation.notes:
        print(f"dynserve: dynamo.{module} {note}", file=sys.stderr)
    import_module(f"dynserve.{translation.role}.__main__").main(translation.arguments)


def _help(module: str) -> NoReturn:
    """Prints which flags are accepted, and what becomes of them."""
    print(f"usage: python -m dynamo.{module} [options]\n\nRuns dynserve. Options, and what they are in dynserve:")
    for flag, rule in TABLES[module].items():
        engine = f"engine option {rule.option}" if rule.option else "no meaning here"
        print(f"  {flag:36} {f'refused: {rule.refused}' if rule.refused else rule.flag or engine}")
    raise SystemExit(0)


def adopt(environ: MutableMapping[str, str]) -> None:
    """Sets our names of the servers' addresses where only Dynamo's are set."""
    for theirs, ours in _RENAMED.items():
        if environ.get(theirs):
            environ.setdefault(ours, environ[theirs])
