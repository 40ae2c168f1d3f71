"""Rules of the expert block: its choices, its chunks, its traces and recordings, its memory estimate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.routing import Recording, is_recording, read_recording
from megatron_telechat.config.trace import trace_steps
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError, Problem

CHUNKS = "moe_input_chunks"
TRACE = "moe_trace"
RECORD, REPLAY, STEPS = "moe_routing_record", "moe_routing_replay", "moe_routing_steps"
IMBALANCE = "moe_memory_imbalance"


def probabilities_fill_rows(check: Check) -> Iterator[Problem]:
    """Between ranks, fp32 probabilities travel in rows of the hidden size."""
    hidden, precision, experts = check.take("hidden_size", "precision", "num_experts")
    if experts is not None and hidden % 2 and precision != "fp32":
        yield check.problem(
            f"hidden_size={hidden} is odd, and the experts' probabilities of 4 bytes travel in rows of {precision}",
            "hidden_size",
            "precision",
            fix=flag("hidden_size", hidden + 1),
        )


def grouped_products_are_aligned(check: Check) -> Iterator[Problem]:
    """A row of every operand of the experts' products fills whole pieces of memory; how large these are depends on the
    device. ``auto`` is settled on the ranks, which then check for themselves."""
    hidden, width, parts, precision, experts, device = check.take(
        "hidden_size", "moe_ffn_hidden_size", "expert_tensor_parallel_size", "precision", "num_experts", "device"
    )
    if experts is None or device not in DEVICE_KINDS or not width or not parts or width % parts:
        return
    multiple = max(1, DEVICE_KINDS[device].grouped_alignment_bytes // (4 if precision == "fp32" else 2))
    for name, size, unit in (("hidden_size", hidden, multiple), ("moe_ffn_hidden_size", width, multiple * parts)):
        if size % unit:
            yield check.problem(
                f"{name}={size} is not a multiple of {unit}, which the grouped products on {device} need in "
                f"{precision}",
                name,
                fix=flag(name, -(-size // unit) * unit),
            )


def chunks_hold_tokens(check: Check) -> Iterator[Problem]:
    """A rank has at least one token of a micro-batch for each input chunk."""
    chunks, experts = check.take(CHUNKS, "num_experts")
    if experts is None or isinstance(chunks, str):
        return
    length, samples, context = check.take("seq_length", "micro_batch_size", "context_parallel_size")
    check.take("tensor_model_parallel_size", "sequence_parallel")
    tokens = length * samples // (context * check.run.parallel.sequence_parallel_size)
    if chunks > tokens:
        yield check.problem(
            f"{CHUNKS}={chunks}, but a rank's part of a micro-batch has only {tokens} tokens",
            CHUNKS,
            fix=f"{flag(CHUNKS, 'auto')}, or a small number such as 4",
        )


def names_steps(check: Check) -> Iterator[Problem]:
    """Step ranges (moe_trace, cp_trace, moe_routing_steps) can be read and begin within the run."""
    for name in (TRACE, "cp_trace", STEPS):
        text, last_step = check.take(name, "train_iters")
        if text is None:
            continue
        try:
            steps = trace_steps(text)
        except ValueError as error:
            yield check.one(f"{name}={text!r} names no steps", name, fix=f"it takes {error}")
            continue
        if last_step and steps[0] > last_step:
            yield check.problem(
                f"{name}={text} begins after the last step, train_iters={last_step}",
                name,
                "train_iters",
                fix=flag(name, max(1, min(10, last_step))),
            )


def routing_steps_need_routing(check: Check) -> Iterator[Problem]:
    """moe_routing_steps needs a recording to write or to replay."""
    steps, record, replay = check.take(STEPS, RECORD, REPLAY)
    if steps is not None and record is None and replay is None:
        yield check.problem(
            f"{STEPS}={steps}, but nothing is recorded or replayed",
            STEPS,
            fix="--moe-routing-record DIR, or --moe-routing-replay DIR",
        )


def replay_fits(check: Check) -> Iterator[Problem]:
    """A recording of another shape has no choice for some tokens, or one that no router of this run could make."""
    path, experts = check.take(REPLAY, "num_experts")
    if path is None or experts is None:
        return
    recording = _read(path)
    if isinstance(recording, Problem):
        yield check.one(recording.what, REPLAY, fix=recording.fix)
        return
    if recording.replayed:
        yield check.one(
            f"{REPLAY} {path} was recorded during a replay: it holds what the routers would have chosen, not what was "
            f"used",
            REPLAY,
            fix="replay the recording that that run replayed",
        )
        return
    differences = recording.differences(check.run)
    if differences:
        yield check.problem(
            f"the recording does not fit the run: {'; '.join(differences)}",
            REPLAY,
            fix="the sizes of the recorded run, or a recording of this one",
        )
        return
    yield from _missing_steps(check, recording)


def _missing_steps(check: Check, recording: Recording) -> Iterator[Problem]:
    """Of the steps that are asked for, or of those behind the first recorded one: where a resume begins is not known
    here."""
    text, last_step = check.take(STEPS, "train_iters")
    there = recording.steps()
    if not there:
        yield check.one(
            f"{REPLAY} {recording.path} holds no step",
            REPLAY,
            fix="a recording that was not cut off before its first step",
        )
        return
    wanted = trace_steps(text) if text is not None else range(there[0], last_step + 1)
    missing = sorted(set(wanted) - set(there))
    if missing:
        yield check.problem(
            f"the recording holds steps {there[0]} to {there[-1]}, and not step {missing[0]}"
            + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""),
            REPLAY,
            "train_iters",
            fix=f"{flag(STEPS, f'{there[0]}-{there[-1]}')} to replay these alone, or --train-iters {there[-1]}",
        )


def record_has_a_place(check: Check) -> Iterator[Problem]:
    """A recording goes on where it was cut off; another run's is not written over."""
    path, replay, experts = check.take(RECORD, REPLAY, "num_experts")
    if path is None or experts is None:
        return
    if replay is not None and os.path.realpath(path) == os.path.realpath(replay):
        yield check.problem(
            f"{path} is both the recording to write and the one to replay",
            RECORD,
            REPLAY,
            fix="another folder for --moe-routing-record",
        )
        return
    if not is_recording(Path(path)):
        return
    recording = _read(path)
    if isinstance(recording, Problem):
        yield check.one(recording.what, RECORD, fix="another folder for --moe-routing-record")
        return
    differences = recording.differences(check.run)
    if recording.replayed != (replay is not None):
        differences.append(
            f"{'no replay' if replay is None else 'a replay'}, recorded {'one' if recording.replayed else 'none'}"
        )
    if differences:
        yield check.problem(
            f"{path} holds the recording of another run: {'; '.join(differences)}",
            RECORD,
            fix="another folder, or delete that one",
        )


