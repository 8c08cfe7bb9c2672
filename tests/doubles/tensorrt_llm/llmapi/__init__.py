from .._contract import OLD
from ..disaggregated_params import DisaggregatedParams  # noqa: F401
from ..executor.request import LoRARequest  # noqa: F401
from ..executor.utils import RequestError  # noqa: F401
from ..scheduling_params import SchedulingParams  # noqa: F401
from .llm_args import (  # noqa: F401
    CacheTransceiverConfig,
    CudaGraphConfig,
    KvCacheConfig,
    SchedulerConfig,
    TorchLlmArgs,
)

if not OLD:
    from ..scheduling_params import ConversationParams  # noqa: F401
