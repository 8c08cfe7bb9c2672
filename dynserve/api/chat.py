"""The request of `/v1/chat/completions`: messages, tools, response formats and their checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynserve.api.body_bounds import check_json_texts
from dynserve.api.fields import AnswerFields, Count, Many
from dynserve.errors import BadRequest
from dynserve.text.preprocess import Conversation

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
MAX_TOOLS = 512
MAX_ARGUMENT_VALUES = 32_000  # in the arguments of all calls of a conversation
OVERHEAD = 50  # characters that a message or a call adds to its text


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        arguments = self.function.arguments
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id} | call


class Message(BaseModel):
    """A turn of the conversation. Further fields are passed on to the template, which may use them."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[ContentPart] | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def check(self, where: str) -> None:
        if self.content is None and self.role in ("system", "developer", "user"):
            raise BadRequest(f"{where}.content: a message of role {self.role} needs content", param=f"{where}.content")
        if self.tool_calls and self.role != "assistant":
            raise BadRequest(f"{where}.tool_calls: only an assistant calls tools", param=f"{where}.tool_calls")

    def for_template(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_unset=True, exclude={"tool_calls", "content"})
        fields["content"] = None if self.content is None else self.text()
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if fields["role"] == "developer":  # OpenAI's newer name; templates expect the older one
            fields["role"] = "system"
        return fields

    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        parts = []
        for part in self.content:
            text = part.text if part.type in ("text", "input_text", "output_text") else None
            if part.type == "refusal":
                text = str((part.model_extra or {}).get("refusal") or "")
            if text is None:
                raise BadRequest(f"content parts of type {part.type!r} are not supported", param="messages")
            parts.append(text)
        return "".join(parts)


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedSet(BaseModel):
    mode: Literal["auto", "required"]
    tools: Annotated[Many[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(BaseModel):
    """A subset of the tools, for this answer only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(AnswerFields):
    prompt_field: ClassVar[str] = "messages"
    refused: ClassVar[Mapping[str, str]] = {
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
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    modalities: Many[Literal["text"]] | None = None
    # accepted and ignored
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        for at, message in enumerate(self.messages):
            message.check(f"messages.{at}")
        calls = (call for message in self.messages for call in message.tool_calls or ())
        arguments = [call.function.arguments for call in calls if isinstance(call.function.arguments, str)]
        if arguments:
            check_json_texts(arguments, MAX_ARGUMENT_VALUES, "messages")
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise BadRequest("continue_final_message needs a last message of the assistant", param="messages")
        self._check_tools()
        form = self.response_format
        schema = form.json_schema.schema_ if form is not None and form.json_schema is not None else None
        if form is not None and form.type == "json_schema" and schema is None:
            raise BadRequest("response_format of type json_schema needs json_schema.schema", param="response_format")
        if self.must_call and (given := self.grammar_fields()):
            raise BadRequest(f"{given[0]} cannot be combined with a tool_choice that requires a call", param=given[0])

    def grammar_fields(self) -> list[str]:
        formed = self.response_format is not None and self.response_format.type != "text"
        return ["response_format"] * formed + super().grammar_fields()

    def conversation(self) -> Conversation:
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            # the variables of OpenAI's and of Qwen's templates
            variables = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return Conversation(
            [message.for_template() for message in self.messages],
            [tool.for_template() for tool in self.callable_tools()],
            variables | (self.chat_template_kwargs or {}),
            self.continue_final_message,
        )

    def callable_tools(self) -> list[Tool]:
        """The tools that the model may call; no others are rendered into the prompt."""
        choice, tools = self.tool_choice, list(self.tools or ())
        if isinstance(choice, AllowedTools):
            names = {tool.function.name for tool in choice.allowed_tools.tools}
            return [tool for tool in tools if tool.function.name in names]
        return [] if choice == "none" else tools

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
        for tool in self.tools or ():
            size += 200 + len(tool.function.description or "") + len(str(tool.function.parameters))
        return size

    def _check_tools(self) -> None:
        names: set[str] = set()
        for tool in self.tools or ():
            if tool.function.name in names:
                raise BadRequest(f"tools: {tool.function.name} is listed twice", param="tools")
            names.add(tool.function.name)
        chosen: list[NamedTool] = [self.tool_choice] if isinstance(self.tool_choice, NamedTool) else []
        if isinstance(self.tool_choice, AllowedTools):
            chosen = self.tool_choice.allowed_tools.tools
        for name in (tool.function.name for tool in chosen):
            if name not in names:
                raise BadRequest(f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
        if self.tool_choice == "required" and not names:
            raise BadRequest("tool_choice: required needs tools", param="tool_choice")


def _size(message: Message) -> int:
    content = message.content
    size = len(content) if isinstance(content, str) else sum(len(part.text or "") for part in content or ())
    calls = sum(OVERHEAD + len(str(call.function.arguments)) for call in message.tool_calls or ())
    return OVERHEAD + size + calls
