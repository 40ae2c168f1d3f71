"""Reads a launch script without running anything: its commands, with the variables that the script itself sets in their places.

What only the environment, another file or another program could say stays unknown, and so does a variable that is set under
a condition, once the condition ends. The reader knows quotes, comments, lines that go on, arrays, ``${X:-default}``,
``$((X * Y))``, ``if``, ``for``, ``case`` and functions as far as launch scripts use them.
"""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass, field
from typing import Callable, Iterator, Optional, Union

from megatron_telechat.errors import ConfigError

OPEN, SHUT = "\x00", "\x01"
"""Stand around the name of an unknown variable within a text."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Value = Union[str, list[str]]
"""A variable's text, or the words of an array."""
_DECLARE = {"export", "declare", "local", "readonly", "typeset"}
_BEGIN, _TURN, _END = {"if", "for", "while", "until", "case", "select"}, {"else", "elif", ";;"}, {"fi", "done", "esac", "}"}
_LEAD = {"then", "do", "else", "elif", "time", "!", "{", "exec", "eval", "command", "nohup", *_BEGIN}
"""Words before a command that are not its name."""


def unknown(name: str) -> str:
    """The text of a variable that nobody set."""
    return f"{OPEN}{re.sub(r'[^A-Za-z0-9_@*#?()-]', '.', name)[:24]}{SHUT}"


def unknown_names(text: str) -> list[str]:
    """Unknown variables of a text, as ``$NAME``."""
    return ["$" + name for name in re.findall(f"{OPEN}([^{SHUT}]*){SHUT}", text)]


def shown(text: str) -> str:
    """A text with its unknown variables as a person wrote them."""
    return text.replace(OPEN, "$").replace(SHUT, "")


@dataclass(frozen=True)
class Command:
    """A simple command: its words, the assignments before them, and the variables of the script at this point."""

    words: tuple[str, ...]
    prefix: dict[str, str]
    variables: dict[str, Value]


@dataclass
class Script:
    """A script, read.

    Attributes:
        commands: in the order of the text.
        defaults: variables for which a default of the script was taken, since the script does not set them.
    """

    commands: list[Command] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)


def slurm_lines(text: str) -> list[str]:
    """Words of the #SBATCH lines of a script."""
    return [word for line in re.findall(r"(?m)^#SBATCH[ \t]+(.*)$", text) for word in line.split(" #")[0].split()]


def read_script(text: str, variables: Optional[dict[str, Value]] = None, where: str = "Megatron command") -> Script:
    """The commands of a script.

    Args:
        variables: known before the first line.

    Raises:
        ConfigError: a quote or bracket that does not end.
    """
    text = text.replace("\r\n", "\n")
    script = Script()
    tokens = list(_Lexer(text, where).tokens())
    _Interpreter(script, dict(variables or {})).run(tokens)
    return script


# ---- text → tokens -----------------------------------------------------------------------------


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
    array: Optional[tuple["Raw", ...]] = None


Token = Union[str, Raw]
"""An operator, or a word."""


class _Lexer:
    def __init__(self, text: str, where: str):
        self.text, self.at, self.where = text, 0, where

    def fail(self, what: str) -> ConfigError:
        return ConfigError(f"cannot read the script: {what}", self.where, "paste the command as it is typed")

    def tokens(self) -> Iterator[Token]:
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
        if text.startswith("$((", self.at) and (inner := self.balanced(self.at + 1, "(", ")")).startswith("(") and inner.endswith(")"):
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


# ---- tokens → commands -------------------------------------------------------------------------


@dataclass
class _Block:
    """A condition, loop or function: the variables before it, and the names that some branch set to something else."""

    before: dict[str, Value]
    changed: set[str] = field(default_factory=set)


