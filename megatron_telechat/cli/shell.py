"""Reads a launch script without running anything: its commands, with the variables that the script itself sets in their
places.

What only the environment, another file or another program could say stays unknown. Of a condition that the script
decides itself one branch is read; of another one, what the branches add to a variable is marked, and what they set is
unknown. The reader knows quotes, comments, lines that go on, arrays, ``${X:-default}``, ``$((X * Y))``, tests of texts
and numbers, ``if``, ``case``, loops and functions, as far as launch scripts use them.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_telechat.cli.shell_words import Lexer, Part, Raw, Token, assignment, literal

OPEN, SHUT = "\x00", "\x01"
"""Stand around the name of an unknown variable within a text."""
MAYBE = "\x02"
"""Begins a word that a condition adds which the script does not decide."""
Value = str | list[str]
"""A variable's text, or the words of an array."""
_DECLARE = {"export", "declare", "local", "readonly", "typeset"}
_LEAD = {"time", "exec", "eval", "command", "nohup"}
"""Words before a command that are not its name."""
_BLOCKS = {
    "if",
    "elif",
    "then",
    "else",
    "fi",
    "for",
    "while",
    "until",
    "select",
    "do",
    "done",
    "case",
    "esac",
    "{",
    "}",
    "function",
}


def unknown(name: str) -> str:
    """The text of a variable that nobody set."""
    return f"{OPEN}{re.sub(r'[^A-Za-z0-9_@*#?()-]', '.', name)[:40]}{SHUT}"


def unknown_names(text: str) -> list[str]:
    """Unknown variables of a text, as ``$NAME``."""
    return ["$" + name for name in re.findall(f"{OPEN}([^{SHUT}]*){SHUT}", text)]


def shown(text: str) -> str:
    """A text with its unknown variables as a person wrote them."""
    return text.replace(OPEN, "$").replace(SHUT, "").replace(MAYBE, "")


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
        commands: in the order of the text; of a condition that the script decides, those of its branch.
        defaults: variables for which a default of the script was taken, since the script does not set them.
    """

    commands: list[Command] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)


def slurm_lines(text: str) -> list[str]:
    """Words of the #SBATCH lines of a script."""
    return [word for line in re.findall(r"(?m)^#SBATCH[ \t]+(.*)$", text) for word in line.split(" #")[0].split()]


def read_script(text: str, variables: dict[str, Value] | None = None, where: str = "Megatron command") -> Script:
    """The commands of a script.

    Args:
        variables: known before the first line.

    Raises:
        ConfigError: a quote or bracket that does not end.
    """
    script = Script()
    _Interpreter(script, dict(variables or {})).run(list(Lexer(text.replace("\r\n", "\n"), where).tokens()))
    return script


@dataclass
class _Block:
    """A condition, loop or function.

    Attributes:
        before: variables before it.
        subject: of a case, the text that is compared; None: not a case.
        branch: whether the present branch is taken; None: the script does not decide it. Until it begins: False.
        decided: whether one of the branches up to here is taken for sure.
        tests: whether what stands here is the condition of an if; conditions: its tests, each with the operator before
            it.
        results: variables at the end of each branch that is or may be taken.
    """

    before: dict[str, Value]
    subject: str | None = None
    branch: bool | None = False
    decided: bool = False
    tests: bool = False
    conditions: list[tuple[str, bool | None]] = field(default_factory=list)
    results: list[dict[str, Value]] = field(default_factory=list)

    def begin(self, taken: bool | None) -> None:
        """A branch whose condition is `taken`."""
        self.branch = False if self.decided else None if taken and self.results else taken
        self.decided = self.decided or taken is True

    def end(self, variables: dict[str, Value]) -> None:
        """The branch ends with these variables."""
        if self.branch is not False:
            self.results.append(variables)
        self.branch = False

    def after(self) -> dict[str, Value]:
        """Variables behind the block."""
        ends = self.results if self.decided else [*self.results, self.before]
        merged = dict(self.before)
        for name in dict.fromkeys(name for end in ends for name in end):
            values = [end.get(name) for end in ends]
            if all(value == values[0] for value in values) and values[0] is not None:
                merged[name] = values[0]
            else:
                merged[name] = _either(name, self.before.get(name), [value for value in values if value is not None])
        return merged


