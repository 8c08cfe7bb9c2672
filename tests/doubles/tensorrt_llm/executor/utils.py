from .._contract import OLD


class RequestError(RuntimeError):
    """This request failed."""


if not OLD:

    class EngineDeadError(RuntimeError):
        """Sticky: a worker process died."""

        def __init__(self, root_cause: BaseException | None = None) -> None:
            text = "Engine has died"
            if root_cause is not None:
                text += f": {type(root_cause).__name__}: {root_cause}"
            super().__init__(text)
            self.root_cause = root_cause
