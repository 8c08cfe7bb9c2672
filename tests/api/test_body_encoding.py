from __future__ import annotations

import gzip
import json
import zlib

import httpx
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dynserve.api.body_encoding import check_media_type, coding_of, decompress
from dynserve.cluster import Cluster
from dynserve.errors import BadRequest, BodyTooLarge, UnsupportedMediaType
from tests.conftest import MODEL

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello " * 20}], "max_tokens": 2}).encode()


def bare_deflate(content: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return encoder.compress(content) + encoder.flush()


def zstd_frames(content: bytes) -> bytes:
    half = len(content) // 2
    encoder = zstandard.ZstdCompressor(write_content_size=False)
    return encoder.compress(content[:half]) + encoder.compress(content[half:])


def gzip_members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


ENCODERS = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("gzip", gzip.compress),
    "gzip members": ("gzip", gzip_members),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress),
    "zstd frames": ("zstd", zstd_frames),
}


@pytest.mark.parametrize("name", ENCODERS)
@given(content=st.binary(max_size=3000))
def test_a_body_comes_back_as_it_was(name: str, content: bytes) -> None:
    coding, encode = ENCODERS[name]
    assert decompress(encode(content), coding, 3000) == content


@pytest.mark.parametrize("name", ENCODERS)
def test_a_body_that_decodes_to_more_than_its_bound_is_refused(name: str) -> None:
    coding, encode = ENCODERS[name]
    assert len(decompress(encode(bytes(1 << 20)), coding, 1 << 20)) == 1 << 20
    with pytest.raises(BodyTooLarge, match="the decoded body is larger than 1,048,575 bytes"):
        decompress(encode(bytes(1 << 20)), coding, (1 << 20) - 1)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_damaged_or_incomplete_body_is_refused(name: str) -> None:
    coding, encode = ENCODERS[name]
    whole = encode(BODY)
    for broken in (whole[:-3], b"{}", b"\x00" * 40):
        with pytest.raises(BadRequest, match=f"the body is not valid {coding}"):
            decompress(broken, coding, 1 << 20)


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_a_body_of_very_many_parts_is_refused(name: str) -> None:
    coding, encode = ENCODERS[name]
    assert decompress(encode(b"x") * 60, coding, 1 << 20) == b"x" * 60
    with pytest.raises(BadRequest, match="it has over 64"):
        decompress(encode(b"x") * 70, coding, 1 << 20)


@pytest.mark.parametrize("name", ["deflate", "bare deflate"])
def test_nothing_may_follow_a_deflated_body(name: str) -> None:
    coding, encode = ENCODERS[name]
    with pytest.raises(BadRequest, match="something follows its end"):
        decompress(encode(BODY) + b"x", coding, 1 << 20)


def test_other_encodings_are_refused_with_those_that_are_accepted() -> None:
    assert coding_of({}) == coding_of({"content-encoding": "identity"}) == ""
    assert coding_of({"content-encoding": " GZip "}) == "gzip"
    for name in ("br", "gzip, gzip", "compress"):
        with pytest.raises(UnsupportedMediaType, match="send one of gzip, deflate, zstd") as raised:
            coding_of({"content-encoding": name})
        assert raised.value.headers == (("accept-encoding", "gzip, deflate, zstd"),)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
def test_json_has_several_media_types(kind: str) -> None:
    check_media_type({"content-type": kind, "origin": "http://x"})


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": ""},
        {"origin": "http://evil.example"},  # a Blob without a type, which a page may send without being asked
    ],
)
def test_what_a_web_page_may_send_unasked_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(UnsupportedMediaType, match="send the body as application/json"):
        check_media_type(headers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/messages/count_tokens"])
async def test_compressed_bodies_and_media_types_over_http(path: str) -> None:
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as cluster, cluster.client() as client:

        async def status(content: bytes, **headers: str) -> httpx.Response:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.post(path, content=content, headers=fields)

        for coding, encode in ENCODERS.values():
            sent = await status(encode(BODY), content_encoding=coding, content_type="application/json")
            assert sent.status_code == 200, sent.text
        assert (await status(BODY)).status_code == 200
        assert (await status(b"messages=x")).status_code == 415
        assert (await status(BODY, content_type="text/plain")).status_code == 415
        refused = await status(b"x", content_encoding="br", content_type="application/json")
        assert refused.status_code == 415 and refused.headers["accept-encoding"] == "gzip, deflate, zstd"
        broken = await status(b"x", content_encoding="gzip", content_type="application/json")
        assert broken.status_code == 400
        bomb = await status(gzip.compress(bytes(9 << 20)), content_encoding="gzip", content_type="application/json")
        assert bomb.status_code == 413 and cluster.frontends[0].health()["status"] == "healthy"
