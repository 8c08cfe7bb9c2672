"""The request of `/v1/responses`, without stored state: its conversion to a chat, and the response's constant fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dynserve.api.chat import (
    MAX_TOOLS,
    AllowedSet,
    AllowedTool,
    AllowedTools,
    CalledCustom,
    CalledFunction,
    ChatRequest,
    ContentPart,
    Custom,
    Function,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
    ToolName,
)
from dynserve.api.fields import Count, JsonSchema, Many, Priority, Request, ResponseFormat, StreamOptions, validated
from dynserve.api.left_out import Part, named
from dynserve.errors import BadRequest
from dynserve.wire.requests import ToolName as WireToolName

MAX_NAME = 256  # characters of a tool's name with its namespace
SEPARATOR = "__"  # between a namespace and a name, in the names that the model sees
# items about earlier turns that are not part of the prompt, and need not be named
_NOT_SHOWN = frozenset({"reasoning", "additional_tools"})


class Item(Part):
    """A message, a call, the output of a call, the reasoning of an earlier answer, or something that only another server
    understands."""

    extra_is_used: ClassVar[bool] = True  # items of other types have fields of their own
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Many[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | dict[str, Any] | None = None
    input: str | None = None
    output: str | Many[ContentPart] | None = None
    tools: Annotated[Many[FlatTool], Field(max_length=MAX_TOOLS)] | None = None


class FlatTool(Part):
    """A tool in the flat form of this API; chats nest the function. A `namespace` has tools of its own."""

    extra_is_used: ClassVar[bool] = True  # tools of other types have fields of their own
    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    tools: Annotated[Many[FlatTool], Field(max_length=MAX_TOOLS)] | None = None

    def chat_tool(self, name: str) -> Tool | None:
        """The same tool in a chat, under this name; None for one that only another server runs."""
        match self.type:
            case "function":
                function = Function(
                    name=name, description=self.description, parameters=self.parameters, strict=self.strict
                )
                return Tool(type="function", function=function)
            case "custom":
                return Tool(type="custom", custom=Custom(name=name, description=self.description, format=self.format))
            case _:
                return None


class FlatNamed(Part):
    type: Literal["function", "custom"] = "function"
    name: str
    namespace: str | None = None


class FlatChoice(Part):
    """An entry of a subset of the tools. Those that other servers run have no name."""

    type: str = "function"
    name: str | None = None


class FlatAllowed(Part):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Many[FlatChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Part):
    format: TextFormat | None = None
    verbosity: str | None = None  # accepted and ignored


class ReasoningOptions(Part):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None  # accepted and ignored


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
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Many[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatAllowed | FlatNamed | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Many[str] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    priority: Priority | None = None
    metadata: dict[str, Any] | None = None
    # accepted and ignored
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    max_tool_calls: int | None = None

    client_metadata: dict[str, Any] | None = None

    def chat(self) -> ChatRequest:
        """The same request as a chat. Raises BadRequest for a message or a call without its fields."""
        tools = _Tools(self)
        chat = validated(
            lambda: ChatRequest(
                model=self.model,
                messages=self._messages(),
                stream=self.stream,
                max_completion_tokens=self.max_output_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                logprobs=self._wants_logprobs() or None,
                top_logprobs=self.top_logprobs if self._wants_logprobs() else None,
                tools=tools.chat or None,
                tool_choice=self._tool_choice(tools),
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=self._format(),
                reasoning_effort=self.reasoning.effort if self.reasoning else None,
                prompt_cache_key=self.prompt_cache_key,
                priority=self.priority,
            )
        )
        chat._client_names = tools.client_names
        return chat

    def left_out(self) -> list[str]:
        found = list(_Tools(self).left_out)
        for item in self.input if not isinstance(self.input, str) else ():
            kind = item.type or "message"
            if kind not in _ITEMS and kind not in _NOT_SHOWN:
                found.append(named("input", kind))
            elif isinstance(item.output, list):
                found += [named("input.output", part.type) for part in item.output if part.text is None]
        return list(dict.fromkeys(found))

    def frame(self) -> str:
        """The request's fields that a response repeats, as JSON. Raises BadRequest for numbers that JSON does not have."""
        try:
            return json.dumps(self._repeated(), allow_nan=False)
        except ValueError as error:
            raise BadRequest(f"the request has a number that JSON does not allow: {error}") from error

    def _repeated(self) -> dict[str, Any]:
        choice = self.tool_choice
        tool_choice = choice.model_dump() if isinstance(choice, Part) else choice
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
        left_out: set[str | None] = set()  # ids of calls that are not part of the prompt
        for at, item in enumerate(self.input):
            if (kind := item.type or "message") not in _ITEMS:
                left_out |= {item.call_id} - {None}
            elif not (kind.endswith("_output") and item.call_id in left_out):
                _ITEMS[kind](messages, item, f"input.{at}")
        if not messages:
            raise BadRequest("input has no message", param="input")
        return messages

    def _tool_choice(self, tools: _Tools) -> Any:
        choice = self.tool_choice
        if isinstance(choice, FlatNamed):
            name = _name_in(choice.namespace, choice.name)
            known = {tool.called.name for tool in tools.chat if tool.called is not None}
            if name not in known:  # a tool of a namespace, if only one has this name
                inner = [model for model, client in tools.client_names.items() if client.name == choice.name]
                name = inner[0] if len(inner) == 1 else name
            return NamedTool(function=NamedFunction(name=name))
        if isinstance(choice, FlatChoice):
            raise BadRequest(
                f"tool_choice: this server does not run tools of type {choice.type!r}", param="tool_choice"
            )
        if isinstance(choice, FlatAllowed):
            allowed = AllowedSet(mode=choice.mode, tools=[_allowed(entry) for entry in choice.tools])
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


