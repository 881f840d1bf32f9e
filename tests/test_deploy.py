"""The launchers: their syntax, their fields, and the commands that they run, with fakes for the tools."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

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
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch", "ray_slurm.sbatch"])
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


# What SLURM is told at the head of a script: each option with the values that it takes.
SBATCH = {
    "job-name": r"[\w.-]+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "gpus-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
    "time": r"\d+:[0-5]\d:[0-5]\d",
    "requeue": "",
    "signal": r"(B:)?(TERM|USR1)@[1-9]\d*",
    "open-mode": "append|truncate",
    "output": r"[\w.%-]+",
}


@pytest.mark.parametrize("name", ["slurm.sbatch", "ray_slurm.sbatch"])
def test_the_options_of_a_slurm_script_are_ones_that_it_takes(name: str):
    lines = (DEPLOY / name).read_text().splitlines()
    options = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    assert len(options) >= 8
    for option, _, value in options:
        assert re.fullmatch(SBATCH[option], value), option
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # SLURM would not read it


@pytest.fixture
def job(tools: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a job of SLURM on two nodes, whose tools note how they are called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    calls = tmp_path / "calls"
    fake(tools, "scontrol", f'[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "scontrol $*" >> {calls}')
    fake(tools, "ray", f'echo "ray $*" >> {calls}; [ "$1" = status ] || exec sleep 60')
    fake(tools, "srun", f'echo "srun ${{*:1:3}}" >> {calls}; shift 2; exec "$@"')
    return {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "70123",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NODEID": "0",
    }


@pytest.mark.parametrize("node", [0, 1])
def test_ray_is_started_on_the_nodes_of_a_job_and_ends_with_the_driver(
    node: int, job: dict[str, str], tools: Path, tmp_path: Path
):
    once_ray_starts = f'until grep -q "ray start" {tmp_path}/calls; do sleep 0.1; done'
    note = f'printf "%s\\n" "$JAX_PLATFORMS" "$@" > {tmp_path}/driver'
    fake(tools, "python", f"{once_ray_starts}; shift; {note}; exit 3")
    job |= {"SLURM_NODEID": str(node)}
    outcome = run(tools, "bash", DEPLOY / "ray_slurm.sbatch", "--n_tasks", "3", **job)
    assert outcome.returncode == 3, outcome.stderr
    platform, *words = (tmp_path / "driver").read_text().splitlines()
    assert (platform, words) == ("cpu", ["--ray", "node1:20123", "--n_tasks", "3"])
    assert parse_options(words).ray == "node1:20123"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "srun --overlap --kill-on-bad-exit=0 bash" in calls
    start = ["--head --port=20123 --include-dashboard=false", "--address=node1:20123"][node]
    assert f"ray start {start} --block" in calls
    assert not any(line.startswith("scontrol requeue") for line in calls)


def test_a_driver_is_told_of_the_end_of_its_job_and_the_job_queued_again(
    job: dict[str, str], tools: Path, tmp_path: Path
):
    begun = tmp_path / "begun"
    fake(tools, "python", f"trap 'sleep 0.3; exit 75' TERM; touch {begun}; while :; do sleep 0.1; done")
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"} | job
    command = ["bash", DEPLOY / "ray_slurm.sbatch"]
    script = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 75
        assert "scontrol requeue 70123" in (tmp_path / "calls").read_text().splitlines()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


# --- Kubernetes ---------------------------------------------------------------------------------------------


def load(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_jobset_runs_the_main_job_on_every_host():
    jobset = load("jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "distributed_kv_cached_inference.py"]
    assert parse_options(container["args"]).activations_dir.startswith("gs://")


def thing(required: str = "", **fields: Any) -> dict[str, Any]:
    """The schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


