"""The pipeline layout as a picture: a row a stage, a cell a virtual stage, a letter a layer."""

from __future__ import annotations

from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.schema import RunConfig

LONGEST_RUN = 24
"""Layers of one cell that are drawn one by one; a longer cell is shortened as in t*30."""


def layout_picture(run: RunConfig) -> str:
    """Stages x virtual stages with the layers of each.

        stage 0   E tttt  0-3    tttt  8-11
        stage 1     RRtt  4-7    tttt  12-15 L

    E embedding, t decoder layer, R one recomputed in full, r one recomputed in part, L output layer and loss;
    the numbers are the zero-based global layers. A legend follows where R or r occur.

    Raises:
        ConfigError: the layout or the recompute plan does not fit the model.
    """
    layout, plan = pipeline_layout(run), recompute_plan(run)
    letters = ["R" if "full" in modes else "r" if modes else "t" for modes in plan]
    rows = [
        [_cell(layout, rank, virtual_stage, letters) for virtual_stage in range(layout.num_virtual_stages)]
        for rank in range(layout.pipeline_size)
    ]
    columns = [max(len(row[virtual_stage]) for row in rows) for virtual_stage in range(layout.num_virtual_stages)]
    digits = len(str(layout.pipeline_size - 1))
    lines = []
    for rank, row in enumerate(rows):
        cells = "  |  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=False))
        lines.append(f"stage {rank:>{digits}}   {cells}".rstrip())
    legend = [
        text
        for letter, text in (("R", "R: recomputed in full"), ("r", f"r: recomputed in part ({_modules(plan)})"))
        if letter in letters
    ]
    return "\n".join(lines + ["  ".join(legend)] * bool(legend))


def _cell(layout: PipelineLayout, rank: int, virtual_stage: int, letters: list[str]) -> str:
    layers = layout.layers_of(rank, virtual_stage)
    drawn = "".join(letters[layer] for layer in layers)
    if len(drawn) > LONGEST_RUN:
        drawn = " ".join(f"{letter}*{count}" for letter, count in _runs(drawn))
    numbers = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}" if layers else "no layers"
    head = "E " if layout.has_embedding(rank, virtual_stage) else "  "
    tail = " L" if layout.has_loss(rank, virtual_stage) else ""
    return f"{head}{drawn}  {numbers}{tail}"


def _runs(text: str) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for letter in text:
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return runs


def _modules(plan: tuple[tuple[str, ...], ...]) -> str:
    return ", ".join(dict.fromkeys(mode for modes in plan for mode in modes if mode != "full"))
