"""Two ranks, EP2: runs whose number of chunks is chosen, kept, refused; what the choice leaves behind; traces."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from tests.harness import Cases  # noqa: E402
from tests.training.runs import MOE, make_trainer  # noqa: E402

cases = Cases()
FOLDER = Path(os.environ.get("CHUNKS_DIR", "."))
EP2 = "--expert-model-parallel-size 2 --no-fold-tensor-into-experts --use-distributed-optimizer --train-iters 6".split()
AUTO = [*MOE, *EP2, "--moe-input-chunks", "auto"]


def steps(trainer, count: int) -> list[list[float]]:
    iterators = trainer.training_iterators()
    results = [trainer.take_step(iterators)[0] for _ in range(count)]
    return [[result.loss, result.grad_norm] for result in results]


def numbers(trainer) -> list[int]:
    from megatron_telechat.moe import moe_blocks

    return sorted({block.num_chunks for block in moe_blocks(trainer.virtual_stages)})


def with_trainer(flags, name: str, use):
    from megatron_telechat import parallel

    trainer = make_trainer(flags, FOLDER / name)
    try:
        return use(trainer)
    finally:
        trainer.release()
        parallel.destroy(keep_world=True)


class chosen:
    """The chooser says this number, for a test that must not depend on timing; None: it must not be asked."""

    def __init__(self, number):
        self.number = number

    def __enter__(self):
        from megatron_telechat.moe.autotune import ChunkChoice
        from megatron_telechat.training import chunks

        def choose(*_):
            assert self.number is not None, "measured, though the checkpoint holds a number"
            return ChunkChoice(self.number, "for the test", {1: 2.0, self.number: 1.0})

        self.module, self.real = chunks, chunks.choose_num_chunks
        chunks.choose_num_chunks = choose

    def __exit__(self, *_):
        self.module.choose_num_chunks = self.real


@cases.case
def resume_takes_the_number_of_the_checkpoint():
    def whole(trainer):
        first = steps(trainer, 2)
        trainer._save()
        return {"numbers": numbers(trainer), "first": first, "rest": steps(trainer, 3)}

    def again(trainer):
        message = trainer.auto.chunks.message
        return {"numbers": numbers(trainer), "step": trainer.step, "message": message, "rest": steps(trainer, 3)}

    with chosen(3):
        found = {"whole": with_trainer(AUTO, "resumed", whole)}
    (FOLDER / "resumed" / "measured.json").unlink(missing_ok=True)
    torch.distributed.barrier()
    with chosen(None):
        found["again"] = with_trainer(AUTO, "resumed", again)
    with chosen(2):
        found["other_batch"] = with_trainer([*AUTO, "--micro-batch-size", "1"], "resumed", again)
        found["fixed"] = with_trainer(
            [*AUTO, "--moe-input-chunks", "4"], "resumed", lambda t: [numbers(t), t.auto.chunks]
        )
    return found


@cases.case
def nothing_is_measured_twice_before_the_first_checkpoint():
    """A run that ended before it saved, and two whose file says nothing that can be used."""
    with chosen(3):
        found = [with_trainer(AUTO, "unsaved", numbers)]
    with chosen(None):
        found.append(with_trainer(AUTO, "unsaved", numbers))
    for content in ('{"moe_input_', '{"moe_input_chunks": {"num_chunks": -3, "conditions": {}}}'):
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            (FOLDER / "unsaved" / "measured.json").write_text(content)
        with chosen(2):
            found.append(with_trainer(AUTO, "unsaved", numbers))
    return found


@cases.case
def measuring_leaves_no_trace():
    """Dropout, so that a generator that moved on would show; the real measurement."""
    import torch

    noisy = [*AUTO, "--hidden-dropout", "0.1", "--overlap-grad-reduce", "--overlap-param-gather", "--seq-length", "64"]

    def run(trainer):
        blocks = [module for stage in trainer.virtual_stages for module in stage.modules() if hasattr(module, "clock")]
        gradients = sum(
            float(buffer.grad_data.abs().sum())
            for stage in trainer.virtual_stages
            for buffer in stage.buffers + stage.expert_parallel_buffers
        )
        counted = sum(block.router.statistics.tokens for block in blocks)
        state = trainer.backend.rng_state()
        generators = [
            float(state["torch"].double().sum()),
            *sorted(float(s.double().sum()) for s in state["tracker"].values()),
        ]
        return {
            "numbers": numbers(trainer),
            "left": [gradients, counted],
            "rng": generators,
            "steps": steps(trainer, 3),
        }

    measured = with_trainer(noisy, "measured", run)
    fixed = with_trainer([*noisy, "--moe-input-chunks", str(measured["numbers"][0])], "fixed", run)
    events = [json.loads(line) for line in (FOLDER / "measured" / "metrics.jsonl").read_text().splitlines()]
    torch.distributed.barrier()
    return {"measured": measured, "fixed": fixed, "events": events}


@cases.case
def ranks_that_disagree_are_refused():
    from megatron_telechat.errors import UserError

    try:
        make_trainer([*MOE, *EP2, "--moe-input-chunks", str(2 + int(os.environ["RANK"]))], FOLDER / "disagree")
    except UserError as error:
        return [type(error).__name__, error.render()]
    return None


@cases.case
def choices_that_differ_are_refused():
    from megatron_telechat.errors import UserError

    try:
        with chosen(2 + int(os.environ["RANK"])):
            make_trainer(AUTO, FOLDER / "differ")
    except UserError as error:
        return [type(error).__name__, error.render()]
    return None


@cases.case
def evaluation_does_not_count_as_exposed():
    def run(trainer):
        clocks = trainer.meter._clocks["a2a_exposed"]
        result, lr = trainer.take_step(trainer.training_iterators())
        trainer._evaluate()
        after = sum(clock.take_exposed_s() for clock in clocks)
        record = trainer.meter.record(trainer.position, lr, result)
        return {"clocks": len(clocks), "after": after, "share": record["a2a_exposed"]}

    return with_trainer(
        [*MOE, *EP2, "--moe-input-chunks", "2", "--eval-interval", "5", "--eval-iters", "1"], "evaluated", run
    )


if __name__ == "__main__":
    cases.main()
