"""What nano runs leave, down to the last digit, as one JSON document.

The scenarios go through the commands alone, so that they hold whatever the code behind them looks
like. ``python -m tests.golden.collect`` writes :data:`STORED` anew; read the difference before it
is committed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import mlflow
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from healing.tracking.git_version import Checkout
from healing.tracking.page_text import plain_tags
from healing.tracking.run_files import RECORD

STORED = pathlib.Path(__file__).parent / "nano.json"

SMALL = "--model nano --sequence-length 64 --probe-tokens 1024 --batch-size 4"
STEPS = f"{SMALL} --measurement-interval 4 --verbosity quiet"
ATTACK = (
    f"{STEPS} --attack-steps 8 --search-steps 2 --search-candidates 3 --baseline-draws 3 "
    "--rayleigh-draws 2 --curvature-tokens 128 --target-rank-reduction 1"
)
HEAL = f"{STEPS} --healing-steps 8"
NOISE = f"{ATTACK} --arm gaussian_noise"

# name → command; {run:NAME} is the id of the run that an earlier scenario made, and
# {checkpoint:NAME} the checkpoint of its newest attack.
SCENARIOS = {
    "haep": f"attack {ATTACK} --arm haep",
    "haep_oracle": f"attack {ATTACK} --arm haep_oracle --attack-optimizer sgd",
    "haep_hessian": f"attack {ATTACK} --subspace hessian --hessian-directions 2 --warmup-steps 2",
    "spectral": f"attack {ATTACK} --arm spectral --attack-lr 0.003",
    "random_tokens": f"attack {ATTACK} --arm random_tokens",
    "random_text": f"attack {ATTACK} --arm random_text --seed 1",
    "noise": f"{'attack'} {NOISE} --noise-scale 0.5",
    "noise_norm": f"attack {NOISE} --reference-run-id {{run:haep}}",
    "noise_loss": f"attack {NOISE} --reference-checkpoint {{checkpoint:haep}} --match loss",
    "none": f"attack {ATTACK} --arm none",
    "healed": f"heal {HEAL} --attack-run-id {{run:haep}} --sham true",
    "replicates": f"heal {HEAL} --collapsed-checkpoint {{checkpoint:spectral}} --num-runs 2",
    "fresh": f"heal {HEAL} --arm random_text --save-healed false",
    "lora": f"heal {HEAL} --attack-run-id {{run:random_tokens}} --healing-method lora",
    "half": f"heal {HEAL} --attack-run-id {{run:haep}} --precision fp16 --precision-mode pure",
    "basin": "basin --heal-run-id {run:healed} --curvature-tokens 128 --gradient-batches 8 "
    "--lanczos-iterations 6 --density-iterations 3 --escape-steps 2 --verbosity quiet",
    "sweep": "main --models nano --arms haep,gaussian_noise,spectral --seeds 7 --healing-steps 4 "
    "--attack-steps 4 --batch-size 4 --sequence-length 64 --measurement-interval 2 --workers 1 "
    "--basin true --verbosity quiet",
    "again": "main --models nano --arms haep,gaussian_noise,spectral --seeds 7 --healing-steps 4 "
    "--attack-steps 4 --batch-size 4 --sequence-length 64 --measurement-interval 2 --workers 1 "
    "--basin true --verbosity quiet",
    "summary": "summarize --verbosity quiet",
    "pretrained": "pretrain --model nano --tokens-per-parameter 0.05 --batch-size 4 --threads 1 "
    "--verbosity quiet",
}

TIMED = re.compile(r"seconds(/.*)?|tokens_per_second")
"""Names of numbers that differ from run to run."""
PHASE = "phase"
"""Tag of a run under way: which phases last long enough for it differs from run to run."""
DRAWN = re.compile(r"\+timestamp\+\d+\+[0-9a-f-]{36}")
"""Of the name of a picture: when it was made, and a random number."""
LOCAL_ID = "local_run_id"
"""Tag of random text."""
PROCESS = "process"
"""Tag that names the machine and the process."""
HEARTBEAT = "heartbeat"
"""Tag with a time."""
CELL_KEY = "cell_key"
"""Tag that holds the id of a run, of landscapes."""
MACHINES = ("mlflow.", "git_", PHASE, PROCESS, LOCAL_ID, HEARTBEAT, CELL_KEY)
"""Beginnings of tags that differ from machine to machine, or from run to run."""
PICTURES = (".png", ".pdf")
KEPT_TAGS = ("mlflow.runName", "mlflow.note.content", "mlflow.parentRunId")
"""Tags of MLflow's own that this project sets."""


