"""The encodings of a request's body: its media type, which must be JSON, and its compression."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import zstandard

from dynserve.errors import BadRequest, BodyTooLarge, UnsupportedMediaType

STEP = 1 << 20  # bytes that are decompressed at a time
MAX_FRAMES = 64  # of one body: each copies the bytes behind it
MAX_WINDOW = 8 << 20  # bytes of memory that a zstd frame may ask for; RFC 9659 allows clients no more
ACCEPTED = "gzip, deflate, zstd"


def check_media_type(headers: Mapping[str, str]) -> None:
    """Accepts JSON, and a body without a type. A web page can send any other type to a server on this machine without being
    asked by the browser whether it may; and one without a type too, but then its browser names the page's origin.

    Raises:
        UnsupportedMediaType: the body is of another type, or comes from a web page and has none.
    """
    given = headers.get("content-type")
    if given == "application/json" or (given is None and "origin" not in headers):
        return
    kind = (given or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        named = f"is {kind[:100]!r}" if given else "is missing"
        raise UnsupportedMediaType(f"the Content-Type {named}: send the body as application/json")


def coding_of(headers: Mapping[str, str]) -> str:
    """Returns the name of the body's compression, empty for none. Raises UnsupportedMediaType for one that is not known."""
    given = headers.get("content-encoding", "").strip().lower()
    name = {"identity": "", "x-gzip": "gzip"}.get(given, given)
    if name and name not in _DECODERS:
        raise UnsupportedMediaType(
            f"the Content-Encoding {name[:100]!r} is not supported: send one of {ACCEPTED}, or none",
            headers=(("accept-encoding", ACCEPTED),),
        )
    return name


def decompress(content: bytes | bytearray, coding: str, max_bytes: int) -> bytearray:
    """Returns the decoded body. Its cost is bounded by `max_bytes`, however well the body was compressed.

    Raises:
        BodyTooLarge: the decoded body has over `max_bytes` bytes.
        BadRequest: the body is not in this coding, or is incomplete.
    """
    try:
        return _DECODERS[coding](bytes(content), max_bytes)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise BadRequest(f"the body is not valid {coding}: {error}") from error


def _inflate(content: bytes, out: bytearray, max_bytes: int, window: int) -> bytes:
    """Adds the decoded bytes to `out`, which may have `max_bytes`, and returns the bytes behind the compressed ones."""
    decoder = zlib.decompressobj(window)
    while not decoder.eof:
        part = decoder.decompress(content, STEP)
        content = decoder.unconsumed_tail
        if not part and not content and not decoder.eof:
            raise EOFError("it ends too early")
        out += part
        _check(len(out), max_bytes)
    return decoder.unused_data


def _gunzip(content: bytes, max_bytes: int) -> bytearray:
    out = bytearray()
    for _ in range(MAX_FRAMES):  # RFC 1952 allows several members
        content = _inflate(content, out, max_bytes, 16 + zlib.MAX_WBITS)
        if not content:
            return out
    raise EOFError(f"it has over {MAX_FRAMES} members")


def _deflate(content: bytes, max_bytes: int) -> bytearray:
    """Decodes zlib's format, which the name stands for, and the bare one, which some clients send under it."""
    try:
        rest = _inflate(content, out := bytearray(), max_bytes, zlib.MAX_WBITS)
    except zlib.error:
        rest = _inflate(content, out := bytearray(), max_bytes, -zlib.MAX_WBITS)
    if rest:
        raise EOFError("something follows its end")
    return out


def _unzstd(content: bytes, max_bytes: int) -> bytearray:
    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    reader, size = decoder.stream_reader(content, read_across_frames=True), 0
    while part := reader.read(STEP):
        size += len(part)
        _check(size, max_bytes)
    # it fits; only a whole frame's decoder can tell whether the frame is complete
    out = bytearray()
    for _ in range(MAX_FRAMES):
        frame = decoder.decompressobj()
        out += frame.decompress(content)
        if not frame.eof:
            raise EOFError("it ends too early")
        content = frame.unused_data
        if not content:
            return out
    raise EOFError(f"it has over {MAX_FRAMES} frames")


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BodyTooLarge(f"the decoded body is larger than {max_bytes:,} bytes")


_DECODERS: dict[str, Callable[[bytes, int], bytearray]] = {"gzip": _gunzip, "deflate": _deflate, "zstd": _unzstd}
