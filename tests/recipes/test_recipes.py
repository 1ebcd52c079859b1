"""The files of docs/recipes: what a team starts a server, a SLURM job and a Kubernetes job with."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
from typing import Any

import click
import pytest
import yaml

from entrypoints.main import main as main_command
from tests.conftest import ROOT
from tests.shell_words import words_of

RECIPES = ROOT / "docs" / "recipes"
PINS = (ROOT / "pyproject.toml").read_text() + (ROOT / "requirements.txt").read_text()
MLFLOW = re.search(r"^mlflow==(\S+)$", PINS, re.M)[1]
RAY = re.search(r'"ray==([^"]+)"', PINS)[1]


class Strict(yaml.SafeLoader):
    """Refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        plain = [k.value for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key in plain if plain.count(key) > 1]
        assert not twice, f"twice: {twice}"
        return super().construct_mapping(node, deep)


def read(name: str) -> Any:
    return yaml.load((RECIPES / name).read_text(), Strict)


def parsed(command: click.Command, arguments: list[str]) -> dict[str, Any]:
    """Its options' values; an option that is not there ends the test."""
    return dict(command.make_context("recipe", arguments, resilient_parsing=False).params)


def wrong(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    """What a Kubernetes object has that its definition has not, or in another type."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, (int, str)) else [f"{path}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = kinds.get(schema.get("type", ""), object)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{path} is {value!r}, not {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path} is {value!r}, none of {schema['enum']}"]
    if isinstance(value, list):
        return [w for i, v in enumerate(value) for w in wrong(v, schema["items"], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return []
    known, other = schema.get("properties", {}), schema.get("additionalProperties")
    found = [f"{path} lacks {key}" for key in schema.get("required", []) if key not in value]
    for key, inner in value.items():
        if key in known:
            found += wrong(inner, known[key], f"{path}.{key}")
        elif isinstance(other, dict):
            found += wrong(inner, other, f"{path}.{key}")
        else:
            found.append(f"{path} has no {key}")
    return found


def test_the_kubernetes_job_has_fields_of_its_definition():
    job = read("rayjob.yaml")
    definition = json.loads((pathlib.Path(__file__).parent / "rayjob_fields.json").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert wrong(job["spec"], definition["spec"], "spec") == []
    # What is checked with tells a wrong one.
    broken = {**job["spec"], "backoffLimit": "3", "shutDownAfterJobFinishes": True}
    assert len(wrong(broken, definition["spec"], "spec")) == 2


def test_the_kubernetes_job_runs_a_command_that_exists():
    job = read("rayjob.yaml")["spec"]
    words = words_of(job["entrypoint"])
    assert words[:3] == ["python", "-m", "entrypoints.main"]
    options = parsed(main_command, words[3:])
    assert (options["launcher"], options["ray_address"]) == ("ray", "auto")
    cluster = job["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    mounts = worker["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(options["worker_dir"].startswith(f"{m['mountPath']}/") for m in mounts)
    assert cluster["rayVersion"] == RAY
    images = {
        container["image"]
        for group in (cluster["headGroupSpec"], worker)
        for container in group["template"]["spec"]["containers"]
    }
    assert len(images) == 1, "workers refuse other versions than the command's"
    assert f"FROM rayproject/ray:{RAY}-py311-gpu\n" in (RECIPES / "Dockerfile").read_text()


SERVICE = {"image", "restart", "environment", "volumes", "healthcheck", "command", "depends_on",
           "build", "ports"}  # fmt: skip
"""Keys of a service in the Compose specification that are used."""
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


def test_the_server_is_of_services_that_wait_for_each_other():
    file = read("compose.yaml")
    services = file["services"]
    assert set(file) == {"name", "services", "volumes"}
    for name, service in services.items():
        assert set(service) <= SERVICE, name
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] in CONDITIONS
            if how["condition"] == "service_healthy":
                assert services[needed]["healthcheck"]["test"]
        for mount in service.get("volumes", []):
            assert mount.split(":")[0] in file["volumes"]
    assert "latest" not in (RECIPES / "compose.yaml").read_text()
    assert services["mlflow-image"]["image"] == f"llm-healing-mlflow:{MLFLOW}"
    assert f" mlflow=={MLFLOW} " in services["mlflow-image"]["build"]["dockerfile_inline"]
    # Python that an indentation breaks is not compiled.
    compile(services["bucket"]["command"][2], "bucket", "exec")


def test_the_server_has_options_that_exist_and_no_secret(monkeypatch):
    from mlflow.cli import server

    service = read("compose.yaml")["services"]["mlflow"]
    monkeypatch.setenv("MLFLOW_HOSTS", "mlflow.example.org:*")
    words = words_of(service["command"])
    assert words[:2] == ["mlflow", "server"]
    options = parsed(server, words[2:])
    assert options["artifacts_destination"] == "s3://llm-healing"
    assert options["allowed_hosts"] == "mlflow.example.org:*"
    text = (RECIPES / "compose.yaml").read_text()
    assert not re.search(r"PASSWORD: (?!\$\{)", text), "secrets come from the environment"


SBATCH = RECIPES / "ray.sbatch"
FAKES = {
    "scontrol": """[ "$1" = show ] && printf 'n1\\nn2\\nn3\\n'; exit 0""",
    "srun": """while [ "${1#--}" != "$1" ]; do shift; done; exec "$@" """,
    "ray": """[ "$1" = status ] && { [ -e "$LOG.up" ]; exit; }
              case "$*" in *--head*) touch "$LOG.up";; esac
              exec sleep 60""",
    "python": """case "${MAIN:-}" in
                 wait) trap 'sleep 0.2; exit 143' TERM; touch "$LOG.main"
                       while :; do sleep 0.05; done;;
                 0) while ! grep -q -e --exclude "$LOG"; do sleep 0.05; done;;
                 *) exit "${MAIN:-0}";; esac""",
}


def job(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The batch script as SLURM runs it, with programs that write down how they are called."""
    (folder / "bin").mkdir()
    (folder / "bin/activate").write_text("")
    for name, script in FAKES.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$LOG"\n{script}\n')
        path.chmod(0o755)
    own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "LOG": str(folder / "log"),
           "VENV": str(folder), "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "3",
           "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1",
           "MLFLOW_TRACKING_URI": "http://server:5000", "POLL_SECONDS": "0.05"}  # fmt: skip
    return subprocess.Popen(
        ["bash", str(SBATCH), *arguments], env=own | environment, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    """What it said. What it left running is ended, as SLURM does with a job."""
    try:
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def calls(folder: pathlib.Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_the_batch_script_is_sound():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SBATCH.read_text(), re.M))
    written = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(options) == len(written)
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "B:TERM@180"
    assert {"requeue", "nodes", "cpus-per-task", "mem", "time"} <= set(options)
    # SLURM reads no option after the first command.
    before = SBATCH.read_text().split("set -euo pipefail")[0]
    assert before.count("#SBATCH --") == len(options)


