"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dynserve.errors import BadRequest
from dynserve.openai.chat import ChatRequest, Message, Tool
from dynserve.openai.fields import Many, Request, TokenId, validated


class TokenizeRequest(Request):
    """A text, or a conversation as the chat template renders it."""

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
        """For a conversation; raises BadRequest for messages that are none."""
        kwargs = self.chat_template_kwargs
        return validated(
            lambda: ChatRequest(
                model=self.model, messages=self.messages or [], tools=self.tools, chat_template_kwargs=kwargs
            )
        )


class DetokenizeRequest(Request):
    tokens: Many[TokenId]
    skip_special_tokens: bool = False
