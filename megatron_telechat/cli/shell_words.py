"""A launch script as tokens: operators, and words made of texts and expansions that nothing has replaced yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_telechat.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """A piece of a word: kind is text, variable (its name and modifiers), arithmetic or output (of a command)."""

    kind: str
    text: str
    quoted: bool


@dataclass(frozen=True)
class Raw:
    """A word before its variables are known, or an assignment of an array (`array` holds its words)."""

    parts: tuple[Part, ...]
    array: tuple[Raw, ...] | None = None


Token = str | Raw
"""An operator, or a word."""


class Lexer:
    """Splits a shell script into tokens (words, operators, redirections, here-documents) without evaluating them."""

    def __init__(self, text: str, where: str):
        self.text, self.at, self.where = text, 0, where

    def fail(self, what: str) -> ConfigError:
        """The error to raise for text that cannot be read, with the place of the script."""
        return ConfigError(f"cannot read the script: {what}", self.where, "paste the command as it is typed")

    def tokens(self) -> Iterator[Token]:
        """All tokens of the text in order. Raises ConfigError for an unclosed quote, bracket or substitution."""
        heredocs: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif char == "#":
                self.skip_line()
            elif char == "\n":
                self.at += 1
                for end in heredocs:
                    found = re.search(rf"(?m)^\t*{re.escape(end)}$\n?", self.text[self.at :])
                    self.at = len(self.text) if found is None else self.at + found.end()
                heredocs = []
                yield "\n"
            elif found := re.compile(r"<<-?\s*(['\"]?)(\w+)\1").match(self.text, self.at):
                heredocs.append(found[2])
                self.at = found.end()
            elif found := re.compile(r"\d*(>>|>&|<&|>\||&>>|&>|<<<|<|>)[ \t]*").match(self.text, self.at):
                self.at = found.end()
                self.word()  # where the output goes
            elif found := re.compile(r";;|&&|\|\||\|&|[;&|()]").match(self.text, self.at):
                self.at = found.end()
                yield found[0]
            else:
                yield self.word()

    def skip_line(self) -> None:
        """Move to the end of the current line."""
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def word(self) -> Raw:
        """The word that begins here; an array where a bracket follows the sign of an assignment."""
        parts: list[Part] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "(" and len(parts) == 1 and re.fullmatch(r"\w+\+?=", parts[0].text):
                return Raw(tuple(parts), self.array())
            if char in " \t\n;&|()<>":
                break
            if char == "'":
                parts.append(Part("text", self.until("'"), True))
            elif char == '"':
                parts += self.double()
            elif char == "\\":
                self.at += 2
                if self.text[self.at - 1 : self.at] != "\n":
                    parts.append(Part("text", self.text[self.at - 1 : self.at], True))
            elif char in "$`":
                parts.append(self.dollar(False))
            else:
                found = re.compile(r"[^\s;&|()<>'\"\\$`]+").match(self.text, self.at)
                assert found is not None
                self.at = found.end()
                parts.append(Part("text", found[0], False))
        return Raw(tuple(parts))

    def array(self) -> tuple[Raw, ...]:
        """The words of an array literal, after its opening bracket. Raises ConfigError if the bracket is not closed."""
        self.at += 1
        words = []
        while True:
            if self.at >= len(self.text):
                raise self.fail("an array ( without its )")
            char = self.text[self.at]
            if char == ")":
                self.at += 1
                return tuple(words)
            if char in " \t\n":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif char == "#":
                self.skip_line()
            elif char in ";&|(<>":
                raise self.fail(f"{char} within an array")
            else:
                words.append(self.word())

    def until(self, end: str) -> str:
        """The text up to `end`, which is passed."""
        stop = self.text.find(end, self.at + 1)
        if stop < 0:
            raise self.fail(f"no closing {end}")
        found, self.at = self.text[self.at + 1 : stop], stop + 1
        return found

    def double(self) -> list[Part]:
        """What stands between double quotes."""
        parts, text = [], ""
        self.at += 1
        while True:
            if self.at >= len(self.text):
                raise self.fail('no closing "')
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return [*parts, Part("text", text, True)] if text or not parts else parts
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in ("\n", '"', "\\", "$", "`"):
                text += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            elif char in "$`":
                parts += [*([Part("text", text, True)] if text else []), self.dollar(True)]
                text = ""
            else:
                text += char
                self.at += 1

    def dollar(self, quoted: bool) -> Part:
        """An expansion: ``$X``, ``${X...}``, ``$((...))``, ``$(...)``, or a backquoted command."""
        text = self.text
        if text[self.at] == "`":
            return Part("output", self.until("`"), quoted)
        if (
            text.startswith("$((", self.at)
            and (inner := self.balanced(self.at + 1, "(", ")")).startswith("(")
            and inner.endswith(")")
        ):
            return Part("arithmetic", inner[1:-1], quoted)
        if text.startswith("$(", self.at):
            return Part("output", self.balanced(self.at + 1, "(", ")"), quoted)
        if text.startswith("${", self.at):
            return Part("variable", self.balanced(self.at + 1, "{", "}"), quoted)
        found = re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])").match(text, self.at)
        self.at = self.at + 1 if found is None else found.end()
        return Part("text", "$", quoted) if found is None else Part("variable", found[1], quoted)

    def balanced(self, start: int, begin: str, end: str) -> str:
        """The text within the bracket at `start`; goes on behind it."""
        depth = 0
        for at in range(start, len(self.text)):
            depth += (self.text[at] == begin) - (self.text[at] == end)
            if depth == 0:
                self.at = at + 1
                return self.text[start + 1 : at]
        raise self.fail(f"a {begin} without its {end}")


def literal(word: Raw) -> str:
    """The word where it is plain text, else nothing."""
    plain = word.array is None and all(part.kind == "text" and not part.quoted for part in word.parts)
    return "".join(part.text for part in word.parts) if plain else ""


def assignment(word: Raw) -> tuple[str, bool] | None:
    """(name, whether it is added to) where the word is an assignment."""
    if not word.parts or word.parts[0].kind != "text" or word.parts[0].quoted:
        return None
    found = re.match(r"([A-Za-z_]\w*)(\+?)=", word.parts[0].text)
    return None if found is None else (found[1], bool(found[2]))
