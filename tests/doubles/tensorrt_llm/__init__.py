"""A strict double of TensorRT-LLM's LLM API, put on the path by tests only.

It takes what `contract.json` (written from the API's page) lists and rejects the rest, and it answers with real tokens: its
engine is dynserve's own torch executor in another process, with its own KV transfer between two such engines. With
`TLLM_WORKER_USE_SINGLE_PROCESS=1` the engine is a thread instead. `TRTLLM_DOUBLE_VERSION=1.2.1` plays the older interface.
"""

from ._contract import VERSION as __version__  # noqa: F401
from ._triton import load_triton

load_triton()

from .disaggregated_params import DisaggregatedParams  # noqa: E402, F401
from .llmapi.llm import LLM  # noqa: E402, F401
from .sampling_params import SamplingParams  # noqa: E402, F401
