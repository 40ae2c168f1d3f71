"""The account of a job, with a clock of our own and the metrics of a made-up run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_telechat.supervisor.goodput import Goodput


class Job:
    """Time and metrics as we want them."""

    def __init__(self, run_dir: Path):
        self.now, self.ours, self.said = 100.0, True, []
        self.run_dir = run_dir
        self.goodput = Goodput(run_dir, lambda: self.ours, self.said.append, lambda: self.now)

    def after(self, seconds: float, *records: dict) -> None:
        self.now += seconds
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.goodput.look()

    def steps(self, first: int, last: int, each: float = 1.0) -> None:
        for step in range(first, last + 1):
            self.after(each, {"step": step, "loss": 1.0})

    def told(self) -> list[dict]:
        path = self.run_dir / "goodput.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_second_of_a_restart_has_its_part(tmp_path):
    """10 s to the first step, 7 steps, a loss, and 20 steps in all: of 41.5 s, those that made steps that were kept."""
    job = Job(tmp_path)
    job.goodput.started()
    job.after(9.0)
    job.steps(1, 7)
    job.after(2.0)
    job.goodput.died("rank 1 on a: killed by SIGKILL", noticed=job.now, gone=job.now + 0.5)
    job.now += 0.5 + 4.0
    job.goodput.started()
    job.after(3.0, {"event": "resume", "step": 5})
    job.steps(6, 20)
    job.after(1.0)
    job.goodput.ended(0)
    death, recovered, end = job.told()
    assert (death["event"], death["step"], death["why"]) == ("death", 7, "rank 1 on a: killed by SIGKILL")
    parts = {"steps": 2.0, "unfinished": 2.0, "end": 0.5, "wait": 4.0, "load": 3.0, "first_step": 1.0}
    assert recovered["lost_s"] == end["lost_s"] == parts
    assert (recovered["step"], recovered["steps_repeated"], recovered["recovery_s"]) == (5, 2, 8.5)
    assert (end["steps_kept"], end["steps_repeated"], end["restarts"]) == (20, 2, 1)
    assert end["start_s"] == 10.0 and end["total_s"] == pytest.approx(41.5)
    assert end["goodput"] == pytest.approx((41.5 - 10 - 12.5) / 41.5, abs=1e-4)
    assert "recovered in 8.5 s (end 0.5, wait 4.0, load 3.0, first step 1.0), on from step 5" in job.said[0]
    assert job.said[1].startswith("goodput 45.8% of 41.5 s: 20 steps kept, 2 done again, 1 restart;")


def test_a_restart_that_makes_no_step_is_lost_as_a_whole(tmp_path):
    job = Job(tmp_path)
    job.goodput.started()
    job.steps(1, 4)
    job.goodput.died("a", job.now, job.now)
    job.goodput.started()
    job.after(5.0)
    job.goodput.died("b", job.now, job.now)
    job.goodput.started()
    job.after(2.0, {"event": "resume", "step": 2})
    job.steps(3, 6)
    job.goodput.ended(75, "stop request")
    *_, recovered, end = job.told()
    assert end["lost_s"]["load"] == 7.0 and end["steps_repeated"] == 2 and end["steps_kept"] == 6
    assert end["restarts"] == 2 and recovered["recovery_s"] == 3.0 and end["exit_code"] == 75


def test_a_loss_that_is_not_restarted_keeps_what_was_saved(tmp_path):
    job = Job(tmp_path)
    job.goodput.started()
    job.after(1.0)
    job.steps(1, 7)
    job.goodput.died("a", job.now, job.now + 0.5)
    job.now += 0.5
    job.goodput.ended(137, "a", saved_step=4)
    death, end = job.told()
    assert death["event"] == "death" and (end["steps_kept"], end["steps_repeated"], end["restarts"]) == (4, 0, 0)
    assert min(end["lost_s"].values()) >= 0 and end["mean_time_to_recover_s"] is None


def test_a_job_that_was_refused_writes_nothing_into_the_folder_of_another(tmp_path):
    job = Job(tmp_path)
    job.ours = False
    job.goodput.started()
    job.steps(5, 9)
    job.goodput.ended(4, "refused")
    assert job.told() == [] and job.said == []


def test_files_that_cannot_be_read_or_written_stop_nothing(tmp_path):
    job = Job(tmp_path)
    (tmp_path / "goodput.jsonl").mkdir()
    job.goodput.started()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n[1]\n\x00\n')
    job.after(1.0, {"step": 2, "loss": 1.0})
    job.goodput.died("a", job.now, job.now)
    job.goodput.ended(1)
    assert sum("cannot write" in line for line in job.said) == 1


def test_a_line_that_a_kill_cut_off_does_not_join_the_next(tmp_path):
    (tmp_path / "goodput.jsonl").write_text('{"event": "dea')
    job = Job(tmp_path)
    job.goodput.started()
    job.steps(1, 2)
    job.goodput.ended(0)
    lines = (tmp_path / "goodput.jsonl").read_text().splitlines()
    assert lines[0] == '{"event": "dea' and json.loads(lines[1])["event"] == "end"