class _Interpreter:
    def __init__(self, script: Script, variables: dict[str, Value]):
        self.script, self.variables = script, variables
        self.blocks: list[_Block] = []

    def run(self, tokens: list[Token]) -> None:
        line: list[Raw] = []
        after = "\n"
        for at, token in enumerate([*tokens, "\n"]):
            if isinstance(token, Raw):
                line.append(token)
                continue
            if token == "(" and len(line) == 1 and tokens[at + 1 : at + 2] == [")"]:
                continue  # name ( ) { … }
            self.simple(line, maybe=after in ("&&", "||", "|", "|&") or token in ("|", "|&"))
            if token == ";;":
                self.turn()
            line, after = [], token

    def turn(self) -> None:
        """The next branch begins with what was known before the first."""
        if self.blocks:
            self.variables = dict(self.blocks[-1].before)

    def simple(self, line: list[Raw], maybe: bool) -> None:
        """One command, assignments, or a word of a block.

        Args:
            maybe: whether it depends on another command, or runs in a process of its own.
        """
        lead = ""
        while line and (lead := _literal(line[0])) in _LEAD | _END:
            self.block(lead)
            if lead in ("for", "select") and len(line) > 1:
                self.assign(_literal(line[1]), unknown(_literal(line[1])), maybe)
                return
            line = line[1:]
        if len(line) >= 2 and _literal(line[0]) == "function" or line and _literal(line[-1]) == "{":
            self.block("{")
            return
        prefix: dict[str, str] = {}
        assignments = []
        while line and (found := _assignment(line[0])):
            assignments.append((found, line[0]))
            line = line[1:]
        if not line or _literal(line[0]) in _DECLARE:
            for word in line[1:]:
                if found := _assignment(word):
                    assignments.append((found, word))
            for (name, plus), word in assignments:
                self.assign(name, self.value(name, plus, word), maybe)
            return
        for (name, plus), word in assignments:
            prefix[name] = _text(self.value(name, plus, word))
        words = tuple(piece for word in line for piece in self.expand(word))
        if words[:1] == ("unset",) or words[:1] == ("read",):
            for name in words[1:]:
                self.assign(name, unknown(name), maybe)
        elif words:
            if lead == "eval":
                found = read_script(" ".join(words), self.variables)
                self.script.commands += found.commands
                return
            self.script.commands.append(Command(words, prefix, dict(self.variables)))

    def block(self, word: str) -> None:
        if word in _BEGIN or word == "{":
            self.blocks.append(_Block(dict(self.variables)))
        elif word in _TURN:
            self.turn()
        elif word in _END and self.blocks:
            block = self.blocks.pop()
            self.variables = block.before
            for name in block.changed:
                self.assign(name, unknown(name), False)

    def assign(self, name: str, value: Value, maybe: bool) -> None:
        self.variables[name] = unknown(name) if maybe and self.variables.get(name) != value else value
        for block in self.blocks:
            if block.before.get(name) != self.variables[name]:
                block.changed.add(name)

    def value(self, name: str, plus: bool, word: Raw) -> Value:
        """What an assignment gives; `plus`: added to what is there."""
        before = self.variables.get(name, "")
        if word.array is not None:
            own = [piece for item in word.array for piece in self.expand(item)]
            return [*(before if isinstance(before, list) else [before] * bool(before)), *own] if plus else own
        # the name and its sign are the beginning of the first part
        head = word.parts[0]
        rest = Raw((Part("text", head.text[head.text.index("=") + 1 :], True), *word.parts[1:]))
        text = "".join(_text(self.part(part)) for part in rest.parts)
        if plus and isinstance(before, list):
            return [*before[:-1], (before[-1] if before else "") + text]
        return str(before) + text if plus else text

    def expand(self, word: Raw) -> list[str]:
        """A word's variables in their places; unquoted ones fall into words at their blanks."""
        out: list[str] = []
        here: Optional[str] = None
        for part in word.parts:
            value = self.part(part)
            if part.kind == "text" or part.quoted and isinstance(value, str):
                here = (here or "") + _text(value)
                continue
            items = value if part.quoted and isinstance(value, list) else _text(value).split()
            for number, item in enumerate(items):
                if number:
                    out.append(here or "")
                    here = item
                else:
                    here = (here or "") + item
            if isinstance(value, str) and value[:1].isspace() and here is not None and items and len(items) == 1 and not out:
                here = here.lstrip()
        return out if here is None else [*out, here]

    def part(self, part: Part) -> Value:
        if part.kind == "text":
            return part.text
        if part.kind == "output":
            return unknown(f"({part.text.split()[0] if part.text.split() else ''}...)")
        if part.kind == "arithmetic":
            return self.arithmetic(part.text)
        return self.variable(part.text)

    def variable(self, text: str) -> Value:
        """The value of ``X`` with its modifiers."""
        if text in ("@", "*"):
            return []  # the script's own arguments: it is read as if started without any
        if text == "#":
            return "0"
        if length := re.fullmatch(r"#(\w+)(\[[@*]\])?", text):
            value = self.variables.get(length[1])
            return unknown(text) if value is None or unknown_names(_text(value)) else str(len(value))
        found = re.fullmatch(r"(\w+)(?:\[([^\]]*)\])?(?:(:?[-=+?])(.*))?", text, re.DOTALL)
        if found is None:
            return unknown(text)
        name, index, sign, default = found.groups()
        value = self.variables.get(name)
        if sign and (value is None or sign[0] == ":" and value in ("", [])):
            return self.default(name, sign[-1], default)
        if sign and sign[-1] == "+":
            return self.quoted(default)
        if value is None:
            return unknown(name)
        if index in ("@", "*"):
            value = value if isinstance(value, list) else [value]
            return " ".join(value) if index == "*" else value
        if isinstance(value, list):
            number = index or "0"
            return value[int(number)] if number.isdigit() and int(number) < len(value) else unknown(text)
        return value

    def default(self, name: str, sign: str, text: str) -> Value:
        """``${X:-text}`` and the like where X is not set, or empty."""
        if sign == "+":
            return ""
        if sign == "?":
            return unknown(name)
        value = self.quoted(text)
        if not name.isdigit():
            self.script.defaults[name] = value
        if sign == "=":
            self.assign(name, value, False)
        return value

    def quoted(self, text: str) -> str:
        """A text within a modifier, its variables in their places."""
        lexer = _Lexer(text.strip("\"'") + '"', "Megatron command")
        lexer.at = -1
        return "".join(_text(self.part(part)) for part in lexer.double())

    def arithmetic(self, text: str) -> str:
        """Whole numbers, variables, + - * / % and brackets."""
        plain = self.quoted(text)
        plain = re.sub(r"(?<![\x00\w])[A-Za-z_]\w*", lambda name: _text(self.variables.get(name[0], unknown(name[0]))), plain)
        if names := unknown_names(plain):
            return unknown(names[0][1:])
        try:
            return str(_calculate(ast.parse(plain.strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return unknown(f"(({text}))")


_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def _calculate(node: ast.expr) -> int:
    """Value of an expression of whole numbers.

    Raises:
        ValueError: anything else.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_calculate(node.left), _calculate(node.right))
    raise ValueError("not a whole number")


def _text(value: Value) -> str:
    return " ".join(value) if isinstance(value, list) else value


def _literal(word: Raw) -> str:
    """The word where it is plain text, else nothing."""
    plain = word.array is None and all(part.kind == "text" and not part.quoted for part in word.parts)
    return "".join(part.text for part in word.parts) if plain else ""


def _assignment(word: Raw) -> Optional[tuple[str, bool]]:
    """(name, whether it is added to) where the word is an assignment."""
    if not word.parts or word.parts[0].kind != "text" or word.parts[0].quoted:
        return None
    found = re.match(r"([A-Za-z_]\w*)(\+?)=", word.parts[0].text)
    return None if found is None else (found[1], bool(found[2]))
