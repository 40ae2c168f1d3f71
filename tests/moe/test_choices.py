"""Choices that are given to a router, kept from a first pass, and noted."""

from __future__ import annotations

import pytest
import torch

from megatron_telechat.moe.choices import FirstPass, RoutingTape, gap_to_runner_up, pack, picked


@pytest.mark.parametrize("experts,bytes_each", [(2, 1), (256, 1), (257, 2), (32768, 2), (32769, 4)])
def test_choices_take_as_few_bytes_as_hold_them(experts, bytes_each):
    chosen = torch.tensor([[0, experts - 1]])
    assert pack(chosen, experts).element_size() == bytes_each
    kept = FirstPass()
    assert kept.experts is None
    kept.keep(chosen, experts)
    assert torch.equal(kept.experts, chosen) and kept.experts.dtype == torch.int64


def test_the_gap_is_between_the_last_choice_and_the_next():
    logits = torch.tensor([[0.5, 3.0, 2.0, 1.75], [1.0, 1.0, 1.0, 0.0]])
    assert gap_to_runner_up(logits, logits.topk(2).indices).tolist() == [0.25, 0.0]
    assert gap_to_runner_up(logits, logits.topk(4).indices).tolist() == [float("inf")] * 2
    assert logits[0, 0] == 0.5, "the logits stay as they were"


def test_picked_logits_and_their_gradient_are_those_of_top_k():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values, experts = one.topk(3)
    again = picked(other, experts)
    (values * direction).sum().backward()
    (again * direction).sum().backward()
    assert torch.equal(values, again) and torch.equal(one.grad, other.grad)


def test_a_tape_gives_each_micro_batch_its_choices_and_notes_the_routers_own():
    first, second = torch.tensor([[3, 1]]), torch.tensor([[0, 2]])
    tape = RoutingTape([pack(first, 4), pack(second, 4)], notes=True)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    own = logits.topk(2).indices
    assert torch.equal(tape.choose(logits, own), first) and torch.equal(tape.choose(logits, own), second)
    assert tape.calls == 2 and [noted.experts.tolist() for noted in tape.noted] == [[[0, 1]]] * 2
    assert RoutingTape(None, notes=False).choose(logits, own) is own
