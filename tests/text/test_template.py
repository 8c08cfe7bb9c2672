"""Chat templates beside transformers' own rendering: those that installed packages bring, and one of each form."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from dynserve.api.chat import ChatRequest
from dynserve.api.fields import parsed
from dynserve.api.messages import MessagesRequest
from dynserve.api.responses import ResponsesRequest
from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest
from dynserve.model_files import read_model_files
from dynserve.text.preprocess import Conversation, Preprocessor
from dynserve.text.template import ChatTemplate, MessageForm, template_sources

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own

ASKED = [{"role": "user", "content": "x"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# files of installed packages with chat templates of published models
SOURCES = {
    "litellm": ("constants.py",),
    "transformers": (
        "models/smolvlm/processing_smolvlm.py",
        "models/llama4/processing_llama4.py",
        "models/qwen2_audio/processing_qwen2_audio.py",
    ),
}


def packaged() -> Iterator[tuple[str, str]]:
    for package, files in SOURCES.items():
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for file in files:
            tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{%" in node.value:
                    yield f"{package}/{file}:{node.lineno}", node.value


CALL = "{% for call in message.tool_calls %}<call>{{ call.function.name }} ARGUMENTS</call>{% endfor %}"
TURN = "{% for message in messages %}<{{ message.role }}>BODY{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def template(body: str, arguments: str = "{{ call.function.arguments | tojson }}") -> str:
    return TURN.replace("BODY", body.replace("CALL", CALL.replace("ARGUMENTS", arguments)))


# one template of each form -> the form that the probes must find
FORMS: dict[str, tuple[str, MessageForm]] = {
    "objects": (template("{{ message.content or '' }}CALL"), MessageForm()),
    "joined text": (
        template("{{ message.content or '' }}CALL", "{{ ' ' + call.function.arguments }}"),
        MessageForm(objects=False),
    ),
    "printed text": (
        template("{{ message.content or '' }}CALL", "{{ call.function.arguments }}"),
        MessageForm(objects=False),
    ),
    "prints its content": (template("{{ message.content }}CALL"), MessageForm(null=False)),
    "joins its content": (template("{{ '' + message.content }}CALL"), MessageForm(null=False)),
    "calls where content is none": (
        template("{% if message.content is none %}CALL{% else %}{{ message.content }}{% endif %}"),
        MessageForm(apart=True),
    ),
    "calls instead of content": (
        template("{% if message.tool_calls %}CALL{% else %}{{ message.content }}{% endif %}"),
        MessageForm(apart=True),
    ),
    "parts": (
        template("{% for part in message.content or [] %}{{ part.text }}{% endfor %}CALL"),
        MessageForm(parts=True),
    ),
    "without calls": (template("{{ message.content }}"), MessageForm(null=False)),
    "says None anyway": (template("None of it: {{ message.content or '' }}CALL"), MessageForm()),
    "generation tags": (
        template("{% generation %}{{ message.content or '' }}CALL{% endgeneration %}"),
        MessageForm(),
    ),
}
TEMPLATES = {name: source for name, (source, _) in FORMS.items()} | dict(packaged())
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "description": "x"}}, "required": ["at"]}}}]  # fmt: skip
CALLED: dict[str, Any] = {
    "id": "abcdef123", "type": "function", "function": {"name": "look", "arguments": '{"at": "Köln", "n": [1, null]}'}
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "content": "rainy"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Grüße <b>&</b>"}],
    "turns": [
        {"role": "user", "content": " one "},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three\n"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}],
    "call": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALLED]}, RESULT],
    "said and called": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALLED], "reasoning": "why"},
        RESULT,
    ],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_what_transformers_renders(name: str, conversation: str) -> None:
    ours = ChatTemplate(TEMPLATES[name], SPECIAL)
    tools = TOOLS if "call" in conversation else None
    variables: dict[str, Any] = {"add_generation_prompt": True, "tools": tools, "documents": None}
    messages = CONVERSATIONS[conversation]
    try:
        expected = render_jinja_template(
            [ours.form.apply(messages)],
            tools=tools,
            chat_template=TEMPLATES[name],
            add_generation_prompt=True,
            **SPECIAL,
        )[0][0]
    except Exception as refusal:
        with pytest.raises(type(refusal)):
            ours.render(messages, variables)
    else:
        assert ours.render(messages, variables) == expected


@pytest.mark.parametrize("name", FORMS)
def test_probes_find_the_form_that_a_template_expects(name: str) -> None:
    source, form = FORMS[name]
    assert ChatTemplate(source, SPECIAL).form == form


def preprocessor(source: Any, **files: bytes) -> Preprocessor:
    config = {"tokenizer_config.json": json.dumps({"chat_template": source}).encode()}
    return Preprocessor(read_model_files(TINY_MODEL) | config | files)


def histories(arguments: str | dict[str, Any], text: str | None) -> list[Any]:
    """The same conversation as a request of each API."""
    function = {"name": "look", "arguments": arguments}
    chat = {"model": "m", "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": text, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rainy"}]}  # fmt: skip
    said = [] if text is None else [{"role": "assistant", "content": text}]
    arguments_text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    responses = {"model": "m", "input": [
        {"role": "user", "content": "x"}, *said,
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": arguments_text},
        {"type": "function_call_output", "call_id": "c1", "output": "rainy"}]}  # fmt: skip
    blocks: list[dict[str, Any]] = [] if text is None else [{"type": "text", "text": text}]
    messages = {"model": "m", "max_tokens": 9, "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [*blocks, {
            "type": "tool_use", "id": "c1", "name": "look", "input": json.loads(arguments_text)}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rainy"}]}]}  # fmt: skip
    return [
        parsed(ChatRequest, json.dumps(chat).encode()),
        parsed(ResponsesRequest, json.dumps(responses).encode()).chat(),
        parsed(MessagesRequest, json.dumps(messages).encode()).chat(),
    ]


@pytest.mark.parametrize("text", [None, "I look."])
@pytest.mark.parametrize("arguments", ['{"at": "it"}', {"at": "it"}])
@pytest.mark.parametrize("name", [name for name in FORMS if name != "without calls"])
def test_calls_of_a_history_reach_every_template_from_every_api(
    name: str, arguments: str | dict[str, Any], text: str | None
) -> None:
    model = preprocessor(FORMS[name][0])
    for request in histories(arguments, text):
        shown = model.render(request.conversation())
        assert "<call>look" in shown and '{"at": "it"}' in shown and (text or "") in shown, shown
        assert "rainy" in shown and ("None" not in shown or name == "says None anyway"), shown


def test_the_distillations_of_deepseek_keep_their_calls() -> None:
    (source,) = [source for source in TEMPLATES.values() if "tool▁calls▁begin" in source]
    for request in histories('{"at": "it"}', None):
        shown = preprocessor(source).render(request.conversation())
        assert 'look\n```json\n{"at": "it"}\n```' in shown


def test_invalid_arguments_that_a_model_wrote_are_passed_on() -> None:
    call = {"function": {"name": "look", "arguments": '{"at": '}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    request = parsed(ChatRequest, json.dumps({"model": "m", "messages": messages}).encode())
    assert '"{\\"at\\": "' in preprocessor(FORMS["objects"][0]).render(request.conversation())


NAMED = {"default": "default {{ messages[0].content }}", "tool_use": "tools {{ messages[0].content }}"}


def of_transformers(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", ["list", "folder", "file", "file and config", "folder alone", "none"])
def test_templates_are_found_where_transformers_finds_them(tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer.json").write_bytes((TINY_MODEL / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text("{}")
    if kind in ("list", "file and config"):
        config["chat_template"] = [{"name": name, "template": source} for name, source in NAMED.items()]
    if kind in ("file", "file and config", "folder"):
        (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    if kind.startswith("folder"):
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(NAMED["tool_use"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = of_transformers(tmp_path), Preprocessor(read_model_files(tmp_path))
    for tools in (None, TOOLS):
        try:
            expected = theirs.apply_chat_template(ASKED, tools=tools, tokenize=False)
        except ValueError:
            with pytest.raises(BadRequest, match="no (default )?chat template"):
                ours.render(Conversation(ASKED, tools))
        else:
            assert ours.render(Conversation(ASKED, tools)) == expected


def test_the_template_of_a_processor_is_the_last_resort() -> None:
    legacy = {"chat_template.json": b'{"chat_template": "legacy"}'}
    assert template_sources(legacy, {}) == {"default": "legacy"}
    assert template_sources(legacy, {"chat_template": "own"}) == {"default": "own"}


def test_a_template_that_does_not_compile_switches_chats_off_and_nothing_else() -> None:
    model = preprocessor("{% unknown %}{{ messages }}")
    with pytest.raises(
        BadRequest, match=r"chat template cannot be used: Encountered unknown tag 'unknown'.*\(line 1\); use /v1/comp"
    ):
        model.render(Conversation(ASKED))
    assert model.templates.fault and model.tokenize("x")
    assert not preprocessor("{{ messages }}").templates.fault


@pytest.mark.parametrize(
    "source",
    ["{{ dict.__class__ }}x", "{% set ns = namespace(_x=1) %}", "{% set ns = namespace() %}{% set ns._x = 1 %}",
     "{{ messages.append(1) }}", "{{ [].__class__ }}"],
)  # fmt: skip
def test_a_template_cannot_reach_beyond_its_input(source: str) -> None:
    with pytest.raises(BadRequest, match="refused"):
        print(preprocessor(source + "{{ messages[0].content.__class__.__mro__ }}").render(Conversation(ASKED)))


def test_the_reasoning_of_earlier_turns_has_the_name_that_templates_read() -> None:
    source = "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}]{% endfor %}"
    turns: list[Mapping[str, Any]] = [{"role": "assistant", "content": "x", name: "why"}
                                      for name in ("reasoning_content", "thinking", "reasoning")]  # fmt: skip
    assert ChatTemplate(source, {}).render(turns, {}) == "[why|why]" * 3
