"""`dynserve deploy COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dynserve.config import exit_with, nearest
from dynserve.errors import ConfigError

COMMANDS = {
    "render": ("dynserve.deploy.render_command", "print a DynamoGraphDeployment's manifests for plain Kubernetes"),
    "local": ("dynserve.deploy.local", "run a DynamoGraphDeployment as processes on this machine"),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: dynserve deploy COMMAND FILE [options]\n\ncommands:")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:10} {what}")
        print("\n`dynserve deploy COMMAND --help` lists a command's options.")
        raise SystemExit(0 if arguments else 2)
    command = COMMANDS.get(arguments[0])
    if command is None:
        exit_with(ConfigError(f"unknown command deploy {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; see --help"))
    import_module(command[0]).main(arguments[1:])


if __name__ == "__main__":
    main()
