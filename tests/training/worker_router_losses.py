"""Gradients of the routers' losses alone, under masks and padding, in many layouts; and a step that learns nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import MOE, gradient_boxes, make_trainer  # noqa: E402

BASE = [
    *(word for word in MOE if word != "--mock-data"),
    *"--vocab-size 320 --seq-length 64 --micro-batch-size 1 --global-batch-size 4 --sft --split 1 --num-workers "
    "1".split(),
    *"--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.003 --train-iters 3".split(),
]
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
HF = "--moe-aux-loss-formula hf"
LAYOUTS = {
    1: {
        "one": "",
        "recompute_full": "--recompute-granularity full",
        "hf": HF,
        "hf_recompute_full": f"{HF} --recompute-granularity full",
        "packed": "",
        "packed_apart": "--reset-attention-mask",
    },
    2: {
        "dp2": "",
        "ep2": "--expert-model-parallel-size 2 --no-fold-tensor-into-experts",
        "tp2_sp_recompute": f"{TP2} --recompute-granularity full",
        "pp2_interleaved_recompute": f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --recompute-granularity full",
        "cp2": "--context-parallel-size 2",
        "packed_apart_cp2": "--context-parallel-size 2 --reset-attention-mask",
        "packed_tp2_sp": TP2,
        "packed_pp2": PP2,
        "hf_tp2_sp": f"{HF} {TP2}",
        "hf_pp2": f"{HF} {PP2}",
        "hf_pp2_interleaved_recompute": f"{HF} {PP2} --num-virtual-stages-per-pipeline-rank 2 "
        "--recompute-granularity full",
        "hf_cp2": f"{HF} --context-parallel-size 2",
    },
    4: {
        "hf_dp4": HF,
        "hf_pp4": f"{HF} --pipeline-model-parallel-size 4",
        "hf_tp2_pp2": f"{HF} {TP2} {PP2}",
        "hf_tp2_pp2_sharded_experts": f"{HF} {TP2} {PP2} --no-fold-tensor-into-experts --recompute-granularity full",
        "hf_pp2_cp2": f"{HF} {PP2} --context-parallel-size 2",
        "hf_pp2_ep2_chunks": f"{HF} {PP2} --expert-model-parallel-size 2 --moe-input-chunks 2",
    },
}

cases = Cases()


def trainer_of(name: str, flags: str):
    folder = Path(os.environ["ROUTER_DIR"])
    data = ["--data-path", str(folder / "d.jsonl"), "--tokenizer-model", str(folder / "tokenizer.json")]
    packing = [] if "packed" in name else ["--no-sft-packing"]
    return make_trainer([*BASE, *data, *packing, *flags.split()], folder / name)


def routers_of(trainer) -> list:
    from megatron_telechat.moe import moe_blocks

    return [block.router for block in moe_blocks(trainer.virtual_stages)]


def router_gradients(trainer, iterators) -> dict:
    trainer.train_step.forward_backward(iterators)
    return {name: box for name, box in gradient_boxes(trainer).items() if "router" in name}


def losses_alone(trainer, iterators_of) -> dict:
    """Gradients that the auxiliary and z loss give the routers: those with the losses, less those without."""
    with_losses = router_gradients(trainer, iterators_of())
    kept = [(router, router.balance_coefficient, router.z_coefficient) for router in routers_of(trainer)]
    for router, _, _ in kept:
        router.balance_coefficient = router.z_coefficient = 0.0
    without = router_gradients(trainer, iterators_of())
    for router, balance, z in kept:
        router.balance_coefficient, router.z_coefficient = balance, z
    return {name: with_losses[name] - without[name] for name in with_losses}


def run_layout(name: str, flags: str) -> dict:
    from safetensors.torch import save_file

    from megatron_telechat.moe import collect_expert_load

    trainer = trainer_of(name, flags)
    try:
        collect_expert_load(trainer.virtual_stages, trainer.state)
        found = router_gradients(trainer, trainer.training_iterators())
        load = collect_expert_load(trainer.virtual_stages, trainer.state)
        alone = losses_alone(trainer, trainer.training_iterators)
        assert found.keys() == alone.keys()
        save_file(alone, Path(os.environ["ROUTER_DIR"]) / f"{name}.rank{trainer.state.rank}.safetensors")
        return {"load": load.tokens_per_expert.tolist(), "aux_loss": load.aux_loss}
    finally:
        trainer.release()


for _name, _flags in LAYOUTS[int(os.environ.get("WORLD_SIZE", "1"))].items():
    cases.add(_name, lambda name=_name, flags=_flags: run_layout(name, flags))


def batches_of(trainer) -> list[dict]:
    return [
        dict(batch)
        for batch, _ in zip(trainer.training_iterators()[0], range(trainer.run.num_microbatches), strict=False)
    ]


if os.environ.get("WORLD_SIZE", "1") == "1":

    @cases.case
    def against_plain_torch() -> dict:
        """The last router's gradient by masks and padding, beside one computed from its inputs the plain way."""
        import torch

        from tests.moe.reference import reference_aux_loss, relative_error

        trainer = trainer_of("reference", "")
        router = routers_of(trainer)[-1]
        key = next(name for name in reversed(list(gradient_boxes(trainer))) if "router" in name)
        inputs: list = []
        router.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach().flatten(0, 1)))

        def masked(learned: list[int]) -> list[dict]:
            """The rows, of whose tokens only the first ones are learned."""
            rows = batches_of(trainer)
            for row, count in zip(rows, learned, strict=True):
                row["loss_mask"] = (torch.arange(64) < count).float()[None]
            return rows

        def reference(rows: list[dict]) -> torch.Tensor:
            """Each micro-batch's loss over its tokens that are no padding, weighed by their number."""
            weight = router.weight.detach().clone().requires_grad_(True)
            real = [~row["padding"][0] for row in rows]
            total = sum(int(kept.sum()) for kept in real)
            loss = 0.0
            for hidden, kept in zip(inputs[: len(rows)], real, strict=True):
                z_loss = torch.logsumexp(hidden[kept] @ weight.t(), dim=-1).square().mean()
                aux = reference_aux_loss(hidden[kept], weight, router.topk)
                loss = loss + (0.01 * aux + 0.003 * z_loss) * (int(kept.sum()) / total)
            return torch.autograd.grad(loss, weight)[0]

        try:
            found = {}
            for name, learned in {"all": [64] * 4, "few": [4] * 4, "uneven": [60, 1, 0, 3]}.items():
                for padded in (True, False):
                    rows = masked(learned)
                    for row in rows:
                        row["padding"] &= padded
                    inputs.clear()
                    gradient = losses_alone(trainer, lambda: [iter(rows)])[key]
                    norm = float(gradient.norm())
                    found[f"{name}{'_padded' * padded}"] = {
                        "error": relative_error(gradient, reference(rows)), "norm": norm
                    }  # fmt: skip
            return found
        finally:
            trainer.release()

    MIXTRAL = {
        "model_type": "mixtral", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "sliding_window": None, "tie_word_embeddings": False, "router_aux_loss_coef": 0.5, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }  # fmt: skip

    def mixtral(folder: Path) -> list[str]:
        """Flags of a training that begins with a random Mixtral of transformers, in a folder hf."""
        from megatron_telechat.huggingface import import_hf
        from megatron_telechat.huggingface.config import model_config_from_hf
        from megatron_telechat.huggingface.weights import hf_tensor_shapes
        from tests.huggingface.folders import calm, write_folder

        source = write_folder(folder / "hf", MIXTRAL, dict(hf_tensor_shapes(model_config_from_hf(MIXTRAL))))
        import_hf(calm(source), folder / "imported", config=folder / "model.yaml")
        data = f"--data-path {folder.parent}/d.jsonl --tokenizer-model {folder.parent}/tokenizer.json --sft --split 1"
        return f"""--config {folder}/model.yaml --load {folder}/imported --finetune {data} --no-sft-packing --device cpu
            --fp32 --seq-length 64 --micro-batch-size 4 --global-batch-size 4 --train-iters 1 --no-progress""".split()

    @cases.case
    def hf_is_transformers() -> dict:
        """Loss and gradients of one batch with questions and padding, and those of transformers' Mixtral."""
        import torch
        from transformers import MixtralForCausalLM

        from megatron_telechat.moe import collect_expert_load
        from tests.moe.reference import relative_error

        folder = Path(os.environ["ROUTER_DIR"]) / "mixtral"
        trainer = make_trainer(mixtral(folder), folder)
        try:
            (row,) = batches_of(trainer)
            sums = trainer.train_step.forward_backward([iter([row])])
            load = collect_expert_load(trainer.virtual_stages, trainer.state)
            mine = {name.partition("@")[0]: box for name, box in gradient_boxes(trainer).items()}
            model = trainer.run.model
        finally:
            trainer.release()
        theirs = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
        labels = row["labels"].masked_fill(row["loss_mask"] == 0, -100)
        asked = {"labels": labels, "shift_labels": labels, "output_router_logits": True}
        out = theirs.train()(input_ids=row["tokens"], attention_mask=(~row["padding"]).long(), **asked)
        out.loss.backward()
        pairs = {"model.embed_tokens": "embedding.word_embeddings", "lm_head": "output_layer"}
        parts = {"mlp.gate": "mlp.router", "self_attn.o_proj": "self_attention.linear_proj"}
        parts |= {"input_layernorm": "input_layernorm"}
        for layer in range(model.num_layers):
            pairs |= {f"model.layers.{layer}.{name}": f"decoder.layers.{layer}.{ours}" for name, ours in parts.items()}
        errors = {
            name: relative_error(mine[f"{ours}.weight"], theirs.get_parameter(f"{name}.weight").grad)
            for name, ours in pairs.items()
        }
        return {
            "padding": int(row["padding"].sum()),
            "learned": int(row["loss_mask"].sum()),
            "formula": model.moe_aux_loss_formula,
            "loss": [float(sums[0] / sums[1]) + model.moe_aux_loss_coeff * load.aux_loss, out.loss.item()],
            "aux_loss": [load.aux_loss, out.aux_loss.item()],
            "errors": errors,
        }

    @cases.case
    def padded_row_is_the_row() -> dict:
        """Gradients and figures of the routers of a padded row, and of the row cut where its padding begins."""
        from megatron_telechat.moe import collect_expert_load
        from tests.moe.reference import relative_error

        trainer = trainer_of("cut", "")
        try:
            row = batches_of(trainer)[0]
            used = int((~row["padding"]).sum())
            short = {name: value[:, :used] for name, value in row.items() if name != "padding"}
            found = []
            for batch in (row, short):
                collect_expert_load(trainer.virtual_stages, trainer.state)
                router_gradients(trainer, [iter([batch] * 4)])
                found.append(
                    (
                        collect_expert_load(trainer.virtual_stages, trainer.state),
                        losses_alone(trainer, lambda: [iter([batch] * 4)]),
                    )
                )
            (load, gradients), (expected, right) = found
            return {
                "used": used,
                "counts": [load.tokens_per_expert.tolist(), expected.tokens_per_expert.tolist()],
                "aux_loss": [load.aux_loss, expected.aux_loss],
                "error": max(relative_error(gradients[name], right[name]) for name in right),
            }
        finally:
            trainer.release()

    def evaluation_of(trainer, batches):
        from megatron_telechat.training.step import evaluate

        return evaluate(trainer.virtual_stages, [iter(batches)], 1, trainer.run, trainer.state, trainer.backend).loss

    @cases.case
    def nothing_to_learn() -> dict:
        """The second of three steps has no learned token."""
        import json

        import torch

        trainer = trainer_of("nothing", "")
        folder = Path(os.environ["ROUTER_DIR"]) / "nothing"
        try:
            rows = [batches_of(trainer) for _ in range(3)]
            for row in rows[1]:
                row["loss_mask"] = torch.zeros_like(row["loss_mask"])
            trainer.training_iterators = lambda: [(batch for step in rows for batch in step)]
            states = []
            inner = trainer.take_step

            def watched(iterators):
                out = inner(iterators)
                state = [tensor.clone() for shard in trainer.shards for tensor in (shard.parameter.detach(),)]
                state += [
                    value.clone()
                    for part in trainer.optimizer.chained_optimizers
                    for group in part.optimizer.state.values()
                    for value in group.values()
                    if torch.is_tensor(value)
                ]
                states.append(state)
                return out

            trainer.take_step = watched
            code = trainer.fit()
            same = [all(torch.equal(a, b) for a, b in zip(states[n], states[n + 1], strict=True)) for n in range(2)]
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            return {"code": code, "same": same, "lines": lines, "evaluation": evaluation_of(trainer, rows[1])}
        finally:
            trainer.release()


if __name__ == "__main__":
    cases.main()
