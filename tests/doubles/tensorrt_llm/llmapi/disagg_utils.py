import itertools
import time

MIN_GLOBAL_ID = 1 << 40
_counter = itertools.count()


def get_global_disagg_request_id(node_id: int, process_id: int = 0) -> int:
    if not (0 <= node_id < 256 and 0 <= process_id < 64):
        raise ValueError("node_id is in [0, 256), process_id in [0, 64)")
    millis = int(time.monotonic() * 1000) & ((1 << 39) - 1)
    number = (((millis << 8 | node_id) << 6) | process_id) << 10 | next(_counter) % 1024
    return MIN_GLOBAL_ID + number % ((1 << 63) - 1 - MIN_GLOBAL_ID)
