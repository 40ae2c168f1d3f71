"""Launch scripts of the field, run in the sandbox: the model, the ranks and the layout that they are about; and what
the sandbox keeps a script from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_telechat.cli.plan_pipeline import main
from megatron_telechat.cli.plan_report import notes_of, sizes_text
from megatron_telechat.cli.plan_request import read_request
from megatron_telechat.cli.plan_sweep import freed_sizes
from megatron_telechat.cli.sandbox import Ran, Script, run_script, unset_names
from megatron_telechat.cli.shell import unknown
from megatron_telechat.costs import count_parameters
from megatron_telechat.errors import ConfigError
from tests.cli.launch_scripts import FOLDER, SCRIPTS, LaunchScript

pytestmark = pytest.mark.heavy  # every script starts a shell

SANDBOX = run_script(Script("true")) is not None
needs_sandbox = pytest.mark.skipif(not SANDBOX, reason="this machine gives no namespaces")


def test_every_script_is_listed() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.sh")) == sorted(script.name for script in SCRIPTS)
    assert len(SCRIPTS) >= 28


@needs_sandbox
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_model_ranks_and_layout_of_a_launch_script(script: LaunchScript) -> None:
    request = read_request(["--command", script.command, *script.flags])
    run = request.load().run
    count = count_parameters(run.model)
    assert (count.total, count.active) == (script.parameters, script.active or script.parameters)
    assert (run.parallel.world_size, sizes_text(run)) == (script.ranks, script.layout)
    assert not any("read, not run" in note for note in request.notes)


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_launch_script_gets_a_plan_or_what_is_lacking(script: LaunchScript, capsys) -> None:
    words = ["--device", "h100-80g", "--time-limit", "2", "--command", script.command, *script.flags]
    code = main([*words, "--recompute-kinds", "full"])
    text = capsys.readouterr().out
    assert code in (0, 3), text
    assert ("predicted:" in text and "TFLOP/s a device" in text) if code == 0 else "does not fit" in text


def ran(text: str, *arguments: str, **environment: str) -> Ran:
    found = run_script(Script(text, None, arguments, environment))
    assert found is not None
    return found


def started(text: str, *arguments: str, **environment: str) -> list[tuple[str, ...]]:
    return [command.words for command in ran(text, *arguments, **environment).commands]


@needs_sandbox
def test_a_script_cannot_change_or_reach_anything(tmp_path: Path) -> None:
    """Files of the system and of its own folder are read-only, there is no network, and no capability undoes that."""
    own = tmp_path / "run.sh"
    own.write_text(
        f"touch {tmp_path}/made && torchrun a.py\n"
        f"echo more >> {own} && torchrun b.py\n"
        "touch /usr/made && torchrun c.py\n"
        "mount -o remount,rw,bind /usr && torchrun d.py\n"
        "umount /usr && torchrun e.py\n"
        "exec 3<>/dev/tcp/127.0.0.1/22 && torchrun f.py\n"
        f"[ -e {os.path.abspath(__file__)} ] && [ ! -w /proc/sysrq-trigger ] || true\n"
        "[ $(ls /proc/net/dev | wc -l) = 1 ] && [ $(grep -c : /proc/net/dev) -gt 1 ] && torchrun g.py\n"
        "[ -e /root ] || [ -e /home ] && torchrun h.py\n"
        "torchrun safe.py\n"
    )
    found = run_script(Script(own.read_text(), own))
    assert found is not None
    assert [command.words for command in found.commands] == [("torchrun", "safe.py")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.sh"]


@needs_sandbox
def test_no_variable_of_a_script_reaches_what_starts_the_sandbox(tmp_path: Path) -> None:
    """A job that a script submits is a second sandbox, with its variables: within it, and only there."""
    own = tmp_path / "run.sh"
    own.write_text(f"export LD_PRELOAD={tmp_path}/a.so PATH={tmp_path}:$PATH X=1\nsbatch --wrap 'torchrun t.py $X'")
    (tmp_path / "unshare").write_text(f"#!/bin/sh\ntouch {tmp_path}/escaped\n")
    (tmp_path / "unshare").chmod(0o755)
    found = run_script(Script(own.read_text(), own))
    assert found is not None and [command.words for command in found.commands] == [("torchrun", "t.py", "1")]
    assert not (tmp_path / "escaped").exists()


@needs_sandbox
def test_a_script_that_does_not_end_is_ended() -> None:
    found = run_script(Script("torchrun first.py\nwhile true; do :; done"), limit_s=1.0)
    assert found is not None and found.timed_out
    assert [command.words for command in found.commands] == [("torchrun", "first.py")]


@needs_sandbox
def test_what_is_not_here_ends_no_script() -> None:
    text = (
        "set -euo pipefail\nsource /cluster/env.sh\ncd /cluster/code\nmodule load cuda\n"
        "[ -f /cluster/data.idx ] || { echo no data; exit 4; }\n"
        "N=$(nvidia-smi -L | wc -l)\ntorchrun --nproc-per-node $N t.py --num-layers 4"
    )
    found = ran(text)
    assert found.missing == ("/cluster/env.sh",) and found.stops == ("4",) and found.counts_devices
    assert found.commands[-1].words == ("torchrun", "--nproc-per-node", "8", "t.py", "--num-layers", "4")


@needs_sandbox
def test_a_job_that_submits_its_successor_is_one_job() -> None:
    chain = '#SBATCH --nodes=2\nset -e\nsrun torchrun t.py --a\nsbatch "$0"\n'
    assert len(started(chain)) == 1
    assert len(started(f"sbatch <<'EOF'\n{chain}EOF\n")) == 1
    assert len(started("sbatch --wrap 'torchrun t.py; sbatch --wrap \"torchrun u.py\"'")) == 1


@needs_sandbox
def test_variables_that_nobody_sets_are_marked_where_they_are_read_plainly() -> None:
    text = (
        'if [ -z $ASKED ]; then M=1; fi\ntorchrun --nnodes $NODES t.py --a ${B:-2} --c $M --d "$OTHER x" --e $1 '
        "--f ${GIVEN}\nread LINE; for I in 1; do echo $I $LINE; done"
    )
    script = Script(text, None, (), {"GIVEN": "g"})
    assert unset_names(script) == ["NODES", "OTHER", "1"]
    words = started(text, GIVEN="g")[-1]
    assert words[2] == unknown("NODES") and words[-5:] == (unknown("OTHER") + " x", "--e", unknown("1"), "--f", "g")
    assert words[4:8] == ("--a", "2", "--c", "1")
    assert started(text, "7", GIVEN="g")[-1][-3] == "7"


@needs_sandbox
def test_jobs_and_launchers_within_launchers() -> None:
    text = "#!/bin/bash\n#SBATCH --ntasks-per-node=8\nsrun -l bash -c 'python -u p.py \\$X $Y'"
    job = f"sbatch --nodes=4 <<EOF\n{text}\nEOF"
    found = ran(f"Y=5\n{job}")
    assert [command.words for command in found.commands] == [("srun", "-l", "python", "-u", "p.py", unknown("X"), "5")]
    assert set(found.job) == {"--nodes=4", "--ntasks-per-node=8"}
    assert started("mpirun -np 4 bash -c 'python p.py --layers [0]*3 ([1]*2)'")[0][3:] == (
        *("python", "p.py", "--layers", "[0]*3", "([1]*2)"),
    )


@needs_sandbox
def test_a_command_takes_variables_and_arguments(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        "torchrun --nproc-per-node $(nvidia-smi -L | wc -l) --nnodes $NODES pretrain_gpt.py --num-layers $1 "
        "--hidden-size 1024 --num-attention-heads 8 --seq-length 1024 --vocab-size 1024 --some-flag-of-a-fork x y"
    )
    request = read_request(["--command", f"NODES=3 bash {script} 6", "--ranks-per-node", "4"])
    run = request.load().run
    assert (run.parallel.world_size, run.model.num_layers) == (12, 6)
    assert [note for note in request.load().notes if "not flags of Megatron-LM" in note and "--some-flag" in note]
    with pytest.raises(ConfigError, match="NODES"):
        read_request(["--command", f"{script} 6"])


def test_a_slip_is_no_flag_of_another_program(tmp_path: Path) -> None:
    words = "torchrun --nproc-per-node 2 p.py --num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 128"
    with pytest.raises(ConfigError, match="unknown flag --tensor-model-parallel-sise"):
        read_request(["--", *words.split(), "--tensor-model-parallel-sise", "2"]).load()


def test_sizes_that_a_sweep_frees() -> None:
    assert freed_sizes("tp, MBS") == {"tensor_model_parallel_size", "micro_batch_size"}
    assert len(freed_sizes("all")) == 9 and freed_sizes("") == set()
    with pytest.raises(ConfigError, match="--free dp names no size"):
        freed_sizes("tp,dp")


def test_notes_stand_by_what_they_mean_for_the_plan() -> None:
    notes = (
        "--a: ignored, because it changes nothing",
        "--b 2 is not modelled and was ignored for the plan",
        "assumed: 131,072 tokens, because no tokenizer is given; --vocab-size N",
        "--c is not modelled and was ignored for the plan",
        "missing flags as Megatron-LM reads them: activation=gelu",
    )
    assert notes_of(notes) == [
        "! assumed: 131,072 tokens, because no tokenizer is given; --vocab-size N",
        "note: missing flags as Megatron-LM reads them: activation=gelu",
        "note: not modelled, and ignored for the plan: --b 2 --c",
    ]
