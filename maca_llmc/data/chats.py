"""Chats: messages out of the formats that data sets have, and their text by a chat template."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from maca_llmc.common.errors import UserError

Message: TypeAlias = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's ``conversations``, and the role of chat templates that it is."""

WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that needs no content beside them."""

TEXT_PARTS = ("text", "input_text", "output_text")

DAY = datetime(2025, 1, 1)
"""The day on which every chat is rendered.

A template that writes today's date would give other tokens tomorrow, and a killed run could not be
resumed.
"""

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Chat(list[Message]):
    """Messages with ``role`` and ``content`` (text, or ``None`` where there is none).

    :param where: the file and row they come from, for messages.
    :param tools: JSON schemas of the functions that the assistant may call.
    """

    def __init__(
        self, messages: Iterable[Message], where: str = "a chat", tools: list[Any] | None = None
    ) -> None:
        super().__init__(messages)
        self.where = where
        self.tools = tools


def is_chat(value: Any) -> bool:
    """Say whether ``value`` is a list of messages, ours or ShareGPT's."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict) and ("role" in message or {"from", "value"} <= {*message})
            for message in value
        )
    )


def chat_in_text(text: str) -> list[Any] | None:
    """Return the chat that ``text`` spells out, in JSON or as Python prints it; else ``None``.

    A CSV column has no other way to hold one.
    """
    opening = text.lstrip()[:20].replace(" ", "").replace("\n", "")
    if not opening.startswith(("[{'", '[{"')):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if is_chat(value):
            return list(value)
    return None


def read_chat(messages: list[Any], where: str) -> Chat:
    """Return the chat with every content as text.

    :param messages: see :func:`is_chat`.
    :raises UserError: a speaker that is not known, content that is not text, no content.
    """
    read = [_message(m, f"{where}, message {n}") for n, m in enumerate(messages, start=1)]
    return Chat(read, where)


def render(tokenizer: PreTrainedTokenizerBase, chat: list[Message]) -> str:
    """Return the text of a chat by the tokenizer's chat template.

    :raises UserError: no template, or a chat that it does not take: file, row and what to do.
    """
    if not isinstance(chat, Chat):
        chat = read_chat(chat, "a chat")
    if not tokenizer.chat_template:
        raise UserError(
            f"{chat.where}: the data are chats and the tokenizer has no chat template: "
            "use an instruction-tuned model or plain text"
        )
    try:
        return _render_contents(tokenizer, chat)
    except TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{chat.where}: the chat template refuses it ({reason}): {_cure(tokenizer, chat)}"
        ) from error


def _render_contents(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """Render what has no content as None or as an empty text, whichever the template knows.

    DeepSeek's looks for None beside tool calls; plainer ones would write the word.
    """
    if all(message["content"] is not None for message in chat):
        return _apply(tokenizer, list(chat), chat.tools)
    filled = [m | {"content": ""} if m["content"] is None else m for m in chat]
    empty = _apply(tokenizer, filled, chat.tools)
    try:
        none = _apply(tokenizer, list(chat), chat.tools)
    except TEMPLATE_ERRORS:
        return empty
    return none if none.count("None") <= empty.count("None") else empty


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None
) -> str:
    if _takes_parts_only(tokenizer):
        messages = [
            m | {"content": [{"type": "text", "text": m["content"]}]} if m["content"] else m
            for m in messages
        ]
    return _template(tokenizer, messages, tools)


def _takes_parts_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the template loses a content that is text and keeps one that is a list of parts.

    Some templates of multimodal models do.
    """
    probe = "some probing text"
    for content in (probe, [{"type": "text", "text": probe}]):
        try:
            rendered = _template(tokenizer, [{"role": "user", "content": content}], None)
        except TEMPLATE_ERRORS:
            continue
        if probe in rendered:
            return isinstance(content, list)
    return False


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, strftime_now=DAY.strftime
        )
    )


def _cure(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """What to do about a chat that the template refuses, found by trying it changed."""
    others = Chat([m for m in chat if m["role"] != "system"], tools=chat.tools)
    if others and len(others) < len(chat):
        try:
            _render_contents(tokenizer, others)
        except TEMPLATE_ERRORS:
            pass
        else:
            return "without its system message it is taken: put that into the first user message"
    return f"mend or remove it (its roles: {', '.join(m['role'] for m in chat)})"


def _message(message: Message, where: str) -> Message:
    read = {key: value for key, value in message.items() if value is not None}
    if "role" not in read:
        read = _from_sharegpt(read, where)
    if not isinstance(read["role"], str):
        raise UserError(f"{where}: its role is {read['role']!r}: give a word such as 'user'")
    if "content" not in read and not any(read.get(field) for field in WITHOUT_CONTENT):
        raise UserError(f"{where} ({read['role']}) has no content: mend or remove the row")
    read["content"] = _text(read.get("content"), where)
    if read.get("tool_calls"):
        read["tool_calls"] = [_parse_arguments(call) for call in read["tool_calls"]]
    return read


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message.get("from")
    if speaker not in ROLES:
        raise UserError(
            f"{where} is from {speaker!r}: known are {', '.join(ROLES)}; "
            "mend or remove the row, or write messages with 'role' and 'content'"
        )
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return rest | {"role": ROLES[speaker], "content": message.get("value")}


def _text(content: Any, where: str) -> str | None:
    """Return the text of a content; of several parts, as vLLM joins them."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(part, where) for part in content)
    raise UserError(
        f"{where}: its content is of type {type(content).__name__}: give text, or remove the row"
    )


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict) and kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UserError(
        f"{where} has a part of type {kind!r} and calibration takes text alone "
        "(no images, no audio): remove the row or that part"
    )


def _parse_arguments(call: Any) -> Any:
    """Turn the arguments of a tool call from JSON, as OpenAI has them, into what templates take."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # words of the model that are no JSON stay as they are
    return call | {"function": function | {"arguments": arguments}}


def read_tools(tools: Any, where: str) -> list[Any] | None:
    """Return the tools beside a chat.

    :param tools: a list of JSON schemas, or its JSON.
    :raises UserError: when it is neither.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its tools are no JSON: mend or remove them") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: its tools are no list of JSON schemas: mend or remove them")
    return tools


def without_none(value: Any) -> Any:
    """Copy a value without the keys whose value is None: ``datasets`` gives each row all keys."""
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_none(each) for each in value]
    return value
