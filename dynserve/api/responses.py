"""The request of `/v1/responses`, without stored state: its conversion to a chat, and the response's constant fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynserve.api.chat import (
    MAX_TOOLS,
    AllowedSet,
    AllowedTools,
    CalledFunction,
    ChatRequest,
    ContentPart,
    Function,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolName,
)
from dynserve.api.fields import Count, Many, Request, StreamOptions, validated
from dynserve.errors import BadRequest


class Item(BaseModel):
    """A message, a call, the output of a call, or the reasoning of an earlier answer."""

    model_config = ConfigDict(extra="allow")
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Many[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Many[ContentPart] | None = None


class FlatTool(BaseModel):
    """A tool in the flat form of this API; chats nest the function."""

    model_config = ConfigDict(extra="allow")
    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamed(BaseModel):
    type: Literal["function"] = "function"
    name: str


class FlatAllowed(BaseModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Many[FlatNamed], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    format: TextFormat | None = None


class ReasoningOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(Request):
    refused: ClassVar[Mapping[str, str]] = {
        "previous_response_id": "this server stores nothing; send the whole conversation as input",
        "conversation": "this server stores nothing; send the whole conversation as input",
        "prompt": "this server stores no prompts; send instructions and input",
        "background": "wait for the answer, or stream it",
    }

    input: str | Annotated[Many[Item], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Many[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatAllowed | FlatNamed | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Many[str] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    priority: int | None = None
    metadata: dict[str, Any] | None = None
    # accepted and ignored
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    max_tool_calls: int | None = None

    def chat(self) -> ChatRequest:
        """The same request as a chat.

        Raises:
            BadRequest: an item or a tool has no meaning for a chat.
        """
        return validated(
            lambda: ChatRequest(
                model=self.model,
                messages=self._messages(),
                stream=self.stream,
                max_completion_tokens=self.max_output_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                logprobs=self._wants_logprobs() or None,
                top_logprobs=self.top_logprobs if self._wants_logprobs() else None,
                tools=[_tool(tool) for tool in self.tools] if self.tools else None,
                tool_choice=self._tool_choice(),
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=self._format(),
                reasoning_effort=self.reasoning.effort if self.reasoning else None,
                prompt_cache_key=self.prompt_cache_key,
                priority=self.priority,
            )
        )

    def frame(self) -> str:
        """The request's fields that a response repeats, as JSON. Raises BadRequest for numbers that JSON does not have."""
        try:
            return json.dumps(self._repeated(), allow_nan=False)
        except ValueError as error:
            raise BadRequest(f"the request has a number that JSON does not allow: {error}") from error

    def _repeated(self) -> dict[str, Any]:
        choice = self.tool_choice
        tool_choice = choice.model_dump() if isinstance(choice, BaseModel) else choice
        text = self.text.model_dump(by_alias=True, exclude_none=True) if self.text else {}
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            "top_p": self.top_p,
            "truncation": "disabled",
        }

    def _wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        if self.instructions:
            messages.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        for at, item in enumerate(self.input):
            _add(messages, item, f"input.{at}")
        if not messages:
            raise BadRequest("input has no message", param="input")
        return messages

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if isinstance(choice, FlatNamed):
            return _named(choice)
        if isinstance(choice, FlatAllowed):
            allowed = AllowedSet(mode=choice.mode, tools=[_named(tool) for tool in choice.tools])
            return AllowedTools(type="allowed_tools", allowed_tools=allowed)
        return choice

    def _format(self) -> ResponseFormat | None:
        form = self.text.format if self.text else None
        if form is None:
            return None
        if form.type != "json_schema":
            return ResponseFormat(type=form.type)
        schema = JsonSchema(name=form.name, schema=form.schema_, strict=form.strict)
        return ResponseFormat(type="json_schema", json_schema=schema)


def _add(messages: list[Message], item: Item, where: str) -> None:
    """Appends an item to the messages. Consecutive calls become one message of the assistant."""
    match item.type or "message":
        case "message":
            if item.role is None or item.content is None:
                raise BadRequest(f"{where}: a message needs role and content", param=where)
            messages.append(Message(role=item.role, content=item.content))
        case "function_call":
            if not item.name or not item.call_id:
                raise BadRequest(f"{where}: a function_call needs name and call_id", param=where)
            function = CalledFunction(name=item.name, arguments=item.arguments or "{}")
            call = ToolCall(id=item.call_id, function=function)
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":
                last.tool_calls = last.tool_calls or []
                last.tool_calls.append(call)
            else:
                messages.append(Message(role="assistant", content=None, tool_calls=[call]))
        case "function_call_output":
            if item.output is None:
                raise BadRequest(f"{where}: a function_call_output needs output", param=where)
            messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
        case "reasoning":
            pass  # the reasoning of earlier turns is not part of the prompt
        case other:
            raise BadRequest(f"{where}: items of type {other!r} are not supported", param=where)


def _named(tool: FlatNamed) -> NamedTool:
    return NamedTool(function=NamedFunction(name=tool.name))


def _tool(tool: FlatTool) -> Tool:
    if tool.type != "function":
        raise BadRequest(f"tools of type {tool.type!r} are not supported; only function is", param="tools")
    if tool.name is None:
        raise BadRequest("tools: a function needs a name", param="tools")
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )  # fmt: skip
    return Tool(type="function", function=function)