def _either(name: str, before: Value | None, values: list[Value]) -> Value:
    """One of these values: what they add to the one before is marked, where all of them only add flags to it."""
    if before is None:
        before = [] if all(isinstance(value, list) for value in values) else ""
    size = len(before)
    if any(type(value) is not type(before) or value[:size] != before for value in values):
        return unknown(name)
    added = [value[size:] for value in values if value[size:]]
    if any(not (item[0] if isinstance(item, list) else item).lstrip().startswith(("--", MAYBE)) for item in added):
        return unknown(name)
    if isinstance(before, list):
        return [*before, *(_marked(word) for item in added for word in item)]
    return " ".join([before, *(_marked(str(item)) for item in added)])


def _marked(text: str) -> str:
    return re.sub(rf"(?<!\S)(?!{MAYBE})(?=\S)", MAYBE, text)


class _Interpreter:
    def __init__(self, script: Script, variables: dict[str, Value]):
        self.script, self.variables = script, variables
        self.blocks: list[_Block] = []

    @property
    def active(self) -> bool:
        """Whether what stands here is or may be run."""
        return all(block.branch is not False for block in self.blocks)

    def run(self, tokens: list[Token]) -> None:
        line: list[Raw] = []
        after = "\n"
        patterns: list[str] = []
        for at, token in enumerate([*tokens, "\n"]):
            if isinstance(token, Raw):
                line.append(token)
                continue
            if token == "(" and len(line) == 1 and tokens[at + 1 : at + 2] == [")"]:
                continue  # name ( ) { … }
            block = self.blocks[-1] if self.blocks else None
            if (
                block is not None
                and block.subject is not None
                and block.branch is False
                and token in ("|", ")")
                and len(line) == 1
            ):
                patterns += self.expand(line[0])
                if token == ")":
                    block.begin(_matches(block.subject, patterns))
                    self.variables, patterns = dict(block.before), []
            else:
                self.simple(line, after, token)
                if token == ";;" and self.blocks:
                    self.blocks[-1].end(self.variables)
            line, after = [], token

    def simple(self, line: list[Raw], after: str, before: str) -> None:
        """One command, assignments, or words of a block, between the operators `after` and `before` it."""
        while line and (word := literal(line[0])) in _BLOCKS:
            line = self.block(word, line[1:])
        if line and literal(line[-1]) == "{":
            line = self.block("{", [])
        if line and self.blocks and self.blocks[-1].tests:
            self.blocks[-1].conditions.append((after, _test([piece for word in line for piece in self.expand(word)])))
        elif line and self.active:
            self.command(line, maybe=after in ("&&", "||", "|", "|&") or before in ("|", "|&"))

    def command(self, line: list[Raw], maybe: bool) -> None:
        """A command or assignments.

        Args:
            maybe: whether it depends on another command, or runs in a process of its own.
        """
        lead = ""
        while len(line) > 1 and literal(line[0]) in _LEAD:
            lead, line = literal(line[0]), line[1:]
        assignments = []
        while line and (found := assignment(line[0])):
            assignments.append((found, line[0]))
            line = line[1:]
        if not line or literal(line[0]) in _DECLARE:
            assignments += [(found, word) for word in line[1:] if (found := assignment(word))]
            for (name, plus), word in assignments:
                value = self.value(name, plus, word)
                self.variables[name] = unknown(name) if maybe and self.variables.get(name) != value else value
            return
        prefix = {name: _text(self.value(name, plus, word)) for (name, plus), word in assignments}
        words = tuple(piece for word in line for piece in self.expand(word))
        if words[:1] in (("unset",), ("read",)):
            self.variables.update({name: unknown(name) for name in words[1:]})
        elif words and lead == "eval":
            self.script.commands += read_script(" ".join(words), self.variables).commands
        elif words:
            self.script.commands.append(Command(words, prefix, dict(self.variables)))

    def block(self, word: str, rest: list[Raw]) -> list[Raw]:
        """A word of a block; returns what of the line is still to be read."""
        block = self.blocks[-1] if self.blocks else None
        if word in ("if", "for", "while", "until", "select", "case", "{", "function"):
            block = _Block(dict(self.variables))
            self.blocks.append(block)
            if word == "case" and rest:
                block.subject = "".join(self.expand(rest[0]))
                return []
            block.tests = word == "if"
            if word != "if":
                block.begin(None)
                self.variables = dict(self.variables)
                if word in ("for", "select") and rest:
                    self.variables[literal(rest[0])] = unknown(literal(rest[0]))
                return []
        elif block is not None and word in ("elif", "else"):
            block.end(self.variables)
            self.variables = dict(block.before)
            block.tests = word == "elif"
            if word == "else":
                block.begin(True)
        elif block is not None and word == "then":
            block.begin(_joined(block.conditions))
            block.tests, block.conditions = False, []
            self.variables = dict(block.before)
        elif block is not None and word in ("fi", "done", "esac", "}"):
            block.end(self.variables)
            self.variables = self.blocks.pop().after()
        return rest

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
        here: str | None = None
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
            if (
                isinstance(value, str)
                and value[:1].isspace()
                and here is not None
                and items
                and len(items) == 1
                and not out
            ):
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
        if text in ("@", "*", "#"):
            own = self.variables.get("@", [])  # the script's own arguments; it is read as if started with these
            return str(len(own)) if text == "#" else own
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
            self.variables[name] = value
        return value

    def quoted(self, text: str) -> str:
        """A text within a modifier, its variables in their places."""
        lexer = Lexer(text.strip("\"'") + '"', "Megatron command")
        lexer.at = -1
        return "".join(_text(self.part(part)) for part in lexer.double())

    def arithmetic(self, text: str) -> str:
        """Whole numbers, variables, + - * / % and brackets."""
        plain = self.quoted(text)
        plain = re.sub(
            r"(?<![\x00\w])[A-Za-z_]\w*", lambda name: _text(self.variables.get(name[0], unknown(name[0]))), plain
        )
        if names := unknown_names(plain):
            return unknown(names[0][1:])
        try:
            return str(_calculate(ast.parse(plain.strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return unknown(f"(({text}))")


_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def _calculate(node: ast.expr) -> int:
    """Value of an expression of whole numbers.

    Raises:
        ValueError: anything else.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_calculate(node.left), _calculate(node.right))
    raise ValueError("not an integer")


def _text(value: Value) -> str:
    return " ".join(value) if isinstance(value, list) else value


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-gt": operator.gt,
    "-lt": operator.lt,
    "-ge": operator.ge,
    "-le": operator.le,
}


def _test(words: list[str]) -> bool | None:
    """``[ … ]`` and ``[[ … ]]`` with two texts or numbers, -n or -z; None where the script does not decide it."""
    if words[:1] == ["!"]:
        inner = _test(words[1:])
        return None if inner is None else not inner
    if words[:1] == ["true"]:
        return True
    if len(words) < 3 or (words[0], words[-1]) not in (("[", "]"), ("[[", "]]")):
        return None
    inside = words[1:-1]
    if any(unknown_names(word) or MAYBE in word for word in inside):
        return None
    if len(inside) == 2 and inside[0] in ("-n", "-z"):
        return bool(inside[1]) == (inside[0] == "-n")
    if len(inside) != 3:
        return None
    left, sign, right = inside
    if sign in _COMPARE and re.fullmatch(r"-?\d+", left) and re.fullmatch(r"-?\d+", right):
        return _COMPARE[sign](int(left), int(right))
    if sign in ("=", "==", "!=") and not re.search(r"[*?\[]", right):
        return (left == right) == (sign != "!=")
    return None


def _joined(conditions: list[tuple[str, bool | None]]) -> bool | None:
    """Tests joined by && and ||, from left to right."""
    value: bool | None = conditions[0][1] if conditions else None
    for sign, other in conditions[1:]:
        if sign not in ("&&", "||"):
            return None
        ends = sign == "||"  # the value that decides alone
        value = ends if ends in (value, other) else None if None in (value, other) else not ends
    return value


def _matches(subject: str, patterns: list[str]) -> bool | None:
    """Whether a text is one of the patterns of a branch of a case."""
    if "*" in patterns:
        return True
    if (
        unknown_names(subject)
        or MAYBE in subject
        or any(unknown_names(one) or re.search(r"[*?\[]", one) for one in patterns)
    ):
        return None
    return subject in patterns
