"""The request of `/v1/chat/completions`: messages, tools, response formats and their checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from dynserve.api.body_bounds import check_json_texts
from dynserve.api.fields import AnswerFields, Count, Many, Off
from dynserve.api.left_out import Part, named
from dynserve.errors import BadRequest
from dynserve.text.preprocess import Conversation
from dynserve.wire.requests import ToolName as WireToolName

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")]
MAX_TOOLS = 512
MAX_ARGUMENT_VALUES = 32_000  # in the arguments of all calls of a conversation
OVERHEAD = 50  # characters that a message or a call adds to its text
INPUT = "input"  # the parameter of a custom tool, as the model sees it


class ContentPart(Part):
    type: str = "text"
    text: str | None = None

    @property
    def extra_is_used(self) -> bool:  # type: ignore[override]
        return self.text is None  # parts of other types have fields of their own


def _arguments(given: Any) -> Any:
    return "{}" if given is None else given


def _function(given: Any) -> Any:
    return "function" if given is None else given


class CalledFunction(Part):
    name: str
    arguments: Annotated[str | dict[str, Any], BeforeValidator(_arguments)] = "{}"


class CalledCustom(Part):
    """The call of a custom tool, whose input is a text."""

    name: str
    input: str = ""


class ToolCall(Part):
    id: str | None = None
    type: Annotated[Literal["function", "custom"], BeforeValidator(_function)] = "function"
    function: CalledFunction | None = None
    custom: CalledCustom | None = None

    @property
    def name(self) -> str:
        called = self.custom if self.type == "custom" else self.function
        return "" if called is None else called.name

    @property
    def arguments(self) -> str:
        """The arguments as JSON text."""
        if self.type == "custom":
            return json.dumps({INPUT: self.custom.input if self.custom is not None else ""}, ensure_ascii=False)
        arguments = self.function.arguments if self.function is not None else {}
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    def for_template(self) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if self.id is None else {"id": self.id} | call


class Message(Part):
    """A turn of the conversation. Further fields are passed on to the template, which may use them."""

    extra_is_used: ClassVar[bool] = True
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Many[ContentPart] | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def check(self, where: str) -> None:
        if self.content is None and self.role in ("system", "developer", "user"):
            raise BadRequest(f"{where}.content: a message of role {self.role} needs content", param=f"{where}.content")
        if self.tool_calls and self.role != "assistant":
            raise BadRequest(f"{where}.tool_calls: only an assistant calls tools", param=f"{where}.tool_calls")
        for at, call in enumerate(self.tool_calls or ()):
            if not call.name:
                missing = f"{where}.tool_calls.{at}.{call.type}"
                raise BadRequest(f"{missing}: Field required", param=missing)

    def for_template(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_unset=True, exclude={"tool_calls", "content"})
        fields["content"] = None if self.content is None else self.text()
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        # OpenAI's newer name of one role, and the older one of another
        fields["role"] = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        return fields

    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return "".join([self._part(part) for part in self.content])

    def _part(self, part: ContentPart) -> str:
        if part.type in ("text", "input_text", "output_text") and part.text is not None:
            return part.text
        if part.type == "refusal":
            return str((part.model_extra or {}).get("refusal") or "")
        if self.role in ("tool", "function"):  # a tool's result must not end the conversation
            return f"[{part.type} left out: this model reads text]"
        raise BadRequest(f"content parts of type {part.type!r} are not supported", param="messages")

    def left_out(self, where: str) -> list[str]:
        if self.role not in ("tool", "function") or not isinstance(self.content, list):
            return []
        return [named(f"{where}.content", part.type) for part in self.content if part.text is None]


class Function(Part):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class Custom(Part):
    """A custom tool: its input is a text. `format` describes the text; a model is told of it, and not held to it."""

    name: ToolName
    description: str | None = None
    format: dict[str, Any] | None = None

    def function(self) -> Function:
        """The tool as the model sees it: a function with one parameter."""
        description = self.description or ""
        given = self.format or {}
        grammar = given.get("grammar") or given  # nested in chats, flat in Responses
        if isinstance(grammar, dict) and grammar.get("definition"):
            description += f"\n\nThe input follows this {grammar.get('syntax', '')} grammar:\n{grammar['definition']}"
        text = {"type": "string", "description": "The whole input of the tool, as text."}
        shape = {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
        return Function(name=self.name, description=description.strip() or None, parameters=shape)

    def left_out(self, where: str) -> list[str]:
        kind = (self.format or {}).get("type")
        return [named(f"{where}.format", kind)] if kind == "grammar" else []


class Tool(Part):
    """A tool. One of another type than these two has a meaning for another server only, and is left out."""

    type: Annotated[str, BeforeValidator(_function)] = "function"
    function: Function | None = None
    custom: Custom | None = None

    @property
    def called(self) -> Function | None:
        """The function that the model sees; None for a tool that is left out."""
        if self.type == "function":
            return self.function
        return self.custom.function() if self.type == "custom" and self.custom is not None else None


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function", "custom"] = "function"
    function: NamedFunction | None = None
    custom: NamedFunction | None = None

    @property
    def name(self) -> str:
        found = self.function or self.custom
        if found is None:
            raise BadRequest("tool_choice names no function", param="tool_choice")
        return found.name


class AllowedTool(NamedTool):
    """An entry of a subset of the tools. Those that other servers run have no name."""

    type: str = "function"  # type: ignore[assignment]


class AllowedSet(Part):
    mode: Literal["auto", "required"]
    tools: Annotated[Many[AllowedTool], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def names(self) -> set[str]:
        return {tool.name for tool in self.tools if tool.type in ("function", "custom")}


class AllowedTools(Part):
    """A subset of the tools, for this answer only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet


