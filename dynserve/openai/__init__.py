"""The APIs on both ends: requests in (one module each, then `order`), bytes out (`render`, `parsers`, `formats`)."""
