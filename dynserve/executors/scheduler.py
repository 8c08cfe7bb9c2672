"""Continuous batching: the scheduler selects the tokens of each sequence that the next engine step computes.

The states of a sequence, and the events that change them:

    WAITING ──admitted──────────────▶ RUNNING ──last token──────▶ DONE
       │  ▲                           │  │  ▲
       │  └──preempted: no free block─┘  │  └──fetched, or fetch failed─┐
       │                                 └──prefill done──▶ HELD ──hand-off ended──▶ DONE
       └──admitted with a hand-off──▶ FETCHING ─────────────────────────┘

Synchronous, and used only by the thread that steps the engine. `schedule` plans a step, the model computes it, and
`commit` records its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from enum import Enum, auto
from typing import Any, NamedTuple

from dynserve.errors import DynserveError
from dynserve.executors.base import Output
from dynserve.executors.kv_blocks import BlockManager
from dynserve.wire.hashing import extend, next_hash, seed_for
from dynserve.wire.requests import GenerateRequest, TokenLogprob, pack_tokens, unpack_tokens


class SequenceState(Enum):
    WAITING = auto()
    FETCHING = auto()  # its KV cache is being transferred from the prefill worker
    RUNNING = auto()
    HELD = auto()  # prefill done, blocks kept for the decode worker
    DONE = auto()


class Sequence:
    """One request in the engine. `tokens` is the prompt and all generated tokens; KV exists for the first `computed`."""

    __slots__ = (
        "accounted",
        "adjustments",
        "admitted",
        "admitted_at",
        "arrived",
        "blocks",
        "cached_tokens",
        "computed",
        "ends",
        "fetch",
        "given",
        "hashes",
        "matcher",
        "memo",
        "pooled",
        "prefill_s",
        "prompt_len",
        "prompt_logprobs",
        "queue_s",
        "request",
        "reused",
        "seed",
        "state",
        "ticket",
        "tokens",
        "transfer_s",
        "whole",
    )  # fmt: skip

    def __init__(self, ticket: int, request: GenerateRequest, block_size: int, eos: frozenset[int], now: float) -> None:
        self.ticket, self.request, self.arrived = ticket, request, now
        prior = request.prior_tokens
        self.tokens = [*unpack_tokens(request.prompt), *prior]
        self.prompt_len = len(self.tokens) - len(prior)
        self.given = len(self.tokens)  # tokens that were not generated here
        # a grammar ends with an end-of-turn token, also with ignore_eos
        own: frozenset[int] = frozenset() if request.stop.ignore_eos and request.grammar is None else eos
        # a set, since every token is checked against it
        self.ends = own.union(request.stop.token_ids) if request.stop.token_ids else own
        self.seed = seed_for(request.cache_salt)
        packed = request.prompt + pack_tokens(prior) if prior else request.prompt
        self.hashes = extend([], packed, block_size, self.seed)
        self.blocks: list[int] = []
        self.computed = self.reused = 0  # `reused`: tokens that were in the cache when it was admitted
        self.cached_tokens = request.prior.cached_tokens if request.prior else 0
        self.fetch = request.handoff is not None  # at most once; a failed or preempted fetch is computed here instead
        self.admitted = self.accounted = False
        self.state = SequenceState.WAITING
        self.queue_s = self.transfer_s = self.prefill_s = self.admitted_at = 0.0
        # every prompt position yields a result, so none may come from the cache
        self.whole = request.needs_whole_prompt and request.prior is None
        # used by the code that computes steps
        self.memo: int | None = None
        self.adjustments: Any = None
        self.matcher: Any = None
        self.pooled: Any = None
        self.prompt_logprobs: list[TokenLogprob] = []

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len


class Slice(NamedTuple):
    """A slice of one sequence: `size` tokens from `start`. With `samples`, the last of them yields the next token."""

    sequence: Sequence
    start: int
    size: int
    samples: bool


class BlockFetch(NamedTuple):
    """The blocks to fill from a hand-off: the owner's block `skip + i` goes into our `blocks[i]`."""

    sequence: Sequence
    blocks: list[int]
    skip: int


