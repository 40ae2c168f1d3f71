"""The templates of `data.chat.template` in Jinja, as transformers and the servers on top of it read them.

What they render is, token by token, what the training encodes, with one limit that every template of this kind has:
the whole dialog is one text, so the name of a special token that stands in a message becomes that token.
"""

from __future__ import annotations

import json

from megatron_telechat.data.chat.template import TEMPLATES

NAME_KEY = "megatron_telechat_template"
"""Key of tokenizer_config.json under which an export says the name of its template."""

_ALTERNATE = "raise_exception('turns of user and assistant must alternate, the user first')"

_TURNS = """\
{%- set last = namespace(role='bot') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{ raise_exception('a system message must come first') }}{%- endif -%}
SYSTEM
{%- elif message.role == 'user' -%}
{%- if last.role != 'bot' -%}{{ ALTERNATE }}{%- endif -%}
{{- '<_user>' + message.content -}}
{%- set last.role = 'user' -%}
{%- elif message.role == 'tool' -%}
{%- if last.role == 'user' or loop.first -%}{{ raise_exception('a tool answers that was not called') }}{%- endif -%}
{{- '\\n' if last.role == 'tool' else '<_user>' -}}
{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- set last.role = 'tool' -%}
{%- elif message.role in ('assistant', 'bot') -%}
{%- if last.role == 'bot' -%}{{ ALTERNATE }}{%- endif -%}
{{- '<_bot>' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '\\n<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
{{- function.arguments if function.arguments is string else (function.arguments or {}) | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<_end>END' -}}
{%- set last.role = 'bot' -%}
{%- else -%}{{ raise_exception('unknown role ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<_bot>' }}{%- endif -%}
"""

_NO_TOOLS = (
    "{%- if tools -%}{{ raise_exception('write the description of the tools into the system message') }}{%- endif -%}\n"
)


def chat_template(template: str, default_system: str | None = None) -> str:
    """The Jinja text of one of ``TEMPLATES``.

    Args:
        default_system: system text of dialogs that have none; unset: no system turn.
    """
    assert template in TEMPLATES
    if template == "telechat2":
        opening, system, end = "", "{{- '<_system>' + message.content + '\\n' -}}", "\\n"
        if default_system is not None:
            text = json.dumps(default_system, ensure_ascii=False)
            opening = "{%- if messages[0].role != 'system' -%}{{ '<_system>' + " + text + " + '\\n' }}{%- endif -%}\n"
    else:
        opening = "{{- '<_start>' -}}\n" if template == "telechat2-115b" else ""
        system, end = "{{- raise_exception('this template has no system message') -}}", ""
    turns = _TURNS.replace("SYSTEM", system).replace("ALTERNATE", _ALTERNATE).replace("END", end)
    return _NO_TOOLS + opening + turns


def template_of(text: str) -> str | None:
    """The name of the template that a Jinja text renders, told by its special tokens; None where it is none of them."""
    if "<_user>" not in text or "<_bot>" not in text:
        return None
    if "<_system>" in text:
        return "telechat2"
    return "telechat2-115b" if "<_start>" in text else "telechat"