def platform() -> str:
    """Hash of what a few kernels give here: other processors round the last bits differently."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(96, 96, generator=generator) for _ in range(2))
    found = [a @ b, torch.softmax(a, 1), torch.linalg.svdvals(a.double()), a.exp().sum(0)]
    found.append(torch.linalg.eigvalsh((a @ a.T).double()))
    data = b"".join(t.contiguous().numpy().tobytes() for t in found)
    return hashlib.sha256(data).hexdigest()[:16]


def commands() -> dict[str, click.Command]:
    """The entry points by name."""
    names = ("attack", "heal", "basin", "main", "summarize", "pretrain")
    return {name: importlib.import_module(f"entrypoints.{name}").main for name in names}


def stub_code_digest() -> None:
    """Take the code out of every fingerprint: what is left is configuration, weights and texts."""
    import healing

    for found in pkgutil.walk_packages(healing.__path__, "healing."):
        module = importlib.import_module(found.name)
        if hasattr(module, "code_digest"):
            module.code_digest = lambda *_: "code"  # type: ignore[attr-defined]


def stub_place() -> None:
    """Without the commit, the versions and the processor, which are no results."""
    places = {"checkout": Checkout(), "environment": {}, "processor": "a processor"}
    for module in [m for name, m in sys.modules.items() if name.startswith("healing.")]:
        for name, found in places.items():
            if hasattr(module, name):
                setattr(module, name, lambda found=found: found)


class Store:
    """A fresh store, the scenarios run in it, and what they left in comparable words."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.client = MlflowClient()
        self.made: dict[str, str] = {}  # scenario → id of its outermost run

    def runs(self) -> list[Any]:
        """All runs in the order of their making."""
        found = self.client.search_runs(
            [e.experiment_id for e in self.client.search_experiments()], max_results=1000
        )
        return sorted(found, key=lambda run: (run.info.start_time, run.data.tags["mlflow.runName"]))

    def argument(self, match: re.Match[str]) -> str:
        """A placeholder's value."""
        kind, name = match.groups()
        if kind == "run":
            return self.made[name]
        path = self.client.download_artifacts(
            self.made[name], "checkpoints/checkpoint_post_treatment.pt"
        )
        return str(path)

    def run(self, name: str) -> None:
        """One scenario.

        Raises:
            RuntimeError: The command failed.
        """
        known = {run.info.run_id for run in self.runs()}
        command, *arguments = re.sub(r"{(\w+):(\w+)}", self.argument, SCENARIOS[name]).split()
        result = CliRunner().invoke(commands()[command], arguments)
        if result.exit_code:
            raise RuntimeError(f"{name}: {result.output}{result.stderr}") from result.exception
        new = [run for run in self.runs() if run.info.run_id not in known]
        (self.made[name],) = (
            run.info.run_id for run in new if "mlflow.parentRunId" not in run.data.tags
        )

    def text(self, value: Any, names: dict[str, str]) -> Any:
        """A value without what differs from place to place."""
        if isinstance(value, dict):
            return {self.text(k, names): self.text(v, names) for k, v in value.items()}
        if isinstance(value, list):
            return [self.text(v, names) for v in value]
        if not isinstance(value, str):
            return value
        for run_id, name in names.items():
            value = value.replace(run_id, name)
        value = re.sub(r"(file://)?" + re.escape(str(self.root)), "ROOT", value)
        return re.sub(re.escape(tempfile.gettempdir()) + r"/(?:[\w-]+/)+", "DOWNLOADED/", value)

    def artifacts(self, run_id: str) -> dict[str, Any]:
        """Path → content of every file of a run, pictures and checkpoints by name or weights."""
        if not self.client.list_artifacts(run_id):
            return {}
        folder = pathlib.Path(self.client.download_artifacts(run_id, ""))
        found = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            found[DRAWN.sub("", path.relative_to(folder).as_posix())] = self.content(path)
        return found

    def content(self, path: pathlib.Path) -> Any:
        """What is compared of one file."""
        if path.suffix == ".json":
            return self.untimed(json.loads(path.read_text()))
        if path.suffix == ".jsonl":
            return [self.untimed(json.loads(line)) for line in path.read_text().splitlines()]
        if path.suffix == ".pt":
            stored = torch.load(path, weights_only=True)
            stored.pop("digests")  # of what follows, with the run's id in it
            weights = hashlib.sha256()
            for name, tensor in sorted(stored.pop("model_state_dict").items()):
                weights.update(name.encode() + tensor.contiguous().numpy().tobytes())
            return stored | {"weights": weights.hexdigest()[:16]}
        if path.suffix in (".md", ".csv", ".tex"):
            return path.read_text()
        if path.suffix == ".safetensors":
            return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return path.suffix

    def untimed(self, value: Any) -> Any:
        """Without times."""
        if isinstance(value, dict):
            return {k: self.untimed(v) for k, v in value.items() if not TIMED.fullmatch(k)}
        if isinstance(value, list):
            return [self.untimed(v) for v in value]
        return value

    def history(self, run: Any) -> dict[str, list[list[float]]]:
        """Metric → [step, value] in the order logged."""
        return {
            name: [[m.step, m.value] for m in self.client.get_metric_history(run.info.run_id, name)]
            for name in sorted(run.data.metrics)
            if not TIMED.fullmatch(name)
        }

    def view(self, run: Any) -> dict[str, Any]:
        """One run."""
        tags = {
            k: v
            for k, v in sorted(plain_tags(run.data.tags).items())
            if k in KEPT_TAGS or not k.startswith(MACHINES)
        }
        inputs = [
            [i.dataset.name, i.dataset.digest, i.tags[0].value] for i in run.inputs.dataset_inputs
        ]
        return {
            "status": run.info.status,
            "tags": tags,
            "params": dict(sorted(run.data.params.items())),
            "history": self.history(run),
            "inputs": sorted(inputs),
            "artifacts": self.artifacts(run.info.run_id),
        }

    def local_files(self) -> list[str]:
        """Every file below the output folder."""
        folder = self.root / "experiments"
        return sorted(
            p.relative_to(folder).as_posix()
            for p in folder.rglob("*")
            if p.is_file() and p.name != RECORD  # says whose folder it is
        )

    def left(self) -> dict[str, Any]:
        """Everything, with names in the place of ids and of this machine's paths."""
        runs = self.runs()
        names = {run.info.run_id: f"<run{i:02d}>" for i, run in enumerate(runs)}
        found = {names[run.info.run_id]: self.view(run) for run in runs}
        made = {names[run_id]: scenario for scenario, run_id in self.made.items()}
        return self.text({"runs": found, "made": made, "files": self.local_files()}, names)


