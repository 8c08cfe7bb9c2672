"""The requests of `/v1/completions` and `/v1/embeddings`: one or many prompts, as text or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dynserve.api.fields import MAX_INT, MAX_N, AnswerFields, Many, Priority, Request
from dynserve.errors import BadRequest
from dynserve.text.preprocess import Preprocessor
from dynserve.wire.requests import pack_tokens

MAX_PROMPTS = 2048  # in one request
DEFAULT_TOKENS = 16  # OpenAI's default for this API
Prompts = str | Many[int] | Many[str] | Many[Many[int]]


class CompletionRequest(AnswerFields):
    refused: ClassVar[Mapping[str, str]] = {
        **AnswerFields.refused,
        "suffix": "these models continue a text, they do not fill gaps in it; put everything into the prompt",
    }

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens: 0 needs echo: true, because the answer would be empty", param="max_tokens")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise BadRequest(f"best_of must be at least n, which is {self.n or 1}", param="best_of")
            if self.stream and self.best_of > (self.n or 1):
                raise BadRequest("best_of cannot be streamed: the best is known only at the end", param="best_of")
        check_prompts(self.prompt, "prompt", (self.best_of or self.n or 1))

    def size(self) -> int:
        return prompts_size(self.prompt) * (self.best_of or self.n or 1) + self.schema_size()


class EmbeddingRequest(Request):
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    user: str | None = None
    priority: Priority | None = None
    # fields of generation requests, which an embedding request does not have
    cache_salt: ClassVar[str | None] = None
    prompt_cache_key: ClassVar[str | None] = None

    def bounds_answer(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        check_prompts(self.input, "input", 1)

    def size(self) -> int:
        return prompts_size(self.input)


def check_prompts(prompts: Prompts, field: str, times: int) -> None:
    """Raises BadRequest for prompts that are empty, or too many."""
    if prompts in ("", []):
        raise BadRequest(f"the {field} is empty", param=field)
    count = len(listed(prompts))
    if count * times > MAX_PROMPTS:
        raise BadRequest(f"{count * times} answers in one request; at most {MAX_PROMPTS} are possible", param=field)


def listed(prompts: Prompts) -> Sequence[str | list[int]]:
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [prompts]
    return prompts


def prompts_size(prompts: Prompts) -> int:
    """The approximate number of characters to tokenise, with a constant per prompt. Token ids count as an eighth each."""
    return sum(50 + (len(prompt) if isinstance(prompt, str) else len(prompt) // 8) for prompt in listed(prompts))


def packed_prompts(
    prompts: Prompts, field: str, preprocessor: Preprocessor, max_seq_len: int, owner: str = ""
) -> list[bytes]:
    """Returns the token ids of each prompt, as little-endian u32. `owner`: see `Segments.encode`.

    Raises:
        BadRequest: a prompt has no tokens, or ids that the model does not have.
        ContextTooLong: a prompt has over twice the tokens of the context.
    """
    out = []
    several = len(listed(prompts)) > 1
    for at, prompt in enumerate(listed(prompts)):
        where = f"{field}.{at}" if several else field
        ids = (
            preprocessor.tokenize(prompt, max_context=max_seq_len, owner=owner, param=field)
            if isinstance(prompt, str)
            else prompt
        )
        if not ids:
            raise BadRequest(f"{where} is empty", param=field)
        if not isinstance(prompt, str) and not (min(ids) >= 0 and max(ids) < preprocessor.vocab_size):
            raise BadRequest(f"{where}: token ids must be between 0 and {preprocessor.vocab_size - 1}", param=field)
        out.append(pack_tokens(ids))
    return out
