"""Hugging Face weights <-> global tensors: one table a family, with invertible transforms.

A rule names a global tensor and the Hugging Face tensors it is made of. Both directions, the
shapes, the check for missing and unexpected names and the list for export follow from it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.huggingface.config import model_config_from_hf
from megatron_telechat.huggingface.files import CONFIG, HfFolder
from megatron_telechat.tensors.boxes import Box, Shape, intersect, whole
from megatron_telechat.tensors.table import tensor_table

_SHOWN = 10


class Transform(Protocol):
    """A bijection between some Hugging Face tensors and one box of a global tensor; only moves elements."""

    def shapes(self, shape: Shape) -> list[Shape]:
        """Shapes of the Hugging Face tensors of a box with this shape."""
        ...

    def join(self, tensors: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        """The box of the global tensor, of this shape, from its Hugging Face tensors."""
        ...

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The Hugging Face tensors of a box of the global tensor."""
        ...


class Same:
    """The tensor itself."""

    def shapes(self, shape: Shape) -> list[Shape]:
        """The shape of the box."""
        return [shape]

    def join(self, tensors: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        """The tensor; of one expert with a first axis of 1."""
        return tensors[0].reshape(shape)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The values of the box, not copied."""
        return [tensor]


class Stacked:
    """Gate and up projection, stacked on a new first axis."""

    def shapes(self, shape: Shape) -> list[Shape]:
        """[ffn, hidden], twice."""
        return [shape[1:]] * shape[0]

    def join(self, tensors: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        """[2, ffn, hidden], gate first; of one expert [1, 2, ffn, hidden]."""
        return torch.stack(list(tensors)).reshape(shape)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Gate and up, as views."""
        return list(tensor.unbind(0))


@dataclass(frozen=True)
class FusedAttention:
    """Query, key, value projections in Megatron's order: for each group its query heads, its K, its V.

    ``heads`` are the rows a group takes of each Hugging Face tensor, in heads: (rep, 1, 1) for
    separate q, k, v; (rep, 2) for TeleChat2's key_value, whose rows alternate K and V by group.
    """

    groups: int
    head_dim: int
    heads: tuple[int, ...]

    def shapes(self, shape: Shape) -> list[Shape]:
        """[groups * count * head_dim, hidden] for each count of ``heads``."""
        return [(self.groups * count * self.head_dim, shape[1]) for count in self.heads]

    def join(self, tensors: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        """Rows group by group, of each group those of every tensor: [groups * sum(heads) * head_dim, hidden]."""
        grouped = [t.reshape(self.groups, -1, shape[1]) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(shape)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each tensor again, over all groups."""
        rows = [count * self.head_dim for count in self.heads]
        grouped = tensor.reshape(self.groups, sum(rows), tensor.shape[1])
        return [part.reshape(-1, tensor.shape[1]) for part in grouped.split(rows, dim=1)]


@dataclass(frozen=True)
class Rule:
    """``key`` (with {i} for the layer) is made of ``names`` (with {i}, and {e} for the expert) by ``how``."""

    key: str
    names: tuple[str, ...]
    how: str = "same"
    optional: bool = False


_LAYER = "decoder.layers.{i}."
_TELE = "transformer.h.{i}."
_TELE_EXPERT = _TELE + "mlp.local_experts.{e}."

TELECHAT2_RULES = (
    Rule("embedding.word_embeddings.weight", ("transformer.word_embeddings.weight",)),
    Rule(_LAYER + "input_layernorm.weight", (_TELE + "input_layernorm.weight",)),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        (_TELE + "self_attention.query.weight", _TELE + "self_attention.key_value.weight"),
        "query, packed key_value",
    ),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_TELE + "self_attention.dense.weight",)),
    Rule(_LAYER + "self_attention.linear_proj.bias", (_TELE + "self_attention.dense.bias",)),
    Rule(_LAYER + "pre_mlp_layernorm.weight", (_TELE + "post_attention_layernorm.weight",)),
    Rule(_LAYER + "mlp.linear_fc1.weight", (_TELE + "mlp.gate_proj.weight", _TELE + "mlp.up_proj.weight"), "stacked"),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_TELE + "mlp.down_proj.weight",)),
    Rule(_LAYER + "mlp.linear_fc2.bias", (_TELE + "mlp.down_proj.bias",)),
    Rule(_LAYER + "mlp.router.weight", (_TELE + "mlp.router.weight",)),
    Rule(
        _LAYER + "mlp.experts.linear_fc1.weight",
        (_TELE_EXPERT + "gate_proj.weight", _TELE_EXPERT + "up_proj.weight"),
        "stacked",
    ),
    Rule(_LAYER + "mlp.experts.linear_fc2.weight", (_TELE_EXPERT + "down_proj.weight",)),
    Rule(_LAYER + "mlp.experts.linear_fc2.bias", (_TELE_EXPERT + "down_proj.bias",), optional=True),
    Rule(
        _LAYER + "mlp.shared_experts.linear_fc1.weight",
        (_TELE + "mlp.shared_experts.gate_proj.weight", _TELE + "mlp.shared_experts.up_proj.weight"),
        "stacked",
    ),
    Rule(_LAYER + "mlp.shared_experts.linear_fc2.weight", (_TELE + "mlp.shared_experts.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("transformer.ln_f.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",)),
)

_LLAMA = "model.layers.{i}."


def _llama_rules(router: str, gate: str, up: str, down: str, *more: Rule) -> tuple[Rule, ...]:
    """Of a family that names everything but its experts as Llama does; the names of an expert are below ``experts.{e}``
    beside the router."""
    folder = _LLAMA + router.rpartition(".")[0] + ".experts.{e}."
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Rule(_LAYER + "input_layernorm.weight", (_LLAMA + "input_layernorm.weight",)),
        Rule(
            _LAYER + "self_attention.linear_qkv.weight",
            tuple(_LLAMA + f"self_attn.{part}_proj.weight" for part in "qkv"),
            "query, key, value",
        ),
        Rule(_LAYER + "self_attention.linear_proj.weight", (_LLAMA + "self_attn.o_proj.weight",)),
        Rule(_LAYER + "pre_mlp_layernorm.weight", (_LLAMA + "post_attention_layernorm.weight",)),
        Rule(_LAYER + "mlp.router.weight", (f"{_LLAMA}{router}.weight",)),
        Rule(_LAYER + "mlp.experts.linear_fc1.weight", (f"{folder}{gate}.weight", f"{folder}{up}.weight"), "stacked"),
        Rule(_LAYER + "mlp.experts.linear_fc2.weight", (f"{folder}{down}.weight",)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("output_layer.weight", ("lm_head.weight",)),
        *more,
    )


MIXTRAL_RULES = _llama_rules("block_sparse_moe.gate", "w1", "w3", "w2")
QWEN3_MOE_RULES = _llama_rules(
    "mlp.gate",
    *("gate_proj", "up_proj", "down_proj"),
    *(
        Rule(f"{_LAYER}self_attention.{part}_layernorm.weight", (f"{_LLAMA}self_attn.{part}_norm.weight",))
        for part in "qk"
    ),
)

RULES = {"telechat2": TELECHAT2_RULES, "mixtral": MIXTRAL_RULES, "qwen3_moe": QWEN3_MOE_RULES}


@dataclass(frozen=True)
class Link:
    """A box of a global tensor and the Hugging Face tensors it is made of."""

    key: str
    global_shape: Shape
    box: Box
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: Transform
    per_expert: bool
    optional: bool

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The values of ``box`` from its Hugging Face tensors, in the order of ``names``."""
        return self.transform.join(tensors, self.box.shape)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Of the values of ``box``: the Hugging Face tensors, in the order of ``names``."""
        values = tensor.reshape(self.box.shape[1:] if self.per_expert else self.box.shape)
        return [part.contiguous() for part in self.transform.split(values)]


def weight_map(model: ModelConfig) -> list[Link]:
    """Every tensor of the model, in model order, as links that tile the global tensors."""
    rules = {rule.key: rule for rule in RULES[model.architecture]}
    links: list[Link] = []
    for key, spec in tensor_table(model).items():
        shape = spec.shape
        layer = re.match(r"decoder\.layers\.(\d+)\.", key)
        rule = rules.get(re.sub(r"(?<=^decoder\.layers\.)\d+", "{i}", key))
        if rule is None:
            raise CheckpointError(
                f"{key} has no place in the Hugging Face layout of {model.architecture}",
                fix="convert a model whose options its family has",
            )
        number = layer.group(1) if layer else ""
        if "{e}" in rule.names[0]:
            for expert in range(shape[0]):
                box = Box((expert,) + (0,) * (len(shape) - 1), (1,) + shape[1:])
                links.append(_link(rule, key, shape, box, shape[1:], number, expert, model))
        else:
            links.append(_link(rule, key, shape, whole(shape), shape, number, None, model))
    return links


def _link(
    rule: Rule, key: str, shape: Shape, box: Box, inner: Shape, layer: str, expert: int | None, model: ModelConfig
) -> Link:
    transform = _transform(rule.how, model)
    names = tuple(name.format(i=layer, e=expert) for name in rule.names)
    return Link(key, shape, box, names, tuple(transform.shapes(inner)), transform, expert is not None, rule.optional)


def _transform(how: str, model: ModelConfig) -> Transform:
    groups = model.query_groups
    rep = model.num_attention_heads // groups
    return {
        "same": Same(),
        "stacked": Stacked(),
        "query, packed key_value": FusedAttention(groups, model.head_dim, (rep, 2)),
        "query, key, value": FusedAttention(groups, model.head_dim, (rep, 1, 1)),
    }[how]


class HfWeights:
    """A Hugging Face folder as a source of global tensors.

    Raises CheckpointError listing every missing, unexpected or misshapen tensor.

    Attributes:
        model: its architecture.
        links: its weight map.
        absent: keys of optional tensors (expert biases) that the folder lacks; they read as zeros.
    """

    def __init__(self, folder: Path):
        self.folder = HfFolder(folder)
        where = str(Path(folder) / CONFIG)
        self.model = model_config_from_hf(self.folder.config, where, self.folder.tensors)
        self.links = weight_map(self.model)
        self._by_key: dict[str, list[Link]] = {}
        for link in self.links:
            self._by_key.setdefault(link.key, []).append(link)
        self.absent = tuple(key for key, links in self._by_key.items() if self._is_absent(links))
        self._check_names()
        self._joined = functools.lru_cache(maxsize=1)(self._join)

    def dtype(self, key: str) -> torch.dtype:
        """The narrowest dtype that holds every tensor of ``key`` exactly."""
        found = {
            self.folder.tensors[name].dtype
            for link in self._by_key[key]
            for name in link.names
            if name in self.folder.tensors
        }
        if not found:  # an absent bias is made in the dtype of its weight
            return self.dtype(key.replace(".bias", ".weight"))
        return functools.reduce(torch.promote_types, found)

    def read_link(self, link: Link) -> torch.Tensor:
        """The values of the link's box, in the dtype of its key."""
        return self._joined(link.names[0], link)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box of ``key``, which must lie inside the tensor, on the CPU and in the dtype of :meth:`dtype`."""
        box = Box(tuple(offset), tuple(shape))
        out = torch.empty(box.shape, dtype=self.dtype(key))
        for link in self._by_key[key]:
            common = intersect(link.box, box)
            if common is not None:
                out[common.slices(box.offset)] = self.read_link(link)[common.slices(link.box.offset)]
        return out

    def _join(self, name: str, link: Link) -> torch.Tensor:
        dtype = self.dtype(link.key)
        if link.key in self.absent:
            return torch.zeros(link.box.shape, dtype=dtype)
        return link.join([self.folder.read(name).to(dtype) for name in link.names])

    def _is_absent(self, links: Sequence[Link]) -> bool:
        return links[0].optional and not any(name in self.folder.tensors for link in links for name in link.names)

    def _check_names(self) -> None:
        found = self.folder.tensors
        wanted = {
            name: shape
            for link in self.links
            if link.key not in self.absent
            for name, shape in zip(link.names, link.shapes, strict=True)
        }
        problems = []
        missing = [name for name in wanted if name not in found]
        if missing == ["lm_head.weight"]:
            problems.append(
                Problem(
                    "lm_head.weight is missing",
                    str(self.folder.folder),
                    "use a complete checkpoint; the published file would load this one silently "
                    "with a random output layer",
                )
            )
        elif missing:
            problems.append(_names_problem("missing", missing, self.folder.folder))
        unexpected = [name for name in found if name not in wanted]
        if unexpected:
            problems.append(_names_problem("unexpected", unexpected, self.folder.folder))
        wrong = [
            f"{name} {list(found[name].shape)}, config.json says {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name].shape != tuple(shape)
        ]
        if wrong:
            problems.append(_names_problem("of another shape", wrong, self.folder.folder))
        odd = [
            f"{name} ({found[name].dtype})"
            for name in wanted
            if name in found and not found[name].dtype.is_floating_point
        ]
        if odd:
            problems.append(_names_problem("not floating point", odd, self.folder.folder))
        if problems:
            raise CheckpointError(problems)


def _names_problem(what: str, names: Sequence[str], folder: Path) -> Problem:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return Problem(
        f"{len(names)} tensors {what}: {', '.join(names[:_SHOWN])}{more}",
        str(folder),
        "check that config.json belongs to these weights and that all files are there",
    )


def hf_tensor_shapes(model: ModelConfig) -> Mapping[str, Shape]:
    """Names and shapes of the Hugging Face tensors of a model, in model order."""
    return {name: shape for link in weight_map(model) for name, shape in zip(link.names, link.shapes, strict=True)}
