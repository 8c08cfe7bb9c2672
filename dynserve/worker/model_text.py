"""`ModelText`: the model's tokenizer and chat template, as read from its folder once for all targets of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dynserve.errors import ConfigError
from dynserve.model_files import read_model_files
from dynserve.text.preprocess import Preprocessor


class ModelText(NamedTuple):
    files: dict[str, bytes]  # name -> content
    preprocessor: Preprocessor

    @staticmethod
    def read(folder: Path) -> ModelText:
        """Reads the files. Raises ConfigError if the tokenizer or the template is not usable."""
        files = read_model_files(folder)
        try:
            return ModelText(files, Preprocessor(files))
        except Exception as error:  # the libraries raise anything for invalid files
            raise ConfigError(
                f"--model-path {folder}: its tokenizer.json or tokenizer_config.json cannot be used: {error}"
            ) from error
