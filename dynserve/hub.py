"""Models by their Hugging Face id: found in the local cache, or downloaded into it.

`huggingface_hub` does the work, and reads HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE itself. Its locks
let two workers that start at the same time download a file once.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dynserve.config import UpConfig, WorkerConfig
from dynserve.errors import ConfigError
from dynserve.tasks import detached

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")  # owner/name, or owner/name@revision
# what frontends and workers read; other formats of the same weights are often several times as large
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
WEIGHTS = ("*.safetensors",)
IGNORED = ("original/*", "consolidated*", "*/*")
REPORT_EVERY = 5.0  # seconds between log lines of a download where there is no terminal

log = logging.getLogger(__name__)
Config = TypeVar("Config", WorkerConfig, UpConfig)


def is_id(name: str) -> bool:
    """Whether a model's name is a Hugging Face id, and no path that exists."""
    return ID.fullmatch(name) is not None and not Path(name).exists()


def model_name_of(name: str) -> str:
    """Returns an id without its revision: the name that clients use."""
    return name.partition("@")[0]


def model_folder(name: str, *, weights: bool = True) -> str:
    """Returns the folder of a model that is named by its id, downloaded if the cache does not have it. Blocks.

    `weights`: the simulated executor needs none.

    Raises:
        ConfigError: there is no such model, no access, no network or no room; one sentence says which.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    wanted: dict[str, Any] = {
        "repo_id": repository, "revision": revision or None, "ignore_patterns": list(IGNORED),
        "allow_patterns": [*SMALL_FILES, *(WEIGHTS if weights else ())],
    }  # fmt: skip
    try:
        return str(snapshot_download(**wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error
    log.info("model %s is not in the cache: it is downloaded", name)
    try:
        found = str(snapshot_download(**wanted, tqdm_class=None if sys.stderr.isatty() else _log_bar()))
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error
    log.info("model %s is downloaded", name)
    return found


async def with_model_folder(config: Config) -> Config:
    """Replaces a Hugging Face id by the model's folder, which is downloaded if necessary. Clients use the id as the name.

    Raises:
        ConfigError: there is no such model, no access, no network or no room.
    """
    if not is_id(config.model_path):
        return config
    name = config.served_model_name or model_name_of(config.model_path)
    folder = await detached(partial(model_folder, weights=config.executor != "simulated"), config.model_path)
    return replace(config, model_path=folder, served_model_name=name)


def _explained(name: str, error: Exception) -> ConfigError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__
    if isinstance(error, HFValidationError):
        what = "this is not an id of Hugging Face; expected owner/name or owner/name@revision"
    elif isinstance(error, GatedRepoError):
        what = "access is restricted: accept its terms on its page, and set HF_TOKEN to a token of that account"
    elif isinstance(error, RevisionNotFoundError):
        what = f"it has no revision {name.partition('@')[2] or 'main'!r}"
    elif isinstance(error, RepositoryNotFoundError):
        what = "there is no such model, or it is private and HF_TOKEN is not set to a token with access"
    elif isinstance(error, LocalEntryNotFoundError) and isinstance(cause, OfflineModeIsEnabled):
        what = "the cache does not have it, and HF_HUB_OFFLINE forbids a download"
    elif isinstance(error, LocalEntryNotFoundError):
        what = f"the cache does not have it, and the hub cannot be reached ({_first_line(cause or error)})"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        what = "there is no room for it on the disk of the cache; set HF_HOME to another one"
    else:
        what = f"it cannot be downloaded: {_first_line(error)}"
    return ConfigError(f"--model-path {name}: {what}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _log_bar() -> Any:
    """Returns a progress bar that writes log lines, for processes without a terminal."""
    from tqdm import tqdm

    class LogBar(tqdm):  # type: ignore[misc]  # tqdm has no annotations
        reported = time.monotonic()

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            now = time.monotonic()
            if self.unit == "B" and self.total and now - LogBar.reported >= REPORT_EVERY:
                LogBar.reported = now
                log.info("downloaded %.0f of %.0f MB", self.n / 1e6, self.total / 1e6)

    return LogBar
