"""The picture of the rooms is that of the source, and readable."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from megatron_telechat.cli import draw_architecture as drawing
from megatron_telechat.cli.draw_architecture import Room
from megatron_telechat.errors import ConfigError


@pytest.fixture(scope="module")
def source() -> dict[str, Room]:
    return drawing.read_rooms(drawing.PACKAGE)


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "house"


def test_the_picture_in_docs_is_that_of_the_source(source):
    drawn = drawing.picture(source)
    there = drawing.DEFAULT_OUTPUT.read_text(encoding="utf-8")
    assert there == drawn, "rooms or arrows have changed: python tools/draw_architecture.py"


def test_rooms_are_read_from_folders_files_and_every_form_of_import(tmp_path):
    rooms = drawing.read_rooms(
        package(
            tmp_path,
            {
                "errors.py": '"""Errors: what and where."""\n',
                "low/__init__.py": '"""Below. More of it."""\nfrom .. import errors\n',
                "high/__init__.py": "",
                "high/deep/one.py": "def f():\n    from house.low import x\n    import torch.nn\n",
                "high/two.py": "import house.errors\nfrom ..high import deep\nfrom . import three\n",
                "data.yaml": "",
            },
        )
    )
    assert rooms == {
        "errors": Room("Errors", frozenset(), False),
        "low": Room("Below", frozenset({"errors"}), False),
        "high": Room("", frozenset({"low", "errors"}), True),
    }
    assert drawing.arrows(rooms) == {"errors": set(), "low": {"errors"}, "high": {"low"}}


def test_a_circle_is_named():
    rooms = {"a": Room("", frozenset("b"), False), "b": Room("", frozenset("c"), False)}
    rooms["c"] = Room("", frozenset("a"), False)
    with pytest.raises(ConfigError, match="a → b → c → a"):
        drawing.arrows(rooms)


def test_no_room_covers_another_and_every_arrow_goes_down(source):
    drawn = drawing.arrows(source)
    middle, paths, width, tall = drawing.places(drawn)
    for one, other in combinations(drawn, 2):
        (x, y), (other_x, other_y) = middle[one], middle[other]
        assert abs(x - other_x) >= drawing.BOX or abs(y - other_y) >= drawing.HEIGHT, (one, other)
    assert sorted((path[0], path[-1]) for path in paths) == sorted((a, b) for a in drawn for b in drawn[a])
    for path in paths:
        heights = [middle[node][1] for node in path]
        assert heights == sorted(set(heights))
    for x, y in middle.values():
        assert drawing.MARGIN <= x <= width - drawing.MARGIN and drawing.MARGIN <= y <= tall - drawing.MARGIN


def test_the_tool_writes_where_it_is_told(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawing, "read_rooms", lambda package: source)
    assert drawing.main(["--output", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg ")
    assert "rooms" in capsys.readouterr().out
    assert drawing.main(["--output", str(tmp_path / "no" / "a.svg")]) == 6
    assert "the picture cannot be written" in capsys.readouterr().err
