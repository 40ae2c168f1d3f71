"""The rooms of the package and the arrows between them, drawn from the imports of the source as one SVG.

A room is a folder (or a file, as ``errors.py``) right below the package. An arrow from A to B says that A imports B;
an arrow that follows from others (A → B → C gives A → C) is not drawn. New rooms appear by themselves.
"""

from __future__ import annotations

import ast
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, run_tool
from megatron_telechat.errors import ConfigError, ResourceError

PACKAGE = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = PACKAGE.parent / "docs" / "images" / "architecture.svg"
HEAVY = {"torch", "megatron", "transformer_engine"}

BOX, HEIGHT, GAP, RISE, MARGIN = 212, 62, 34, 112, 24
"""Width and height of a room, the gap beside it, the distance of two levels, the margin; pixels."""
LIGHT, DARK = ("#ecfdf5", "#059669"), ("#eff6ff", "#2563eb")
"""Fill and border of a room without torch, and of one with it."""
SWEEPS = 24


@dataclass(frozen=True)
class Room:
    """One room: what its docstring says first, the rooms it imports, whether any of its files imports torch."""

    title: str
    imports: frozenset[str]
    torch: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0, 2 for arguments, 6 where the picture cannot be written)."""
    return run_tool(_draw, argv)


def _draw(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/draw_architecture.py", description="Draw the rooms and arrows from the imports.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default docs/images/architecture.svg")
    args = parser.parse_args(argv)
    rooms = read_rooms(PACKAGE)
    try:
        args.output.write_text(picture(rooms), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"the picture cannot be written: {error}", str(args.output), "--output FILE.svg") from None
    print(f"{args.output}: {len(rooms)} rooms, {sum(map(len, arrows(rooms).values()))} arrows")
    return 0


def read_rooms(package: Path) -> dict[str, Room]:
    """Room → what its source says; the package's own ``__init__.py`` is no room."""
    places = [p for p in sorted(package.iterdir()) if (p / "__init__.py").exists() or p.suffix == ".py"]
    names = {place.stem: place for place in places if place.stem != "__init__"}
    out = {}
    for name, place in names.items():
        modules = set()
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            modules |= set(_imported(path, package))
        own = {parts[1] for parts in modules if parts[0] == package.name and len(parts) > 1}
        first = ast.get_docstring(_parsed(place / "__init__.py" if place.is_dir() else place)) or ""
        torch = any(parts[0] in HEAVY for parts in modules)
        out[name] = Room(_title(first), frozenset(own & set(names)) - {name}, torch)
    return out


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(path: Path, package: Path) -> Iterator[tuple[str, ...]]:
    """The dotted names that a file imports, relative ones resolved, as tuples of their parts."""
    here = path.relative_to(package.parent).parent.parts
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((*module, alias.name) for alias in node.names)


def _title(docstring: str) -> str:
    """The docstring's first clause: up to its first colon or full stop."""
    first = docstring.split("\n\n")[0].replace("`", "")
    return " ".join(first.split(":")[0].split(". ")[0].split()).rstrip(".")


def arrows(rooms: Mapping[str, Room]) -> dict[str, set[str]]:
    """Room → the rooms it imports, without those that it reaches through another.

    Raises:
        ConfigError: rooms import each other in a circle.
    """
    reached: dict[str, set[str]] = {}

    def reach(name: str, path: tuple[str, ...]) -> set[str]:
        if name in path:
            raise ConfigError(f"rooms import each other in a circle: {' → '.join((*path, name))}", "imports")
        if name not in reached:
            reached[name] = set().union(*({to} | reach(to, (*path, name)) for to in rooms[name].imports))
        return reached[name]

    for name in rooms:
        reach(name, ())
    return {
        name: {to for to in room.imports if not any(to in reached[other] for other in room.imports)}
        for name, room in rooms.items()
    }


def levels(drawn: Mapping[str, set[str]]) -> dict[str, int]:
    """Room → its height: 0 where it imports nothing, else one more than the highest room it imports."""
    out: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in out:
            out[name] = max((level(to) + 1 for to in drawn[name]), default=0)
        return out[name]

    for name in drawn:
        level(name)
    return out


def _rows(drawn: Mapping[str, set[str]]) -> tuple[list[list[str]], dict[str, set[str]], list[list[str]]]:
    """The nodes of each level in drawing order, the neighbours below each, and each arrow as a path of nodes.

    An arrow over several levels passes through a node of its own on each level between, named ``from>to>level``, so
    that it goes between the rooms and not behind them. The order comes from sweeps that put each node at the mean
    place of its neighbours.
    """
    height = levels(drawn)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for name in sorted(drawn):
        rows[height[name]].append(name)
    below: dict[str, set[str]] = {name: set() for name in drawn}
    paths = []
    for name in sorted(drawn):
        for to in sorted(drawn[name]):
            between = [f"{name}>{to}>{level}" for level in range(height[name] - 1, height[to], -1)]
            for level, node in zip(range(height[name] - 1, height[to], -1), between, strict=True):
                rows[level].append(node)
            path = [name, *between, to]
            for upper, lower in zip(path, path[1:], strict=False):
                below.setdefault(upper, set()).add(lower)
            paths.append(path)
    return rows, below, paths


