"""The parts of a worker's card that depend on its model: the tool and reasoning parsers, and the pooling of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from dynserve.config import WorkerConfig
from dynserve.dialects import detect_reasoning, detect_tools
from dynserve.model_files import model_config
from dynserve.text.template import ChatTemplates


def answer_parsers(config: WorkerConfig, templates: ChatTemplates) -> tuple[str, str]:
    """Returns the names of the tool and reasoning parser, empty for none; `auto` detects them from the chat template."""
    tools, reasoning = config.tool_call_parser, config.reasoning_parser
    if tools == "auto":
        tools = detect_tools(templates.source(tools=True), model_config(Path(config.model_path)))
    if reasoning == "auto":
        reasoning = detect_reasoning(templates.source(tools=False))
    return "" if tools == "none" else tools, "" if reasoning == "none" else reasoning


def pooling(config: WorkerConfig) -> Literal["", "mean", "last"]:
    """Returns how embeddings are pooled, empty for no embeddings. `auto` reads the folder's sentence-transformers
    configuration; without one it is the mean."""
    if config.pooling == "none":
        return ""
    if config.pooling != "auto":
        return config.pooling
    path = Path(config.model_path) / "1_Pooling" / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return "mean"
    return "last" if isinstance(found, dict) and found.get("pooling_mode_lasttoken") else "mean"