AMOUNT = {"type": "string", "pattern": r"^[1-9][0-9]*(Mi|Gi)?$"}
AMOUNTS = {"type": "object", "additionalProperties": AMOUNT, "minProperties": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}  # a number would be refused
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 50}
CONTAINER = thing(
    "name image resources",
    name=NAME,
    image=TEXT,
    env={"type": "array", "items": thing("name value", name=TEXT, value=TEXT)},
    resources=thing("requests limits", requests=AMOUNTS, limits=AMOUNTS),
)
POD = thing(
    "spec",
    spec=thing(
        "containers",
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=TEXTS,
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
    ),
)
# Of the fields of a RayJob (ray.io/v1), those that our files use; the API server refuses unknown ones.
RAY_JOB = thing(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=thing("name", name=NAME),
    spec=thing(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=thing(
            "headGroupSpec workerGroupSpecs",
            headGroupSpec=thing("rayStartParams template", rayStartParams=TEXTS, template=POD),
            workerGroupSpecs={
                "type": "array",
                "minItems": 1,
                "items": thing(
                    "groupName replicas minReplicas maxReplicas rayStartParams template",
                    groupName=NAME,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    numOfHosts={"type": "integer", "minimum": 1},
                    rayStartParams=TEXTS,
                    template=POD,
                ),
            },
        ),
    ),
)


@pytest.mark.parametrize(
    ("name", "accelerator"), [("ray_gpu.yaml", "nvidia.com/gpu"), ("ray_tpu.yaml", "google.com/tpu")]
)
def test_a_rayjob_runs_the_driver_and_gives_the_accelerators_to_its_workers(name: str, accelerator: str):
    jsonschema = pytest.importorskip("jsonschema")
    job = load(name)
    jsonschema.validate(job, RAY_JOB)
    program, script, *flags = shlex.split(job["spec"]["entrypoint"])
    assert (program, script) == ("python", "/app/distributed_kv_cached_inference.py")
    options = parse_options(flags)
    assert options.ray == ""  # RAY_ADDRESS
    assert options.activations_dir.startswith("gs://")
    assert job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits  # extended resources must be
        assert accelerator in limits


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "entryPoint"], "python"),
        (["spec", "backoffLimit"], "20"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"], 2),
        (["metadata", "name"], "Activations"),
    ],
)
def test_a_fault_in_a_rayjob_is_found(path: list[Any], value: Any):
    jsonschema = pytest.importorskip("jsonschema")
    job = load("ray_tpu.yaml")
    place: Any = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAY_JOB)


# --- TPU VMs ------------------------------------------------------------------------------------------------


def test_the_cluster_of_tpu_vms_fits_the_schema_of_ray():
    jsonschema, ray = pytest.importorskip("jsonschema"), pytest.importorskip("ray")
    config = load("ray_tpu_vms.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"setup_command": []}, schema)


def test_each_host_of_a_slice_is_told_that_it_is_alone():
    config = load("ray_tpu_vms.yaml")
    assert config["head_node_type"] in config["available_node_types"]
    assert "TPU" not in config["available_node_types"]["head"]["resources"]  # a TPU VM cannot be the head
    command = config["worker_start_ray_commands"][-1]
    chips = config["available_node_types"]["slice"]["resources"]["TPU"]
    environment = dict(re.findall(r"(\w+)=(\S+)", command))
    assert environment["TPU_PROCESS_BOUNDS"] == "1,1,1"
    bounds = [int(size) for size in environment["TPU_CHIPS_PER_PROCESS_BOUNDS"].split(",")]
    assert bounds[0] * bounds[1] * bounds[2] == chips
    assert environment["TPU_VISIBLE_CHIPS"] == ",".join(map(str, range(chips)))
    assert environment["CLOUD_TPU_TASK_ID"] == environment["TPU_WORKER_ID"] == "0"
    assert command.endswith("ray start --address=$RAY_HEAD_IP:6379")


def test_the_command_for_tpu_vms_is_one_that_the_main_job_takes():
    lines = (DEPLOY / "ray_tpu_vms.yaml").read_text().splitlines()
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in lines if line.startswith("#"))
    command = re.search(r"distributed_kv_cached_inference.py ([^\"]+)\"", comment)
    assert command is not None
    assert parse_options(shlex.split(command[1])).ray == ""


@pytest.mark.parametrize("name", ["ray_slurm.sbatch", "ray_tpu_vms.yaml"])
def test_ray_start_takes_the_flags_that_it_is_given(name: str):
    pytest.importorskip("ray")
    from ray.scripts.scripts import start  # the parser of Ray's own command line

    text = re.sub(r'"?\$\{?\w+[#*:]*\}?"?', "1", (DEPLOY / name).read_text())
    commands = re.findall(r"ray start (--[^\n;&']+)", text)
    assert len(commands) == 2
    for command in commands:
        start.make_context("start", shlex.split(command))
