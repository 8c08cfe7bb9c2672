"""`ModelText`: the model's tokenizer and chat template, as read from its folder once for all targets of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError

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
        except (ValueError, TypeError, KeyError, AttributeError, TemplateError) as error:
            raise ConfigError(
                f"--model-path {folder}: its tokenizer.json, tokenizer_config.json or chat template cannot be used: {error}"
            ) from error
