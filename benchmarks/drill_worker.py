"""A worker whose engine dies when the process gets SIGUSR1, for the drill of an engine's death. Its flags are those of
`python -m dynserve.worker`."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from dynserve.executors import engine
from dynserve.worker.__main__ import main


class MortalEngine(engine.Engine):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.fail, RuntimeError("SIGUSR1"))


if __name__ == "__main__":
    engine.Engine = MortalEngine  # type: ignore[misc]
    main()
