"""Dialogs: the published jsonl shapes read into one form. No torch, no tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

ROLES = {"user": "user", "bot": "bot", "assistant": "bot", "tool": "tool", "system": "system"}
"""Names of roles as people write them → ours."""


class BadDialog(ValueError):
    """A line that is no dialog to learn from; the message says why."""


@dataclass(frozen=True)
class Turn:
    """What one side says. ``role`` is user or bot; the reply of a tool is a user's turn, as in the published
    template."""

    role: str
    text: str


@dataclass(frozen=True)
class Dialog:
    """Turns of user and bot in alternation, the bot's last.

    Attributes:
        system: text of the system turn; None where the line says none.
    """

    turns: tuple[Turn, ...]
    system: str | None = None


def parse_dialog(line: Any) -> Dialog:
    """One decoded line of a jsonl file.

    Three shapes are read: ``{"system", "dialog": [{"role", "content"}], ...}`` of TeleChat2's train.py (``multiturn``
    and ``tool`` are not needed), ``{"input", "output"}`` of TeleChat's process_data.py, where the input holds earlier
    turns between ``<_user>`` and ``<_bot>``, and ``{"messages": [{"role", "content"}]}`` as Megatron-LM's fine-tuning
    reads it.

    Raises:
        BadDialog: no such shape, or turns that do not alternate.
    """
    if not isinstance(line, dict):
        raise BadDialog(f"a JSON object is expected, not {_kind(line)}")
    if "dialog" in line:
        return from_messages(line["dialog"], "dialog", line)
    if "messages" in line:
        return from_messages(line["messages"], "messages", line)
    if "input" in line and "output" in line:
        return _from_input_output(line)
    raise BadDialog("none of the keys of a dialog: 'dialog', 'messages', or 'input' and 'output'")


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "a boolean", str: "a text", list: "a list", dict: "an object"}.get(
        type(value), "a number"
    )


def text_of(value: Any, name: str) -> str:
    """The value, which must be a text. Raises BadDialog."""
    if not isinstance(value, str):
        raise BadDialog(f"{name} is {_kind(value)}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadDialog(f"{name} holds half of a surrogate pair, which no text can") from None
    return value


def from_messages(messages: Any, key: str, line: dict) -> Dialog:
    """A list of turns, with the system text that the line has beside it.

    Args:
        key: of the list, for messages.

    Raises:
        BadDialog: turns that do not alternate, or are none.
    """
    if not isinstance(messages, list) or not messages:
        raise BadDialog(f"{key} is not a list of turns")
    if line.get("tools"):
        raise BadDialog(
            "a list of tools: write the block that describes them into the system text, as the published data does"
        )
    system = None if line.get("system") is None else text_of(line["system"], "system")
    spoken: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        name = f"{key}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise BadDialog(f"{name} is not an object with role and content")
        role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
        if role is None:
            raise BadDialog(f"{name} has the role {message['role']!r}; known are {', '.join(ROLES)}")
        content = _content(message, role, name)
        if role != "system":
            spoken.append((role, content))
        elif number or system is not None:
            raise BadDialog(f"{name} is a second system turn, or one that does not come first")
        else:
            system = content
    return Dialog(_alternating(spoken, key), system)


def _content(message: dict, role: str, name: str) -> str:
    """The text of a message; tool calls given as objects are written out as the published template writes them."""
    calls = message.get("tool_calls") or []
    content = message.get("content")
    text = "" if content is None and calls else text_of(content, f"{name}.content")
    if calls and role != "bot":
        raise BadDialog(f"{name} calls tools, which only the bot does")
    if not isinstance(calls, list):
        raise BadDialog(f"{name}.tool_calls is {_kind(calls)}, not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadDialog(f"{name} has a tool call without a name")
        text += f"\n<tool_call>\n{_call(function, name)}\n</tool_call>"
    return text


def _call(function: dict, name: str) -> str:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadDialog(f"{name}: the arguments of {function['name']} are not JSON") from None
    return text_of(json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False), name)


def _alternating(spoken: list[tuple[str, str]], key: str) -> tuple[Turn, ...]:
    """Turns; replies of tools that follow each other become one user's turn."""
    turns: list[Turn] = []
    previous = ""
    for number, (role, text) in enumerate(spoken):
        if role == "tool":
            reply = f"<tool_response>\n{text}\n</tool_response>"
            if previous == "tool":
                turns[-1] = Turn("user", f"{turns[-1].text}\n{reply}")
            elif previous != "bot":
                raise BadDialog(f"{key}: a tool answers (turn {number + 1}) where the bot has not called it")
            else:
                turns.append(Turn("user", reply))
        else:
            expected = "bot" if turns and turns[-1].role == "user" else "user"
            if role != expected:
                raise BadDialog(f"{key}: turn {number + 1} is the {role}'s, but the {expected}'s turn is expected")
            turns.append(Turn(role, text))
        previous = role
    if not turns or turns[-1].role != "bot":
        raise BadDialog(f"{key}: the last turn is not the bot's: there is nothing to learn from it")
    return tuple(turns)


def _from_input_output(line: dict) -> Dialog:
    """The first published shape: ``<_user>``, ``<_bot>`` stand as text between the turns of ``input``."""
    asked = re.sub(r"\A<_user>", "", text_of(line["input"], "input"))
    answer = re.sub(r"\A<_bot>", "", text_of(line["output"], "output"))
    system = None if line.get("system") is None else text_of(line["system"], "system")
    turns: list[Turn] = []
    parts = asked.split("<_user>")
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        said = part.split("<_bot>")
        if len(said) != (1 if last else 2):
            raise BadDialog(f"input: turn {number + 1} is not <_user>question{'' if last else '<_bot>answer'}")
        turns.append(Turn("user", said[0]))
        if not last:
            turns.append(Turn("bot", said[1]))
    turns.append(Turn("bot", answer))
    for turn in turns:
        if re.search("<_user>|<_bot>|<_end>", turn.text):
            raise BadDialog("input and output hold <_user>, <_bot> or <_end> in a place that is not a turn border")
    return Dialog(tuple(turns), system)


def dialogs_in(path: str) -> int | None:
    """Lines of a jsonl file, for a description that encodes nothing; None for a compressed one."""
    if path.endswith(".gz"):
        return None
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
