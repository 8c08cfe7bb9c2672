from .._contract import OLD, dataclass_of

LoRARequest = dataclass_of("LoRARequest", kw_only=False, slots=True)
if not OLD:
    DEFAULT_REQUEST_PRIORITY = 0.5


class GenerationRequest:
    """Not for users of the LLM API."""