def places(drawn: Mapping[str, set[str]]) -> tuple[dict[str, tuple[float, float]], list[list[str]], float, float]:
    """Middle of every node, the arrows as paths of nodes, width and height of the picture; pixels."""
    rows, below, paths = _rows(drawn)
    near: dict[str, set[str]] = {node: set() for row in rows for node in row}
    for upper, lowers in below.items():
        for lower in lowers:
            near[upper].add(lower)
            near[lower].add(upper)
    wide = {node: GAP if ">" in node else BOX + GAP for row in rows for node in row}
    x = {node: float(at * BOX) for row in rows for at, node in enumerate(row)}
    for sweep in range(SWEEPS):
        order = rows if sweep % 2 else rows[::-1]
        for row in order:
            wanted = {node: math.fsum(x[other] for other in near[node]) / max(len(near[node]), 1) for node in row}
            row.sort(key=lambda node: (wanted[node], node))
            x.update(_spread(row, wanted, wide))
    left = min(x[node] - wide[node] / 2 for node in x)
    right = max(x[node] + wide[node] / 2 for node in x)
    tall = MARGIN * 2 + (len(rows) - 1) * RISE + HEIGHT + 34
    middle = {
        node: (x[node] - left + MARGIN, MARGIN + HEIGHT / 2 + (len(rows) - 1 - level) * RISE)
        for level, row in enumerate(rows)
        for node in row
    }
    return middle, paths, right - left + 2 * MARGIN, tall


def _spread(row: Sequence[str], wanted: Mapping[str, float], wide: Mapping[str, float]) -> dict[str, float]:
    """Places near the wanted ones, in the order of the row and without overlap; their mean is the wanted one."""
    out: dict[str, float] = {}
    edge = float("-inf")
    for node in row:
        out[node] = max(wanted[node], edge + wide[node] / 2)
        edge = out[node] + wide[node] / 2
    shift = sum(out[node] - wanted[node] for node in row) / len(row)
    return {node: place - shift for node, place in out.items()}


def picture(rooms: Mapping[str, Room]) -> str:
    """The SVG. The same rooms give the same text."""
    middle, paths, width, tall = places(arrows(rooms))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{tall:.0f}" '
        f'viewBox="0 0 {width:.0f} {tall:.0f}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L10 5 L0 10 z" fill="#64748b"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *(_arrow([middle[node] for node in path]) for path in paths),
        *(_box(name, room, *middle[name]) for name, room in rooms.items()),
        *_legend(tall - MARGIN),
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def _arrow(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line from the lower edge of the first room, through the nodes between, to the upper edge of the last."""
    (x, y), *between, (end_x, end_y) = points
    y, end_y = y + HEIGHT / 2, end_y - HEIGHT / 2
    path = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in [*between, (end_x, end_y)]:
        half = (y + to_y) / 2
        path += f" C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return f'<path d="{path}" fill="none" stroke="#64748b" stroke-width="1.4" marker-end="url(#head)"/>'


def _box(name: str, room: Room, x: float, y: float) -> str:
    fill, border = DARK if room.torch else LIGHT
    lines = textwrap.wrap(room.title, 34, max_lines=2, placeholder=" …", break_on_hyphens=False)
    first = y + (5 if not lines else -4 if len(lines) == 1 else -11)
    text = [f'<text x="{x:.1f}" y="{first:.1f}" font-size="15" font-weight="bold" fill="#0f172a">{escape(name)}</text>']
    for number, line in enumerate(lines):
        text.append(
            f'<text x="{x:.1f}" y="{first + 17 + 14 * number:.1f}" font-size="11" fill="#475569">{escape(line)}</text>'
        )
    return (
        f'<g text-anchor="middle"><rect x="{x - BOX / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{BOX}" height="{HEIGHT}" '
        f'rx="8" fill="{fill}" stroke="{border}" stroke-width="1.5"/>{"".join(text)}</g>'
    )


def _legend(y: float) -> Iterator[str]:
    x = MARGIN
    for (fill, border), text, wide in ((LIGHT, "never imports torch", 160), (DARK, "imports torch", 120)):
        yield f'<rect x="{x}" y="{y - 11}" width="14" height="14" rx="3" fill="{fill}" stroke="{border}"/>'
        yield f'<text x="{x + 20}" y="{y}" font-size="11" fill="#475569">{text}</text>'
        x += wide
    arrow = "A → B: A imports B (arrows that follow from others are left out)"
    yield f'<text x="{x}" y="{y}" font-size="11" fill="#475569">{arrow}</text>'
