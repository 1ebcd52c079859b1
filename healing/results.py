"""What a notebook gets: results of stages that show themselves."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from healing.errors import ConfigError
from healing.models.checkpoints import (
    CHECKPOINT_NAME,
    HEALED_NAME,
    load_state,
    read_checkpoint,
)
from healing.statistics.summary import Summary
from healing.tracking.run_files import read_json, read_jsonl
from healing.tracking.store import Store

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Picture:
    """A figure on disk; a notebook shows it."""

    path: pathlib.Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Result:
    """What a stage left.

    Attributes:
        run_id: MLflow's id, or one of this process where nothing is tracked.
        folder: Local folder with everything that was written.
        description: Markdown.
        store: Where the run is.
    """

    run_id: str
    folder: pathlib.Path
    description: str
    store: Store = dataclasses.field(repr=False)

    summary_file = ""
    checkpoint_file = ""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as it is stored."""
        return read_json(self.folder / "config.json")

    @property
    def tags(self) -> Mapping[str, str]:
        """Statuses, verdicts and lineage."""
        return self.store.get_run(self.run_id).tags

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determined the result."""
        return self.tags["fingerprint"]

    def summary(self) -> dict[str, Any]:
        """Final numbers and statuses."""
        return read_json(self.folder / self.summary_file)

    @property
    def trajectory(self) -> list[dict[str, Any]]:
        """One dictionary per measurement, in the order of the steps."""
        path = self.folder / "metrics.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def to_frame(self) -> pd.DataFrame:
        """The trajectory as a pandas table."""
        import pandas as pd

        return pd.DataFrame(self.trajectory)

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that there are."""
        return tuple(sorted(path.stem for path in (self.folder / "plots").glob("*.png")))

    def figure(self, name: str = "") -> Picture:
        """One figure; without a name the first.

        Raises:
            ConfigError: There is none of this name.
        """
        wanted = name or self.figures[0]
        if wanted not in self.figures:
            raise ConfigError(f"no figure {wanted!r}: there are {', '.join(self.figures)}")
        return Picture(self.folder / "plots" / f"{wanted}.png")

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Copy everything to a folder that does not exist yet."""
        return pathlib.Path(shutil.copytree(self.folder, folder))

    @property
    def checkpoint(self) -> pathlib.Path:
        """The weights that the stage left."""
        return self.folder / "checkpoints" / self.checkpoint_file

    def model(self) -> PreTrainedModel:
        """The model with these weights, loaded anew: results hold none."""
        from healing.models.loading import load_model

        config, state = self.config, read_checkpoint(self.checkpoint)
        loaded = load_model(
            config["model"], config["device"], revision=config["revision"],
            deduped=config["deduped"],
        )  # fmt: skip
        load_state(loaded, state, str(self.checkpoint))
        return loaded.model

    def _repr_markdown_(self) -> str:
        return self.description


class AttackResult(Result):
    """A collapsed model: ``.model()``, ``.checkpoint``, ``.trajectory``, ``.summary()``."""

    summary_file = "attack_summary.json"
    checkpoint_file = CHECKPOINT_NAME


class HealResult(Result):
    """A healing run: ``.trajectory`` has the recoveries, ``.summary()`` the verdict."""

    summary_file = "healing_summary.json"
    checkpoint_file = HEALED_NAME

    @property
    def verdict(self) -> str:
        """Of the rank's recovery."""
        return str(self.summary()["verdict"])


class LandscapeResult(Result):
    """The loss landscape around the three states of a healing run."""

    summary_file = "basin_summary.json"


@dataclass(frozen=True)
class SummaryResult:
    """Many runs: groups with intervals and verdicts, as a notebook shows them.

    Attributes:
        summary: Everything that was estimated.
    """

    summary: Summary

    def to_frame(self) -> pd.DataFrame:
        """One row per group."""
        import pandas as pd

        from healing.reporting.plain_data import group_rows

        return pd.DataFrame(group_rows(self.summary))

    def __str__(self) -> str:
        from healing.reporting.tables import text_table

        return text_table(self.summary)

    def _repr_markdown_(self) -> str:
        from healing.reporting.markdown import markdown

        return markdown(self.summary)
