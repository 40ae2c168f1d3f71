"""Rules of the folders a run reads and writes, and of what it reports."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_telechat.config.origins import Check, Rule
from megatron_telechat.errors import Problem
from megatron_telechat.locations import Url, is_url, location, url_fault


def folders_are_folders(check: Check) -> Iterator[Problem]:
    """Output folders exist or can be created: no file is in their way."""
    for name in ("run_dir", "save", "load", "data_cache_path", "moe_routing_record"):
        path = check.take(name)
        if not path or not check.said(name) or is_url(path):
            continue
        blocking = path
        while blocking and not os.path.lexists(blocking):
            blocking = os.path.dirname(blocking)
        if blocking and not os.path.isdir(blocking):
            what = (
                f"{name} {path} is a file"
                if blocking == path
                else f"{name} {path} cannot be made: {blocking} is a file"
            )
            yield check.one(what, name, fix="the path of a folder")


def urls_are_of_checkpoints(check: Check) -> Iterator[Problem]:
    """URLs name what a driver here can read; only checkpoints lie in object stores."""
    for name in ("run_dir", "data_cache_path", "moe_routing_record"):
        path = check.take(name)
        if path and check.said(name) and is_url(path):
            what = f"{name} {path} is a URL: only checkpoints may lie in an object store"
            yield check.one(what, name, fix="a folder that all ranks share")
    faulty: set[str] = set()
    for name in ("save", "load", "pretrained_checkpoint", "dpo_reference"):
        url = location(check.take(name) or "")
        # load is that of save where it is not given
        if not isinstance(url, Url) or url.text in faulty:
            continue
        fault = url_fault(url)
        if fault is not None:
            faulty.add(url.text)
            yield check.one(f"{name} {url}: {fault[0]}", name, fix=fault[1])


def memory_is_of_one_process(check: Check) -> Iterator[Problem]:
    """``memory://`` is seen by one process only: neither by other ranks nor by a process that writes for a rank."""
    save, mode, world = check.take("save", "checkpoint_mode", "world_size")
    url = location(save or "")
    if isinstance(url, Url) and url.is_of_this_process and (mode != "sync" or world != 1):
        yield check.problem(
            f"save {save} is memory of one process",
            "save",
            "checkpoint_mode",
            fix="a folder or another URL; or, for a trial, one rank and --checkpoint-mode sync",
        )


def checkpoint_to_resume_from(check: Check) -> Iterator[Problem]:
    """The folder of save may not be there yet (a first start with the command of all later ones); another one must
    be."""
    load, save, step = check.take("load", "save", "load_step")
    if is_url(load) or is_url(save):
        return  # the start asks the store
    there = load is not None and os.path.isdir(load)
    same = save is not None and load is not None and os.path.abspath(load) == os.path.abspath(save)
    # A run that has begun there needs it no longer; its own checkpoints tell whether it has.
    begun = save is not None and os.path.isdir(save) and any(name.startswith("iter_") for name in os.listdir(save))
    if load is not None and not there and not same and not begun:
        fix = "the folder of the checkpoints, or drop --load to start a new run"
        yield check.absent(f"load {load} is not a folder", load, "load", fix)
    elif step is not None and not there and not begun:
        yield check.problem(
            f"load_step={step}, but there is no checkpoint folder {load}",
            "load_step",
            "load",
            fix="--load FOLDER, or drop --load-step",
        )


def pretrained_weights_are_there(check: Check) -> Iterator[Problem]:
    """pretrained_checkpoint is an existing folder."""
    path = check.take("pretrained_checkpoint")
    if path is not None and not is_url(path) and not os.path.isdir(path):
        fix = "a checkpoint made by a run or by tools/convert_checkpoint.py import"
        yield check.absent(f"pretrained_checkpoint {path} is not a folder", path, "pretrained_checkpoint", fix)


def finetune_has_weights(check: Check) -> Iterator[Problem]:
    """finetune needs the weights of another run."""
    finetune, path = check.take("finetune", "pretrained_checkpoint")
    if finetune and path is None:
        yield check.problem(
            "finetune starts from the weights of another run, but none is given",
            "finetune",
            "load",
            fix="--load FOLDER (other than --save) or --pretrained-checkpoint FOLDER",
        )


RULES: tuple[Rule, ...] = (
    folders_are_folders,
    urls_are_of_checkpoints,
    memory_is_of_one_process,
    checkpoint_to_resume_from,
    pretrained_weights_are_there,
    finetune_has_weights,
)
