"""The double's engine: dynserve's torch (or, for dummy weights, simulated) executor, one per attention-DP rank."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections import deque
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from dynserve.config import WorkerConfig
from dynserve.errors import DynserveError, HandoffError
from dynserve.executors.base import Output, open_executor
from dynserve.executors.transceiver import TcpTransceivers
from dynserve.wire.events import Cleared, KvEvent, Removed, Stored
from dynserve.wire.hashing import extend, seed_for
from dynserve.wire.requests import Handoff, TokenLogprob, pack_tokens, unpack_tokens

from . import _messages as m

log = logging.getLogger("TRT-LLM")

PARTIALS = 6  # partial blocks that are kept
SERVERS: list[Server] = []  # of this process, for tests that look at what an engine really holds


class Transceivers(TcpTransceivers):
    """A transfer that fails ends its request: this engine does not prefill instead."""

    def __init__(self, failed: Any) -> None:
        super().__init__()
        self._failed = failed

    def open(self, table: Any, store: Any, host: str) -> Any:
        return _Opened(super().open(table, store, host), self._failed)


class _Opened:
    def __init__(self, inner: Any, failed: Any) -> None:
        self._inner, self._failed = inner, failed

    async def __aenter__(self) -> Any:
        transceiver = await self._inner.__aenter__()
        fetch = transceiver.fetch

        async def strict(handoff: Handoff, blocks: list[int], skip: int) -> None:
            try:
                await fetch(handoff, blocks, skip)
            except HandoffError:
                self._failed(handoff.request_id)
                raise

        transceiver.fetch = strict
        return transceiver

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._inner.__aexit__(*exc)


class Server:
    def __init__(self, sock: socket.socket, *, thread: bool) -> None:
        self._sock, self._thread = sock, thread
        self._out: list[Any] = []
        self._live: dict[int, Live] = {}
        self._ranks: list[Rank] = []
        self._wake = asyncio.Event()
        self._crashed = ""
        SERVERS.append(self)

    @property
    def free_blocks(self) -> int:
        return sum(rank.engine.load().free_blocks for rank in self._ranks)

    @property
    def first(self) -> Rank:
        return self._ranks[0]

    def tokens_of(self, rank: Rank) -> int:
        return sum(len(live.tokens) for live in self._live.values() if live.rank is rank)

    async def run(self) -> None:
        self._sock.setblocking(False)
        loop = asyncio.get_running_loop()
        reader = asyncio.create_task(self._writes())
        try:
            async with AsyncExitStack() as stack:
                while (frame := await self._frame(loop)) is not None:
                    for message in m.decode_to_engine(frame):
                        match message:
                            case m.Setup():
                                await self._set_up(message, stack)
                            case m.Submit():
                                self._submit(message)
                            case m.Abort():
                                self._abort(message)
                            case m.Crash(text=text):
                                self._crash(text)
                            case m.Shutdown():
                                return
        finally:
            reader.cancel()
            self._sock.close()

    async def _frame(self, loop: asyncio.AbstractEventLoop) -> bytes | None:
        data = bytearray()
        size = 4
        while len(data) < size:
            try:
                got = await loop.sock_recv(self._sock, size - len(data))
            except OSError:
                return None
            if not got:
                return None
            data += got
            if size == 4 and len(data) == 4:
                size = 4 + struct.unpack("<I", data)[0]
        return bytes(data[4:])

    async def _writes(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            out, self._out = self._out, []
            if out:
                await loop.sock_sendall(self._sock, m.framed(out))

    def say(self, message: Any) -> None:
        self._out.append(message)
        self._wake.set()

    async def _set_up(self, setup: m.Setup, stack: AsyncExitStack) -> None:
        self.setup = setup
        try:
            for rank in range(setup.ranks):
                config = WorkerConfig(
                    model_path=setup.model,
                    executor=setup.executor,  # type: ignore[arg-type]
                    override_engine_args=json.dumps(setup.options),
                )
                transceivers = Transceivers(self._transfer_failed)
                opened = open_executor(config, f"double-{os.getpid()}-{id(self)}-{rank}", transceivers)
                engine = await stack.enter_async_context(opened)
                self._ranks.append(Rank(rank, engine, self))
        except DynserveError as error:
            self.say(m.Ready(0, 0, 0, str(error)))
            return
        limits = self._ranks[0].engine.limits
        self.say(m.Ready(limits.num_blocks, limits.block_size, limits.max_seq_len))

    def _crash(self, text: str) -> None:
        self._crashed = f"Event loop terminated with error: {text}"
        for live in list(self._live.values()):
            live.rank.engine.abort(live.ticket)
            live.end(m.Response(live.submit.id, error=self._crashed))

    def _submit(self, message: m.Submit) -> None:
        if error := self._crashed or self._refusal(message):
            self.say(m.Response(message.id, error=error))
            return
        rank = self._ranks[message.rank]
        live = self._live[message.id] = Live(message, rank, self)
        rank.know(live)
        try:
            live.ticket = rank.engine.submit(message.request, live.output)
        except DynserveError as error:
            live.end(m.Response(message.id, error=str(error)))

    def _refusal(self, message: m.Submit) -> str:
        """The real one wraps whatever the construction of a request raises, and delivers it to the reader."""
        left = self._ranks[0].engine.limits.max_seq_len - message.request.num_tokens
        if left <= 0:
            return f"`default_max_tokens` ({left}) must be greater than 0"
        return message.lora_error

    def _abort(self, message: m.Abort) -> None:
        live = self._live.get(message.id)
        if live is None:  # its last response was sent: the blocks of a context request stay where they are
            log.warning("request %d is finished and cannot be aborted", message.id)
            return
        if message.early:  # what an early abort of a generation request may do to the real one
            if self._thread:
                self.say(m.Fatal("the engine crashed: a generation request was aborted before its first response"))
            else:
                os.kill(os.getpid(), signal.SIGSEGV)
            return
        live.rank.engine.abort(live.ticket)
        live.end(m.Response(message.id, finish_reason="cancelled"))

    def _transfer_failed(self, name: str) -> None:
        for live in list(self._live.values()):
            if live.submit.request.id == name and live.submit.request.phase == "decode":
                live.rank.engine.abort(live.ticket)
                live.end(m.Response(live.submit.id, error="Error in kv cache transfer for generation requests"))

    def ended(self, live: Live) -> None:
        self._live.pop(live.submit.id, None)
        live.rank.tail(live)


class Live:
    """One request in the engine."""

    def __init__(self, submit: m.Submit, rank: Rank, server: Server) -> None:
        self.submit, self.rank, self._server = submit, rank, server
        request = submit.request
        prior = request.prior.token_ids if request.prior else []
        self.tokens = [*unpack_tokens(request.prompt), *prior]
        self.prompt_len = len(self.tokens) - len(prior)
        self.hashes: list[int] = []
        self.ticket = 0
        self._began = time.monotonic()
        self._response = m.Response(submit.id)
        if request.prior is not None:
            self._response.token_ids = list(request.prior.token_ids)
            self._response.logprobs = [_entry(entry) for entry in request.prior.logprobs]

    def output(self, output: Output) -> None:
        response, request = self._response, self.submit.request
        if output.error is not None:
            self.end(m.Response(self.submit.id, error=str(output.error)))
            return
        self.tokens += output.token_ids
        self.rank.grew(self)
        entries = output.logprobs or []
        if entries and len(entries) > len(output.token_ids):
            response.prompt_logprobs = [_entry(entry) for entry in entries[: self.prompt_len]]
            entries = entries[self.prompt_len :]
        response.token_ids += output.token_ids
        response.logprobs += [_entry(entry) for entry in entries]
        if output.cached_tokens or output.reason:
            response.cached_tokens = self.prompt_len if request.phase == "decode" else output.cached_tokens
        if output.reason is not None:
            self._last(output, response)
        elif self.submit.streaming and len(response.token_ids) >= self._server.setup.stream_interval:
            self._server.say(response)
            self._response = m.Response(self.submit.id)

    def end(self, response: m.Response) -> None:
        self._server.ended(self)
        self._server.say(response)

    def _last(self, output: Output, response: m.Response) -> None:
        request = self.submit.request
        response.finish_reason = output.reason or ""
        if output.stop_token is not None:
            if output.stop_token in request.stop.token_ids and output.stop_token != self.submit.end_id:
                response.stop_reason = output.stop_token
            elif self._server.setup.appends_eos:
                response.token_ids.append(output.stop_token)
                if request.sampling.logprobs is not None:
                    response.logprobs.append([(output.stop_token, 0.0, 1)])
        if self.submit.perf:
            now = time.monotonic()
            scheduled = self._began + output.queue_s
            transfer = (scheduled, scheduled + output.transfer_s) if output.transfer_s else (0.0, 0.0)
            response.times = [
                self._began, scheduled, scheduled + output.transfer_s + output.prefill_s, now, *transfer,
            ]  # fmt: skip
            size = self.rank.engine.limits.block_size
            reused = output.cached_tokens // size
            response.blocks = (reused, -(-self.prompt_len // size) - reused)
        if output.reason == "handoff":
            assert output.handoff is not None
            state = msgspec.msgpack.encode(output.handoff)
            response.disaggregated = m.Context(state, self.rank.number, f"tcp://127.0.0.1#{os.getpid()}")
            response.finish_reason = "length" if self._server.setup.appends_eos else "not_finished"
        self.end(response)


class Rank:
    """One KV cache: its engine, and its events and statistics in TensorRT-LLM's form."""

    def __init__(self, number: int, engine: Any, server: Server) -> None:
        self.number, self.engine, self._server = number, engine, server
        self._ids = 0
        self._iter = 0
        self._blocks: dict[int, tuple[list[int], str, str]] = {}
        self._stored: dict[int, int | None] = {}
        self._partials: deque[int] = deque()
        self._size = engine.limits.block_size
        self._events: list[bytes] = []
        for window in server.setup.windows:
            self._event({"type": "created", "num_blocks_per_cache_level": [engine.limits.num_blocks, 0]}, window)
        engine.listen_kv(self._changed)
        deliver = engine.deliver

        def delivered(result: Any) -> None:
            deliver(result)
            self._row(result)

        engine.deliver = delivered
        self._flush()

    def know(self, live: Live) -> None:
        self.grew(live)

    def grew(self, live: Live) -> None:
        """Names the blocks of what it has by now, so that events can tell their tokens."""
        seen = len(live.hashes)
        if len(live.tokens) // self._size <= seen:
            return
        seed = seed_for(live.submit.request.cache_salt)
        extend(live.hashes, pack_tokens(live.tokens), self._size, seed)
        for at in range(seen, len(live.hashes)):
            tokens = live.tokens[at * self._size : (at + 1) * self._size]
            self._blocks[live.hashes[at]] = (tokens, live.submit.salt, live.submit.lora)

    def tail(self, live: Live) -> None:
        """A partial block is told as stored when its request ends, and as removed some time later."""
        setup = self._server.setup
        full = len(live.tokens) // self._size
        tokens = live.tokens[full * self._size : -1]
        if not setup.partial or not tokens or (full and live.hashes[full - 1] not in self._stored):
            return
        parent = _theirs(live.hashes[full - 1]) if full else None
        hash_ = xxh3_64_intdigest(pack_tokens(tokens) + (parent or 0).to_bytes(8, "little"), 99)
        if hash_ in self._partials:
            return
        window = max(setup.windows)
        block = self._block(hash_, tokens, live.submit.salt)
        self._event({"type": "stored", "parent_hash": parent, "blocks": [block]}, window)
        self._partials.append(hash_)
        if len(self._partials) > PARTIALS:
            self._event({"type": "removed", "block_hashes": [self._partials.popleft()]}, window)
        self._flush()

    def _changed(self, events: list[KvEvent]) -> None:
        for window in self._server.setup.windows:
            for event in events:
                self._translate(event, window)
        for event in events:
            match event:
                case Stored(parent=parent, hashes=hashes):
                    for hash_ in hashes:
                        self._stored[hash_] = parent
                case Removed(hashes=hashes):
                    for hash_ in hashes:
                        self._stored.pop(hash_, None)
                        self._blocks.pop(hash_, None)
        self._flush()

    def _translate(self, event: KvEvent, window: int) -> None:
        other = 0 if window == max(self._server.setup.windows) else 0x5555
        match event:
            case Stored(parent=parent, hashes=hashes):
                known = [self._blocks.get(hash_, ([0] * self._size, "", "")) for hash_ in hashes]
                data: dict[str, Any] = {
                    "type": "stored",
                    "parent_hash": None if parent is None else _theirs(parent) ^ other,
                    "blocks": [
                        self._block(_theirs(hash_) ^ other, tokens, salt)
                        for hash_, (tokens, salt, _) in zip(hashes, known, strict=True)
                    ],
                }
                if known[0][2] and self._server.setup.token_hashes and not self._server.setup.v2:
                    data["lora_name"] = known[0][2]
                self._event(data, window)
            case Removed(hashes=hashes):
                self._event({"type": "removed", "block_hashes": [_theirs(hash_) ^ other for hash_ in hashes]}, window)
            case Cleared():
                raise AssertionError("the torch executor does not clear its cache")

    def _block(self, hash_: int, tokens: list[int], salt: str) -> dict[str, Any]:
        block = {
            "type": "stored_block",
            "block_hash": hash_,
            "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in tokens],
            "cache_level": 0,
            "priority": 35,
        }
        if self._server.setup.token_hashes:
            block["mm_keys"] = []
            if not self._server.setup.v2:
                block["cache_salt"] = salt or None
        return block

    def _event(self, data: dict[str, Any], window: int) -> None:
        event: dict[str, Any] = {"event_id": self._ids, "window_size": window, "data": data}
        if self._server.setup.attention_dp:
            event["attention_dp_rank"] = self.number
        groups: list[dict[str, Any]] = [{}]
        if self._server.setup.v2:  # which tells each block once for each group of layers
            groups = [{"hash_algo": "v1_block_key", "layer_group_id": group} for group in range(2)]
        for group in groups:
            self._events.append(json.dumps(event | group | {"event_id": self._ids}).encode())
            self._ids += 1

    def _flush(self) -> None:
        events, self._events = self._events, []
        if events:
            self._server.say(m.Rows(events=events))

    def _row(self, result: Any) -> None:
        setup = self._server.setup
        if not setup.stats or not (result.outputs or result.events):
            return
        self._iter += 1
        row = self.row()
        if setup.attention_dp and not setup.token_hashes:  # 1.2 writes the first rank's row, and names no rank
            if self.number:
                return
        elif setup.attention_dp:
            if self.number:  # a copy of rank 0's row, but for what is scheduled here
                own, row = row["inflightBatchingStats"], self._server.first.row()
                row["inflightBatchingStats"] = own
                row |= {"numQueuedRequests": 0, "numCompletedRequests": 0}
            row["attentionDpRank"] = self.number
        self._server.say(m.Rows(stats=[json.dumps(row).encode()]))

    def row(self) -> dict[str, Any]:
        load = self.engine.load()
        used = load.total_blocks - load.free_blocks
        batch = {
            "numScheduledRequests": load.running,
            "numContextRequests": 0,
            "numGenRequests": load.running,
            "numPausedRequests": 0,
            "numCtxTokens": 0,
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 1.0,
        }
        if self._server.setup.token_hashes:
            tokens = self._server.tokens_of(self)
            batch |= {"numCtxKvTokens": 0, "numGenKvTokens": tokens}
        return {
            "timestamp": "01-01-2026 00:00:00.000000",
            "iter": self._iter,
            "iterLatencyMS": 1.0,
            "numActiveRequests": load.running,
            "numQueuedRequests": load.waiting,
            "numCompletedRequests": 0,
            "gpuMemUsage": 1 << 30,
            "cpuMemUsage": 0,
            "pinnedMemUsage": 0,
            "kvCacheStats": {
                "maxNumBlocks": load.total_blocks,
                "freeNumBlocks": load.free_blocks,
                "usedNumBlocks": used,
                "tokensPerBlock": self._size,
                "allocTotalBlocks": used,
                "allocNewBlocks": used,
                "reusedBlocks": 0,
                "missedBlocks": 0,
                "cacheHitRate": 0.0,
            },
            "inflightBatchingStats": batch,
        }


def _theirs(hash_: int) -> int:
    """TensorRT-LLM's name of a block is another one than ours: unsigned, mostly beyond 2^63."""
    return xxh3_64_intdigest(hash_.to_bytes(8, "little"), 4242) | 1 << 63


def _entry(entry: TokenLogprob) -> list[tuple[int, float, int]]:
    found = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)}
    found.setdefault(entry.token_id, (entry.logprob, len(found) + 1))
    return [(token, logprob, rank) for token, (logprob, rank) in found.items()]


def main(sock: socket.socket, *, thread: bool = False) -> None:
    async def serve() -> None:
        await Server(sock, thread=thread).run()

    asyncio.run(serve())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
