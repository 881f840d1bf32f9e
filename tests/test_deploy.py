"""The launchers: their syntax, and the commands that they run, with the cluster's own tools replaced."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from runner_cases import REPOSITORY

from arc_runner.command_line import parse_options

DEPLOY = REPOSITORY / "deploy"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Where a command of any name can be put."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def fake(tools: Path, name: str, body: str) -> None:
    (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tools / name).chmod(0o755)


def run(tools: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch"])
def test_scripts_are_bash(name: str):
    assert subprocess.run(["bash", "-n", DEPLOY / name], timeout=20).returncode == 0


def test_the_pods_command_is_the_one_that_was_asked_for(tools: Path):
    fake(tools, "gcloud", 'printf "%s\\n" "$@"')
    flags = ["--dataset_path", "my tasks.json", "--grid_encoder", "MinimalGridEncoder()"]
    where = {"TPU_NAME": "pod", "ZONE": "here", "BUCKET": "gs://bucket/run"}
    words = run(tools, DEPLOY / "tpu_pod.sh", *flags, **where).stdout.splitlines()
    assert words[:7] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=here", "--worker=all"]
    fake(tools, "python", 'shift; printf "%s\\n" "$@"')
    remote = words[7].removeprefix("--command=").split("exec ")[1]
    given = run(tools, "bash", "-c", remote).stdout.splitlines()
    assert given == ["--activations_dir", "gs://bucket/run", *flags]
    assert parse_options(given).dataset_path == "my tasks.json"


def test_without_a_pod_it_says_what_is_missing(tools: Path):
    outcome = run(tools, DEPLOY / "tpu_pod.sh")
    assert outcome.returncode != 0
    assert "TPU_NAME: name of the TPU VM" in outcome.stderr


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, False), (75, 0, True), (75, 20, False)])
def test_a_slurm_job_that_was_stopped_is_queued_again(
    code: int, restarts: int, requeued: bool, tools: Path, tmp_path: Path
):
    fake(tools, "srun", f'echo "srun $*"; exit {code}')
    fake(tools, "scontrol", 'echo "scontrol $*"')
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    variables = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    outcome = run(tools, "bash", DEPLOY / "slurm.sbatch", "--n_tasks", "3", **variables)
    first, *others = outcome.stdout.splitlines()
    assert first == "srun --kill-on-bad-exit=0 python distributed_kv_cached_inference.py --n_tasks 3"
    assert others == (["scontrol requeue 7"] if requeued else [])
    assert outcome.returncode == code


def test_the_jobset_runs_the_main_job_on_every_host():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "distributed_kv_cached_inference.py"]
    assert parse_options(container["args"]).activations_dir.startswith("gs://")
