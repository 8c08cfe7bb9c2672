"""Block hashes, which identify KV blocks between workers, the router and other systems.

    local[i] = XXH3-64(tokens of full block i as little-endian u32)
    seq[0]   = local[0]
    seq[i]   = XXH3-64(seq[i-1] as LE u64 ‖ local[i] as LE u64)

with seed 1337. A rolling hash (`seq`) identifies a block together with everything before it. The partial block at the end
of a prompt has no hash. NVIDIA Dynamo's KV router publishes the same scheme, so that indexes interoperate. A salt (a
tenant, a LoRA adapter) changes the seed, so that equal tokens under different salts never share a block.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

SEED = 1337

_pair = struct.Struct("<QQ").pack


def seed_for(salt: str) -> int:
    """The seed for a salt; 1337 for an empty salt."""
    return xxh3_64_intdigest(salt.encode(), SEED) if salt else SEED


def adapter_salt(adapter: str, salt: str) -> str:
    """The salt for the blocks of a LoRA adapter, whose KV states differ from the model's for equal tokens."""
    return f"lora:{adapter}\0{salt}" if adapter else salt


def rolling_hashes(tokens: bytes, block_size: int, salt: str = "") -> list[int]:
    """Returns one hash per full block of `tokens`, each for the prefix up to the end of that block."""
    return extend([], tokens, block_size, seed_for(salt))


def extend(hashes: list[int], tokens: bytes, block_size: int, seed: int) -> list[int]:
    """Appends the hashes of the full blocks that `hashes` does not cover yet; returns `hashes`."""
    width, digest, pair = 4 * block_size, xxh3_64_intdigest, _pair
    end = len(tokens) - width + 1
    if not hashes and end > 0:
        hashes.append(digest(tokens[:width], seed))
    last = hashes[-1] if hashes else 0
    for at in range(width * len(hashes), end, width):  # `next_hash` inlined: half of a placement's time is spent here
        last = digest(pair(last, digest(tokens[at : at + width], seed)), seed)
        hashes.append(last)
    return hashes


def next_hash(parent: int | None, block: bytes, seed: int = SEED) -> int:
    """The rolling hash of one full block after `parent`."""
    local = xxh3_64_intdigest(block, seed)
    return local if parent is None else xxh3_64_intdigest(_pair(parent, local), seed)


def sequence_hash(tokens: bytes, salt: str = "") -> int:
    """The hash of a whole prompt, partial block included. A hand-off is checked against it."""
    return xxh3_64_intdigest(tokens, seed_for(salt))