def test_shellcheck_has_nothing_to_say():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (Debian: apt-get install shellcheck)")
    subprocess.run(["shellcheck", str(SBATCH)], check=True)


def test_the_head_comes_first_then_the_others_then_the_sweep(tmp_path):
    process = job(tmp_path, "--models", "410m,1b", "--seeds", "0-9", MAIN="0")
    said = ended(process)
    assert process.returncode == 0, said
    found = calls(tmp_path)
    names = [call[0] for call in found]
    (command,) = (call for call in found if call[0] == "python")
    starts = [call for call in found if call[:2] == ["ray", "start"]]
    head, *_ = [call for call in found if call[:3] == ["srun", "--overlap", "--nodes=1"]]
    (others,) = (call for call in found if "--nodes=2" in call)
    assert {"--nodelist=n1", "--head", "--num-gpus=1", "--num-cpus=8"} <= set(head)
    assert all("--cpus-per-task=8" in call for call in (head, others)), "srun gives one"
    assert {"--exclude=n1", "--ntasks=2", "--address=n1:20041"} <= set(others)
    assert found.index(head) < found.index(others)
    up = [i for i, call in enumerate(found) if call[:2] == ["ray", "status"]]
    assert names.index("srun") < up[0] or "--head" in starts[0]
    assert up[-1] < found.index(others), "no machine joins a cluster that is not there"
    assert command[:3] == ["python", "-m", "entrypoints.main"]
    options = parsed(main_command, command[3:])
    assert (options["launcher"], options["ray_address"]) == ("ray", "n1:20041")
    assert (options["models"], options["seeds"]) == ("410m,1b", "0-9")
    assert options["worker_dir"] == "/tmp/llm-healing-41"
    assert 60 <= options["ending_seconds"] < int(before_the_end().rpartition("@")[2])
    assert "requeue" not in {word for call in found for word in call}


def before_the_end() -> str:
    (found,) = re.findall(r"#SBATCH --signal=.*", SBATCH.read_text())
    return str(found)


def test_an_image_holds_no_passwords():
    """compose.yaml says that they may be in .env; Dockerfile copies the whole folder."""
    for name in (".dockerignore", ".gitignore"):
        lines = (ROOT / name).read_text().splitlines()
        assert {".env", "**/.env"} & set(lines), name


def test_a_job_that_is_told_to_stop_is_queued_again_once_main_is_over(tmp_path):
    process = job(tmp_path, MAIN="wait")
    end = time.monotonic() + 60
    while not (tmp_path / "log.main").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = ended(process)
    assert process.returncode == 143, said
    assert calls(tmp_path)[-1] == ["scontrol", "requeue", "41"]


def test_a_sweep_that_fails_is_not_queued_again(tmp_path):
    process = job(tmp_path, MAIN="1")
    ended(process)
    assert process.returncode == 1
    assert "requeue" not in (tmp_path / "log").read_text()


def test_a_job_without_a_store_starts_nothing(tmp_path):
    process = job(tmp_path, MLFLOW_TRACKING_URI="")
    assert "export the address of the server" in ended(process)
    assert process.returncode != 0
    assert not (tmp_path / "log").exists()


def test_ray_has_the_options_that_recipes_start_it_with():
    scripts = pytest.importorskip("ray.scripts.scripts", reason="Ray is not installed: [ray]")
    known = {name for option in scripts.start.params for name in option.opts}
    used = set(re.findall(r"--[a-z-]+", " ".join(re.findall(r'start\+?=\(.*|.*start\[@\].*',
                                                               SBATCH.read_text()))))  # fmt: skip
    assert used - {"--nodelist", "--exclude", "--cpus-per-task"} <= known
    params = read("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert {f"--{name}" for name in params} <= known