def digest(value: Any) -> str:
    """Length and hash of a value's JSON."""
    text = json.dumps(value, sort_keys=True)
    return f"{len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


HEADLINE = ("step", "effective_rank", "loss", "rank_recovery_pct", "loss_recovery_pct", "alignment")


def short(name: str, content: Any) -> Any:
    """One file as it is kept: summaries in full, trajectories by their headline, the rest by hash;
    of a configuration also the names of its entries.
    """
    if name.endswith("_summary.json") or len(json.dumps(content)) < 200:
        return content
    if name.endswith(".jsonl"):
        rows = [{k: row[k] for k in HEADLINE if k in row} for row in content]
        return {"columns": digest(sorted(content[0])), "rows": rows, "all": digest(content)}
    if name == "config.json":
        return {"entries": " ".join(sorted(content)), "all": digest(content)}
    return digest(content)


def compacted(left: dict[str, Any]) -> dict[str, Any]:
    """The same with most of it as hashes: ``--full`` writes all, to see where two differ."""
    for run in left["runs"].values():
        history = run["history"]
        run["history"] = {"metrics": " ".join(sorted(history)), "points": digest(history)}
        run["artifacts"] = {name: short(name, c) for name, c in run["artifacts"].items()}
        run["params"] = " ".join(f"{k}={v}" for k, v in sorted(run["params"].items()))
        for name, value in run["tags"].items():
            run["tags"][name] = value if len(value) < 300 else digest(value)
    # By the names put in: the ids they stand for sort differently every time.
    left["files"] = {"number": len(left["files"]), "all": digest(sorted(left["files"]))}
    return left


def scenarios(root: pathlib.Path) -> Iterator[tuple[str, Store]]:
    """Run every scenario below a folder, which is the working directory meanwhile."""
    torch.set_num_threads(1)
    stub_code_digest()
    stub_place()
    before = pathlib.Path.cwd()
    uri = f"sqlite:///{root}/mlflow.db"
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.chdir(root)
    try:
        mlflow.set_tracking_uri(uri)
        store = Store(root)
        for name in SCENARIOS:
            store.run(name)
            yield name, store
    finally:
        os.chdir(before)


def collect(root: pathlib.Path, *, full: bool = False) -> dict[str, Any]:
    """Run everything and say what it left."""
    store: Store | None = None
    for name, store in scenarios(root):  # noqa: B007
        print(name, file=sys.stderr)
    assert store is not None
    left = store.left()
    return {"platform": platform(), **(left if full else compacted(left))}


@click.command()
@click.option("--full", is_flag=True, help="Everything instead of hashes, to compare two versions.")
@click.argument("target", type=click.Path(path_type=pathlib.Path), default=STORED)
def main(target: pathlib.Path, full: bool) -> None:
    """Run the scenarios and write what they left to TARGET."""
    with tempfile.TemporaryDirectory() as folder:
        found = collect(pathlib.Path(folder).resolve(), full=full)
    target.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{target.stat().st_size} bytes → {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
