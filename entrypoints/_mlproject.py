"""Print the MLproject file that belongs to the configuration classes.

``python -m entrypoints._mlproject > MLproject`` after a field was added or changed.
"""

from __future__ import annotations

import json

from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.heal import HealConfig
from healing.config.import_results import ImportConfig
from healing.config.options import fields_of, flag_name
from healing.config.pretrain import PretrainConfig
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig

STAGES = {
    "main": SweepConfig,
    "attack": AttackConfig,
    "heal": HealConfig,
    "summarize": SummarizeConfig,
    "import_results": ImportConfig,
    "pretrain": PretrainConfig,
    "basin": BasinConfig,
}
HEADER = """\
name: llm-healing

conda_env: conda.yaml

# Made by `python -m entrypoints._mlproject` from the classes in healing/config/.
entry_points:
"""


def entry_point(name: str, config_class: type) -> str:
    """One stage: its parameters with type and default, and its command."""
    lines = [f"  {name}:", "    parameters:"]
    for field, kind, may_be_auto in fields_of(config_class):
        # MLflow validates no type; `path` and `uri` would act, and fail on what does not exist yet.
        spelled = "string" if may_be_auto or kind in (str, bool) else kind.__name__
        lines.append(
            f"      {field.name}: {{type: {spelled}, default: {json.dumps(field.default)}}}"
        )
    lines += ["    command: >-", f"      python -m entrypoints.{name}"]
    lines += [
        f"      {flag_name(field.name)} {{{field.name}}}" for field, _, _ in fields_of(config_class)
    ]
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole file."""
    return HEADER + "\n".join(entry_point(name, cls) for name, cls in STAGES.items())


if __name__ == "__main__":
    print(render(), end="")