def _read(path: str) -> Recording | Problem:
    try:
        return read_recording(Path(path))
    except ConfigError as error:
        return error.problems[0]


def one_expert_a_token_learns_nothing(check: Check) -> Iterator[Problem]:
    """A softmax over one chosen logit is constant: with top-k 1 the loss does not train the router."""
    topk, experts = check.take("moe_router_topk", "num_experts")
    if experts is None or topk != 1:
        return
    if check.described:
        check.notes.append("moe_router_topk=1 can be planned, but not trained here: see the message of the training")
        return
    yield check.problem(
        "moe_router_topk=1: the softmax over one chosen logit is 1 whatever the logit, so the loss would never train "
        "the router",
        "moe_router_topk",
        fix=f"{flag('moe_router_topk', 2)} or more" if experts > 1 else "leave --num-experts out for a dense model",
    )


def imbalance_is_a_ratio(check: Check) -> Iterator[Problem]:
    """moe_memory_imbalance is a maximum over a mean, so at least 1."""
    ratio = check.take(IMBALANCE)
    if ratio < 1:
        yield check.one(f"{IMBALANCE}={ratio:g} is less than 1", IMBALANCE, fix="busiest over mean, 1 or more")


RULES: tuple[Rule, ...] = (
    one_expert_a_token_learns_nothing,
    probabilities_fill_rows,
    grouped_products_are_aligned,
    chunks_hold_tokens,
    names_steps,
    routing_steps_need_routing,
    replay_fits,
    record_has_a_place,
    imbalance_is_a_ratio,
)