class _Tools:
    """The tools of a request in a chat, with the namespaces in their names; and those that are left out."""

    def __init__(self, request: ResponsesRequest) -> None:
        self.chat: list[Tool] = []
        self.client_names: dict[str, WireToolName] = {}
        self.left_out: list[str] = []
        self._add(request.tools or (), "tools", "")
        for item in request.input if not isinstance(request.input, str) else ():
            if item.type == "additional_tools":
                self._add(item.tools or (), "input.tools", "")

    def _add(self, tools: Iterable[FlatTool], where: str, space: str) -> None:
        for at, tool in enumerate(tools):
            if tool.type == "namespace" and not space and tool.name:
                self._add(tool.tools or (), f"{where}.{at}.tools", tool.name)
            elif tool.type in ("function", "custom") and tool.name is None:
                raise BadRequest(f"{where}: a {tool.type} needs a name", param="tools")
            else:
                self._add_one(tool, f"{where}.{at}", space)

    def _add_one(self, tool: FlatTool, where: str, space: str) -> None:
        name = _name_in(space, tool.name or "")
        if len(name) > MAX_NAME:
            raise BadRequest(
                f"{where}: {name[:50]!r}… is longer than {MAX_NAME} characters with its namespace", param="tools"
            )
        made = tool.chat_tool(name) if tool.name else None
        if made is None:
            self.left_out.append(named(where, tool.type))
            return
        if made in self.chat:  # clients repeat their tools in the history
            return
        self.chat.append(made)
        if made.custom is not None:
            self.left_out += made.custom.left_out(where)
        if space:
            self.client_names[name] = WireToolName(
                name=tool.name or "", namespace=space, custom=made.custom is not None
            )  # fmt: skip


def _name_in(space: str | None, name: str) -> str:
    """The name of a tool as the model sees it."""
    return f"{space}{SEPARATOR}{name}" if space else name


def _add_message(messages: list[Message], item: Item, where: str) -> None:
    if item.role is None or item.content is None:
        raise BadRequest(f"{where}: a message needs role and content", param=where)
    messages.append(Message(role=item.role, content=item.content))


def _add_call(messages: list[Message], item: Item, where: str) -> None:
    """Adds a call. Consecutive calls become one message of the assistant."""
    if not item.name or not item.call_id:
        raise BadRequest(f"{where}: a {item.type} needs name and call_id", param=where)
    name = _name_in(item.namespace, item.name)
    if item.type == "custom_tool_call":
        call = ToolCall(id=item.call_id, type="custom", custom=CalledCustom(name=name, input=item.input or ""))
    else:
        call = ToolCall(id=item.call_id, function=CalledFunction(name=name, arguments=item.arguments or "{}"))
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant":
        last.tool_calls = [*(last.tool_calls or ()), call]
    else:
        messages.append(Message(role="assistant", content=None, tool_calls=[call]))


def _add_output(messages: list[Message], item: Item, where: str) -> None:
    if item.output is None:
        raise BadRequest(f"{where}: a {item.type} needs output", param=where)
    messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))


_ITEMS: Mapping[str, Callable[[list[Message], Item, str], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "custom_tool_call": _add_call,
    "function_call_output": _add_output,
    "custom_tool_call_output": _add_output,
}


def _allowed(entry: FlatChoice) -> AllowedTool:
    return AllowedTool(type=entry.type, function=NamedFunction(name=entry.name) if entry.name else None)
