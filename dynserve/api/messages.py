"""The requests of Anthropic's `/v1/messages` and `count_tokens`, and their conversion to a chat request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dynserve.api.chat import (
    MAX_TOOLS,
    ChatRequest,
    Function,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolName,
)
from dynserve.api.fields import MAX_STOPS, Count, Many, Off, Request, StopString, validated
from dynserve.api.left_out import Part, named
from dynserve.errors import BadRequest


class Block(Part):
    extra_is_used: ClassVar[bool] = True  # blocks of other types have fields of their own
    type: str = "text"
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Many[Block] | None = None
    thinking: str | None = None


class Turn(Part):
    role: Literal["user", "assistant", "system"]
    content: str | Many[Block]


class MessageTool(Part):
    extra_is_used: ClassVar[bool] = True  # tools of other types have fields of their own
    type: str | None = None
    name: ToolName | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    @property
    def own(self) -> bool:
        """Whether the client runs the tool itself; Anthropic's server runs the others."""
        return self.type in (None, "custom")


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Off = False


class ThinkingOptions(Part):
    type: str  # disabled, or a way to reason
    budget_tokens: int | None = None  # accepted and ignored
    display: str | None = None


class OutputFormat(Part):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    format: OutputFormat | None = None
    effort: str | None = None


class CountRequest(Request):
    """The request of `count_tokens`; its fields are also those of `/v1/messages`."""

    refused: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "pass their tools in tools",
        "container": "omit it; this server runs no containers",
    }

    messages: Annotated[Many[Turn], Field(min_length=1)]
    system: str | Many[Block] | None = None
    tools: Annotated[Many[MessageTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None

    def chat(self) -> ChatRequest:
        """The same request as a chat.

        Raises:
            BadRequest: a block or a tool has no meaning for a chat.
        """
        return validated(lambda: ChatRequest.model_validate(self._fields()))

    def _fields(self) -> dict[str, Any]:
        messages: list[Message] = []
        if self.system:
            messages.append(Message(role="system", content=_text(self.system, "system")))
        for at, turn in enumerate(self.messages):
            messages += _turn(turn, f"messages.{at}")
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            # a last turn with the role assistant is the beginning of the answer
            "continue_final_message": messages[-1].role == "assistant" and not messages[-1].tool_calls,
        }
        if tools := [_tool(tool) for tool in self.tools or () if tool.own]:
            fields["tools"] = tools
        if self.tool_choice is not None:
            fields["tool_choice"] = self._choice(self.tool_choice)
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        # in Anthropic's API, reasoning is off unless the request enables it
        reasoning = self.thinking is not None and self.thinking.type != "disabled"
        fields["chat_template_kwargs"] = {"enable_thinking": reasoning}
        return fields

    def left_out(self) -> list[str]:
        found = [named(f"tools.{at}", tool.type) for at, tool in enumerate(self.tools or ()) if not tool.own]
        for turn in self.messages:
            found += [name for block in turn.content if isinstance(block, Block) for name in _left_out(block, turn)]
        return list(dict.fromkeys(found))

    @staticmethod
    def _choice(choice: ToolChoice) -> Any:
        if choice.type == "tool":
            if choice.name is None:
                raise BadRequest("tool_choice of type tool needs a name", param="tool_choice")
            return NamedTool(function=NamedFunction(name=choice.name))
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


class MessagesRequest(CountRequest):
    max_tokens: Count
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[Many[StopString], Field(max_length=MAX_STOPS)] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the older name of output_config.format
    metadata: dict[str, Any] | None = None  # accepted and ignored
    service_tier: str | None = None

    def _fields(self) -> dict[str, Any]:
        own = {
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "response_format": self._format(),
        }
        fields = super()._fields() | {name: value for name, value in own.items() if value is not None}
        if self.output_config is not None and self.output_config.effort:
            fields["chat_template_kwargs"]["reasoning_effort"] = self.output_config.effort
        return fields

    def _format(self) -> dict[str, Any] | None:
        form = (self.output_config.format if self.output_config else None) or self.output_format
        return None if form is None else {"type": "json_schema", "json_schema": {"schema": form.schema_}}


def _turn(turn: Turn, where: str) -> list[Message]:
    """Converts one turn. Tool results within it become separate messages."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    results, texts, calls = list[Message](), list[str](), list[dict[str, Any]]()
    beside_results = any(block.type == "tool_result" for block in turn.content)
    for at, block in enumerate(turn.content):
        match block.type:
            case "text":
                texts.append(block.text or "")
            case "tool_use":
                function = {"name": block.name or "", "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
                calls.append({"id": block.id, "function": function})
            case "tool_result":
                content = "" if block.content is None else _result(block.content)
                results.append(Message(role="tool", content=content, tool_call_id=block.tool_use_id))
            case "thinking" | "redacted_thinking":
                pass  # the reasoning of earlier turns is not part of the prompt
            case other if turn.role == "assistant":
                pass  # a tool that Anthropic's server has run, and what it returned
            case other if beside_results:  # something that a tool has read
                texts.append(_placeholder(other))
            case other:
                raise BadRequest(f"{where}.content.{at}: blocks of type {other!r} are not supported", param=where)
    if not texts and not calls:
        return results or [Message(role=turn.role, content="")]
    fields: dict[str, Any] = {"role": turn.role, "content": "".join(texts)}
    if calls:
        fields["tool_calls"] = calls
    return [*results, Message.model_validate(fields)]


def _result(content: str | list[Block]) -> str:
    """The text of a tool's result. Other blocks are named in it: a screenshot must not end the conversation."""
    if isinstance(content, str):
        return content
    return "".join([block.text if block.text is not None else _placeholder(block.type, block) for block in content])


def _placeholder(kind: str, block: Block | None = None) -> str:
    tool = (block.model_extra or {}).get("tool_name") if block is not None else None
    return f"[{kind}: {tool}]" if tool else f"[{kind} left out: this model reads text]"


def _left_out(block: Block, turn: Turn) -> list[str]:
    """The names of the blocks that are not part of the prompt; blocks that are refused are not among them."""
    if block.type == "tool_result" and isinstance(block.content, list):
        return [named("messages.content.content", inner.type) for inner in block.content if inner.text is None]
    known = block.type in ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
    return [] if known else [named("messages.content", block.type)]


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            raise BadRequest(f"{where}: blocks of type {block.type!r} are not supported", param=where)
    return "".join(block.text or "" for block in content)


def _tool(tool: MessageTool) -> Tool:
    if tool.name is None:
        raise BadRequest("tools: a tool needs a name", param="tools")
    return Tool(
        type="function",
        function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema),
    )