class ChatRequest(AnswerFields):
    prompt_field: ClassVar[str] = "messages"
    refused: ClassVar[Mapping[str, str]] = {
        **AnswerFields.refused,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this server only generates text",
        "web_search_options": "give a search function in tools",
    }

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Many[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | AllowedTools | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: Off = False
    modalities: Many[Literal["text"]] | None = None
    # accepted and ignored
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    # the tools that the model knows by other names than the client
    _client_names: dict[str, WireToolName] = PrivateAttr(default_factory=dict)

    def check(self) -> None:
        super().check()
        for at, message in enumerate(self.messages):
            message.check(f"messages.{at}")
        calls = [call for message in self.messages if message.tool_calls for call in message.tool_calls]
        if arguments := [call.arguments for call in calls if call.type == "function"]:
            check_json_texts(arguments, MAX_ARGUMENT_VALUES, "messages")
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise BadRequest("continue_final_message needs a last message of the assistant", param="messages")
        self._check_tools()
        if self.must_call and (given := self.grammar_fields()):
            raise BadRequest(f"{given[0]} cannot be combined with a tool_choice that requires a call", param=given[0])

    def left_out(self) -> list[str]:
        found = [name for message in self.messages if message.role != "user" for name in message.left_out("messages")]
        for at, tool in enumerate(self.tools or ()):
            if tool.type == "custom" and tool.custom is not None:
                found += tool.custom.left_out(f"tools.{at}.custom")
            elif tool.called is None:
                found.append(named(f"tools.{at}", tool.type))
        return found

    def conversation(self) -> Conversation:
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            # the variables of OpenAI's and of Qwen's templates
            variables = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return Conversation(
            [message.for_template() for message in self.messages],
            [function.for_template() for function in self.callable_tools()],
            variables | (self.chat_template_kwargs or {}),
            self.continue_final_message,
        )

    def functions(self) -> list[Function]:
        """The tools that a model can call, as it sees them."""
        return [called for tool in self.tools or () if (called := tool.called) is not None]

    def callable_tools(self) -> list[Function]:
        """The tools that the model may call; no others are rendered into the prompt."""
        if not self.tools:
            return []
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            names = choice.allowed_tools.names
            return [function for function in self.functions() if function.name in names]
        return [] if choice == "none" else self.functions()

    def tool_names(self) -> dict[str, WireToolName]:
        """The tools whose calls an answer shows in another form than that of a function."""
        if not self.tools:
            return {}
        custom = [tool.custom.name for tool in self.tools or () if tool.type == "custom" and tool.custom is not None]
        return {name: WireToolName(name=name, custom=True) for name in custom} | self._client_names

    @property
    def must_call(self) -> bool:
        """Whether the answer has to consist of tool calls."""
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, NamedTool)

    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def size(self) -> int:
        """The approximate number of characters of the prompt, which decides whether it is tokenised in a thread."""
        size = sum(_size(message) for message in self.messages) + len(str(self.chat_template_kwargs or ""))
        size += self.schema_size()
        for function in self.functions():
            size += 200 + len(function.description or "") + len(str(function.parameters))
        return size

    def _check_tools(self) -> None:
        if not self.tools and self.tool_choice in (None, "none", "auto"):
            return
        names: set[str] = set()
        for at, tool in enumerate(self.tools or ()):
            if tool.type in ("function", "custom") and tool.called is None:
                raise BadRequest(f"tools.{at}.{tool.type}: Field required", param=f"tools.{at}.{tool.type}")
        for function in self.functions():
            if function.name in names:
                raise BadRequest(f"tools: {function.name} is listed twice", param="tools")
            names.add(function.name)
        choice = self.tool_choice
        chosen = {choice.name} if isinstance(choice, NamedTool) else set()
        if isinstance(choice, AllowedTools):
            chosen = choice.allowed_tools.names
        for name in sorted(chosen - names):
            raise BadRequest(f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
        if (
            choice == "required" or (isinstance(choice, AllowedTools) and self.must_call)
        ) and not self.callable_tools():
            raise BadRequest("tool_choice: required needs tools", param="tool_choice")


def _size(message: Message) -> int:
    content = message.content
    size = len(content) if isinstance(content, str) else sum(len(part.text or "") for part in content or ())
    calls = sum(OVERHEAD + len(call.arguments) for call in message.tool_calls or ())
    return OVERHEAD + size + calls
