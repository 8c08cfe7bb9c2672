"""`dynserve deploy COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dynserve.config import exit_with, nearest
from dynserve.errors import ConfigError

COMMANDS = {
    "render": ("FILE", "print a deployment's manifests for plain Kubernetes"),
    "local": ("FILE", "run a deployment as processes on this machine"),
    "status": ("[NAME]", "show what runs, here or on Kubernetes"),
    "scale": ("NAME COMPONENT=N", "set the replicas of components"),
    "logs": ("NAME", "print the output of a deployment's processes"),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: dynserve deploy COMMAND … [options]\n\ncommands:")
        for name, (argument, what) in COMMANDS.items():
            print(f"  {name + ' ' + argument:22} {what}")
        print("\nFILE is a DynamoGraphDeployment, or a cluster.yaml.", end="")
        print("\n`dynserve deploy COMMAND --help` lists a command's options.")
        raise SystemExit(0 if arguments else 2)
    command = arguments[0]
    if command not in COMMANDS:
        exit_with(ConfigError(f"unknown command deploy {command!r}{nearest(command, COMMANDS)}; see --help"))
    if command in ("render", "local"):
        import_module(f"dynserve.deploy.{'render_command' if command == 'render' else command}").main(arguments[1:])
    else:
        import_module("dynserve.deploy.operate").main(command, arguments[1:])


if __name__ == "__main__":
    main()
