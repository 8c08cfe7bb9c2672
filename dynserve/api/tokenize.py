"""The requests of `/tokenize` and `/detokenize`, and their answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dynserve.api.chat import ChatRequest, Message, Tool
from dynserve.api.fields import Many, Request, TokenId, validated
from dynserve.errors import BadRequest
from dynserve.text.preprocess import Preprocessor


class TokenizeRequest(Request):
    """A request to tokenise a text, or a conversation as the chat template renders it."""

    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    tools: Many[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def check(self) -> None:
        super().check()
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("give either prompt or messages", param="prompt")

    def chat(self) -> ChatRequest:
        """The conversation as a chat request. Raises BadRequest for invalid messages."""
        kwargs = self.chat_template_kwargs
        return validated(
            lambda: ChatRequest(
                model=self.model, messages=self.messages or [], tools=self.tools, chat_template_kwargs=kwargs
            )
        )


class DetokenizeRequest(Request):
    tokens: Many[TokenId]
    skip_special_tokens: bool = False


def tokenized(request: TokenizeRequest, preprocessor: Preprocessor, max_seq_len: int, owner: str) -> dict[str, Any]:
    """The answer to `/tokenize`. Raises ContextTooLong for a text with more than twice the tokens of the context."""
    if request.prompt is not None:
        tokens = preprocessor.tokenize(
            request.prompt, special=request.add_special_tokens, max_context=max_seq_len, owner=owner
        )
    else:
        tokens = preprocessor.chat(request.chat().conversation(), max_seq_len, owner)[1]
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": max_seq_len, "tokens": tokens}
    if request.return_token_strs:
        found["token_strs"] = [preprocessor.tokenizer.id_to_token(id_) for id_ in tokens]
    return found


def detokenized(request: DetokenizeRequest, preprocessor: Preprocessor) -> str:
    """The text of the answer to `/detokenize`. Raises BadRequest for ids that the tokenizer does not have."""
    if request.tokens and max(request.tokens) >= preprocessor.vocab_size:
        raise BadRequest(f"token ids must be between 0 and {preprocessor.vocab_size - 1}", param="tokens")
    # a batch, even of one list: only a batch releases the interpreter's lock
    decoded = preprocessor.tokenizer.decode_batch([request.tokens], skip_special_tokens=request.skip_special_tokens)
    text: str = decoded[0]
    return text