class Sampled(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None = None
    embedding: bytes = b""  # instead of the token, for a request with `pooling`
    error: DynserveError | None = None  # instead of the token, and the sequence's end


class Scheduler:
    """Schedules at most `max_batch_size` sequences and `max_num_tokens` tokens a step; first come, first served.

    When blocks run out, the sequence admitted last releases its blocks and waits at the head of the queue. Its generated
    tokens are kept, and computed again like a prompt (mostly from the prefix cache).
    """

    def __init__(
        self, blocks: BlockManager, *, max_batch_size: int, max_num_tokens: int, max_seq_len: int, chunked: bool
    ) -> None:
        self.blocks = blocks
        self.max_batch_size, self.max_num_tokens, self.max_seq_len = max_batch_size, max_num_tokens, max_seq_len
        self._chunked = chunked
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.fetching: dict[int, Sequence] = {}
        self.held: dict[int, Sequence] = {}
        self.preemptions = 0
        self._fetches: list[BlockFetch] = []

    @property
    def idle(self) -> bool:
        """Whether a step has nothing to compute: fetching and held sequences wait for other workers."""
        return not self.waiting and not self.running

    @property
    def begun_tokens(self) -> int:
        """The number of tokens computed already of unfinished prompts."""
        # after a preemption less may be cached than before
        computing = [s for s in self.running if len(s.tokens) == s.given and s.request.handoff is None]
        return sum(max(0, s.computed - s.reused) for s in computing)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Removes the sequence in any state. Blocks that a fetch writes to stay allocated until `fetched` is called."""
        if sequence.state is SequenceState.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.HELD:
            del self.held[sequence.ticket]
        elif sequence.state is SequenceState.FETCHING:
            sequence.state = SequenceState.DONE
            return
        self._finish(sequence)

    def fetched(self, sequence: Sequence, seconds: float, *, ok: bool) -> None:
        """Ends the transfer of a sequence. After a failure the prompt is computed here, after its cached prefix."""
        del self.fetching[sequence.ticket]
        if sequence.state is SequenceState.DONE:  # aborted meanwhile
            self._finish(sequence)
            return
        sequence.state = SequenceState.RUNNING
        sequence.transfer_s = seconds
        self.running.append(sequence)
        handoff = sequence.request.handoff
        if ok and handoff is not None:
            before, sequence.computed = sequence.computed, handoff.num_tokens
            self._seal(sequence, before)

    def release_held(self, ticket: int) -> None:
        """Releases the blocks of a prefill whose hand-off has ended."""
        if (sequence := self.held.pop(ticket, None)) is not None:
            self._finish(sequence)

    def drain_fetches(self) -> list[BlockFetch]:
        fetches, self._fetches = self._fetches, []
        return fetches

    def schedule(self, now: float) -> list[Slice]:
        """Returns the next step's work: running sequences first, then as many waiting ones as fit."""
        budget = self.max_num_tokens
        work: list[Slice] = []
        preempted = self.preemptions
        # decodes go before chunked prefills: a long prompt must not stall the answers beside it
        for sequence in sorted(self.running, key=_prefilling):
            if budget == 0:
                break
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted by a sequence before it
            count = self._share(sequence, budget)
            if count and self._grow(sequence, sequence.computed + count):
                work.append(self._slice(sequence, count))
                budget -= count
        while self.waiting and budget and len(self.running) + len(self.fetching) < self.max_batch_size:
            sequence = self.waiting[0]
            if not self._admit(sequence, budget, now):
                break
            self.waiting.popleft()
            if sequence.state is SequenceState.RUNNING:
                count = self._share(sequence, budget)
                work.append(self._slice(sequence, count))
                budget -= count
        if self.preemptions != preempted:
            work = [slice_ for slice_ in work if slice_.sequence.state is SequenceState.RUNNING]
        return work

    def ahead(self, work: Seq[Slice]) -> list[Slice]:
        """Returns the step after `work` before `work` is committed: each sequence continues with the token that it is about
        to sample. Empty where a decision or a token is needed first, such as the token that a grammar continues from. A
        sequence that ends with a sampled token is computed in vain, and `commit` skips it."""
        if self._fetches or any(not s.samples for s in work) or len(work) < len(self.running):
            return []
        if self.waiting and len(self.running) + len(self.fetching) < self.max_batch_size:
            return []
        continuing = [s for s in work if s.sequence.state is SequenceState.RUNNING and not self._ends_with(s)]
        if any(s.sequence.matcher is not None for s in continuing):
            return []
        lacking = [max(0, self._blocks_for(s.start + s.size + 1) - len(s.sequence.blocks)) for s in continuing]
        if not self.blocks.can_allocate(sum(lacking)):
            return []
        for slice_, number in zip(continuing, lacking, strict=True):
            if number:
                slice_.sequence.blocks += self.blocks.allocate(number)
        return [Slice(s.sequence, s.start + s.size, 1, True) for s in continuing]

    def _ends_with(self, slice_: Slice) -> bool:
        """Whether the token that this slice yields is its sequence's last, whichever it is."""
        sequence, length = slice_.sequence, slice_.start + slice_.size + 1
        request = sequence.request
        if request.phase == "prefill" or request.pooling is not None:
            return True
        return length - sequence.prompt_len >= request.stop.max_tokens or length >= self.max_seq_len

    def max_steps(self, work: Seq[Slice], steps: int) -> int:
        """Returns how many decode-only steps like `work` there are blocks for, to commit them at once; at most `steps`."""
        while steps > 1 and not self.blocks.can_allocate(sum(self._lacking(s.sequence, steps) for s in work)):
            steps //= 2
        return steps

    def commit(self, work: Seq[Slice], sampled: Seq[Seq[Sampled]], now: float = 0.0) -> list[tuple[Sequence, Output]]:
        """Records a step that ended at `now`. `sampled[i]` is the new token of `work[i]` if that slice samples, or the
        tokens of as many steps as `max_steps` allowed: only the last may end its sequence."""
        outputs: list[tuple[Sequence, Output]] = []
        for slice_, new in zip(work, sampled, strict=True):
            sequence, more = slice_.sequence, max(0, len(new) - 1)
            if sequence.state is not SequenceState.RUNNING:
                continue  # the slice was begun before the step that ended its sequence
            if more:
                sequence.blocks += self.blocks.allocate(self._lacking(sequence, len(new)))
                sequence.tokens += [token.token_id for token in new[:-1]]
            before, sequence.computed = sequence.computed, slice_.start + slice_.size + more
            self._seal(sequence, before)
            if slice_.samples and new:
                if len(sequence.tokens) == sequence.given and sequence.request.handoff is None:
                    sequence.prefill_s = now - sequence.admitted_at
                output = self._advance(sequence, new[-1])
                if more:
                    output.token_ids = [*(token.token_id for token in new[:-1]), *output.token_ids]
                outputs.append((sequence, output))
        return outputs

    def check(self) -> None:
        """Raises AssertionError when a block has no holder, or the wrong number of holders."""
        self.blocks.check()
        holders = [*self.running, *self.fetching.values(), *self.held.values()]
        held = {block for sequence in holders for block in sequence.blocks}
        assert len(held) == self.blocks.num_blocks - self.blocks.free, "blocks are held without a holder"
        assert all(sequence.state is SequenceState.RUNNING for sequence in self.running)
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence holds blocks"

    def _share(self, sequence: Sequence, budget: int) -> int:
        want = len(sequence.tokens) - sequence.computed
        # Without chunks a long remainder waits for a step of its own.
        if want > budget and not self._chunked and budget < self.max_num_tokens:
            return 0
        return min(want, budget)

    def _slice(self, sequence: Sequence, count: int) -> Slice:
        end = sequence.computed + count
        return Slice(sequence, sequence.computed, count, end == len(sequence.tokens))

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Allocates blocks for `tokens` tokens, preempting the sequences admitted last. Returns False if it is one."""
        need = self._blocks_for(tokens) - len(sequence.blocks)
        while need > 0 and not self.blocks.can_allocate(need):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if need > 0:
            sequence.blocks += self.blocks.allocate(need)
        return True

    def _admit(self, sequence: Sequence, budget: int, now: float) -> bool:
        # at least one token is always computed: it is the one that yields the next
        reusable = sequence.hashes[: (len(sequence.tokens) - 1) // self.blocks.block_size]
        if sequence.whole and not sequence.generated:
            reusable = []
        overlap = self.blocks.overlap(reusable)
        remainder = len(sequence.tokens) - overlap * self.blocks.block_size
        if not sequence.fetch and not self._chunked and remainder > budget < self.max_num_tokens:
            return False
        need = self._blocks_for(len(sequence.tokens)) - overlap
        # one spare block while others run, or the newcomer would be preempted by the next step
        spare = 1 if self.running else 0
        if not self.blocks.can_allocate(need + spare, reusable[:overlap]):
            return False
        sequence.blocks = self.blocks.acquire(reusable[:overlap])
        sequence.blocks += self.blocks.allocate(need)
        sequence.computed = overlap * self.blocks.block_size
        if not sequence.admitted:
            sequence.admitted = True
            sequence.admitted_at = now
            sequence.queue_s = now - sequence.arrived
            sequence.reused = sequence.computed
            if not sequence.generated:
                sequence.cached_tokens = sequence.computed
        handoff = sequence.request.handoff
        if sequence.fetch and handoff is not None:
            sequence.fetch = False
            sequence.state = SequenceState.FETCHING
            self.fetching[sequence.ticket] = sequence
            ours = sequence.blocks[overlap : self._blocks_for(handoff.num_tokens)]
            self._fetches.append(BlockFetch(sequence, ours, overlap))
        else:
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        if not sequence.generated:
            sequence.prompt_logprobs, sequence.pooled = [], None
        sequence.state = SequenceState.WAITING
        self.waiting.appendleft(sequence)

    def _seal(self, sequence: Sequence, before: int) -> None:
        """Names the blocks that became full between `before` and `computed` tokens."""
        size = self.blocks.block_size
        first, end = before // size, sequence.computed // size
        if first == end:
            return
        hashes = sequence.hashes
        while len(hashes) < end:
            at = len(hashes) * size
            block = pack_tokens(sequence.tokens[at : at + size])
            hashes.append(next_hash(hashes[-1] if hashes else None, block, sequence.seed))
        self.blocks.seal(sequence.blocks, first, hashes[first:end])

    def _advance(self, sequence: Sequence, new: Sampled) -> Output:
        stop, first = sequence.request.stop, not sequence.generated
        ended = new.token_id in sequence.ends
        if new.error is not None:
            output = Output([], error=new.error)
        elif new.embedding:
            output = Output([], "stop", embedding=new.embedding)
        elif stop.max_tokens == 0:
            output = Output([], "length")
        elif ended and (sequence.matcher is not None or sequence.generated >= stop.min_tokens):
            output = Output([], "stop", None, new.token_id)
        else:
            sequence.tokens.append(new.token_id)
            output = Output([new.token_id], None, None if new.logprob is None else [new.logprob])
            if sequence.generated >= stop.max_tokens or len(sequence.tokens) >= self.max_seq_len:
                output.reason = "length"
            elif sequence.request.phase == "prefill":
                output.reason = "handoff"
        if first and sequence.prompt_logprobs:
            output.logprobs = [*sequence.prompt_logprobs, *(output.logprobs or [])]
        if output.reason is not None or not sequence.accounted:
            sequence.accounted = True  # with the first output: a stop string may make it the last
            output.cached_tokens = sequence.cached_tokens
            output.queue_s, output.transfer_s = sequence.queue_s, sequence.transfer_s
            output.prefill_s = sequence.prefill_s
        if output.reason is not None or output.error is not None:
            self.running.remove(sequence)
            if output.reason == "handoff":
                sequence.state = SequenceState.HELD
                self.held[sequence.ticket] = sequence
            else:
                self._finish(sequence)
        return output

    def _finish(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.DONE
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        # they may be large, and are of no use to code that still refers to the sequence
        sequence.adjustments = sequence.matcher = None

    def _lacking(self, sequence: Sequence, steps: int) -> int:
        """Returns the number of blocks that the sequence lacks for `steps` more steps of decoding."""
        return max(0, self._blocks_for(sequence.computed + steps) - len(sequence.blocks))

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.blocks.block_size)


def _prefilling(sequence: Sequence) -> bool:
    return len(sequence.tokens) - sequence.computed > 1
