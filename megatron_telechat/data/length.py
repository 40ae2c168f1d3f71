"""How many samples the epochs of a run are: the length of a run whose end is said in epochs. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_telechat.config.length import steps_for
from megatron_telechat.config.run_stages import Position
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import DataPlan, data_plan
from megatron_telechat.data.corpus import ONE_LENGTH, EncodingFactory
from megatron_telechat.data.formats import corpus_factory
from megatron_telechat.data.sources import Opened, open_sources
from megatron_telechat.errors import ConfigError, DataError


@dataclass(frozen=True)
class EpochLength:
    """The samples of the epochs of a run.

    Attributes:
        samples: from the first sample of the run on.
        ends: nothing follows them: the data is read once.
    """

    samples: int
    ends: bool = False

    def steps(self, run: RunConfig, position: Position) -> int:
        """Optimizer steps of the whole run: the last batch is filled up from the next epoch, or left out where there
        is none.

        Args:
            position: where the run goes on.

        Raises:
            ConfigError: samples of another length were read before.
            DataError: the data does not fill one batch.
        """
        length, batch = run.training.seq_length, run.training.global_batch_size
        if position.tokens != position.samples * length:
            raise ConfigError(
                f"train_epochs counts samples of {length:,} tokens, and this run has read samples of another length",
                "train_epochs",
                "--train-iters N",
            )
        steps = steps_for(self.samples, run, position, whole=self.ends)
        if not steps:
            raise DataError(
                f"the training data has {self.samples:,} samples of {length:,} tokens, which do not fill a batch of "
                f"{batch:,}",
                "files without weights are read once",
                "a smaller --global-batch-size, or weights (--data-json), which read the files as often as it takes",
            )
        return steps


def samples_of_epochs(run: RunConfig, plan: DataPlan, opened: Opened) -> EpochLength:
    """The samples that the epochs of a run are.

    An epoch of one dataset reads it once. Of datasets with shares it is as many samples as they have together; of a
    data.json, whose weights count copies, each counts as often as its weight says. Datasets without weights are read
    once, so there is one epoch of them at most.

    Args:
        opened: the datasets of the run.

    Raises:
        DataError: a dataset has nothing to train on, or more than one epoch is asked of data that is read once.
    """
    epochs, split = run.training.train_epochs, plan.splits["train"]
    assert epochs is not None, "the length of the run is given in epochs"
    blend = split.blend
    once = blend.weights is None and len(blend.prefixes) > 1
    if once and epochs > 1:
        raise DataError(
            f"train_epochs={epochs:g}, but several datasets without weights are read once",
            "train_epochs",
            "name them in a --data-json file ({path: 1.0, ...}), whose weights count how often an epoch reads them, or "
            "--train-epochs 1",
        )
    copies = blend.weights if blend.weights is not None and blend.per_token else (1.0,) * len(blend.prefixes)
    samples = math.fsum(
        weight * opened[prefix].samples(split.name, split.share, once, None, ONE_LENGTH).samples_in(epochs, once)
        for weight, prefix in zip(copies, blend.prefixes, strict=True)
    )
    return EpochLength(max(1, math.ceil(round(samples, 6))), once)


def known_length(run: RunConfig) -> EpochLength | None:
    """The length of a run in epochs, as far as nothing must be encoded for it; None: it is not known yet, or no data is
    named.

    Raises:
        DataError: see :func:`samples_of_epochs`, and what is missing or damaged.
    """
    if not (run.data.data_path or run.data.data_json or run.data.train_data_path):
        return None
    plan = data_plan(run.data)
    factory = corpus_factory(plan.format)
    if not isinstance(factory, EncodingFactory):
        return samples_of_epochs(run, plan, open_sources(run, plan))
    if run.data.tokenizer_model is None:
        return None
    found = {name: factory.open_if_encoded(name, run, run.cache_dir) for name in plan.names}
    opened = {name: corpus for name, corpus in found.items() if corpus is not None}
    return samples_of_epochs(run, plan, opened) if len(opened) == len(found) else None
