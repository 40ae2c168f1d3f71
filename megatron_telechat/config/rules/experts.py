"""Rules of the expert block: its chunks, its traces, its memory estimate."""

from __future__ import annotations

from typing import Iterator

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.trace import trace_steps
from megatron_telechat.errors import Problem

CHUNKS = "moe_input_chunks"
TRACE = "moe_trace"
IMBALANCE = "moe_memory_imbalance"


def chunks_hold_tokens(check: Check) -> Iterator[Problem]:
    chunks, experts = check.take(CHUNKS, "num_experts")
    if experts is None or isinstance(chunks, str):
        return
    length, samples, tensor = check.take("seq_length", "micro_batch_size", "tensor_model_parallel_size")
    context, split = check.take("context_parallel_size", "sequence_parallel")
    tokens = length * samples // (context * (tensor if split else 1))
    if chunks > tokens:
        yield check.problem(
            f"{CHUNKS}={chunks}, but a rank's part of a micro-batch has only {tokens} tokens",
            CHUNKS,
            fix=f"{flag(CHUNKS, 'auto')}, or a small number such as 4",
        )


def trace_names_steps(check: Check) -> Iterator[Problem]:
    text, last_step = check.take(TRACE, "train_iters")
    if text is None:
        return
    try:
        steps = trace_steps(text)
    except ValueError as error:
        yield check.one(f"{TRACE}={text!r} names no steps", TRACE, fix=f"it takes {error}")
        return
    if last_step and steps[0] > last_step:
        yield check.problem(
            f"{TRACE}={text} begins after the last step, train_iters={last_step}",
            TRACE,
            "train_iters",
            fix=flag(TRACE, max(1, min(10, last_step))),
        )


def imbalance_is_a_ratio(check: Check) -> Iterator[Problem]:
    ratio = check.take(IMBALANCE)
    if ratio < 1:
        yield check.one(f"{IMBALANCE}={ratio:g} is less than 1", IMBALANCE, fix="busiest over mean, 1 or more")


RULES: tuple[Rule, ...] = (chunks_hold_tokens, trace_names_steps, imbalance_is_a_ratio)
