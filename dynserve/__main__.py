"""The command line: `python -m dynserve COMMAND`."""

from __future__ import annotations

import sys
from importlib import import_module

from dynserve.config import exit_with, nearest
from dynserve.errors import ConfigError

COMMANDS = {
    "up": ("dynserve.local.up", "start a whole cluster on this machine"),
    "frontend": ("dynserve.frontend.__main__", "the OpenAI server"),
    "worker": ("dynserve.worker.__main__", "one worker"),
    "doctor": ("dynserve.doctor.report", "check this machine: problems, and what to do about them"),
    "make-model": ("dynserve.local.make_model", "make a model with random weights, for work on speed"),
    "key": ("dynserve.frontend.keys_command", "make an API key"),
    "deploy": ("dynserve.deploy.__main__", "run a deployment file written for Dynamo"),
}


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m dynserve COMMAND [options]\n\ncommands:")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:10} {what}")
        print("\n`python -m dynserve COMMAND --help` lists a command's options.")
        raise SystemExit(0 if arguments else 2)
    command = COMMANDS.get(arguments[0])
    if command is None:
        exit_with(ConfigError(f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; see --help"))
    import_module(command[0]).main(arguments[1:])


if __name__ == "__main__":
    main()
