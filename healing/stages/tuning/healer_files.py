"""Where a healer is found: a file, a tune run, or one that is included."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from healing.config.heal import HealConfig
from healing.config.healer import HEALER_NAME, INCLUDED, Healer, included_healers
from healing.config.options import AUTO
from healing.config.paths import is_address, local_path
from healing.config.presets import model_label
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError, TrackingError
from healing.tracking.run_files import read_json
from healing.tracking.store import Store


def find_healer(source: str, store: Store) -> Healer:
    """The healer that ``--healer`` names.

    Args:
        source: Name of an included one, path or MLflow URI of a file, or id of a tune run.
        store: Where runs are.

    Raises:
        ConfigError: It is none of these, or the file is no healer.
        TrackingError: The store cannot be reached.
    """
    path = _path_of(source, store)
    try:
        entries = read_json(path)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"--healer {source} cannot be read ({error}): name another") from error
    return Healer.of(entries, source)


def _path_of(source: str, store: Store) -> pathlib.Path:
    if source in included_healers():
        return INCLUDED / f"{source}.json"
    if not is_address(source):
        path = local_path(source, "--healer")
        if path.is_file() or source.endswith(".json"):
            return path
    uri = source if is_address(source) else f"runs:/{source}/{HEALER_NAME}"
    try:
        return store.download(uri)
    except TrackingError as error:
        known = ", ".join(included_healers())
        raise ConfigError(
            f"--healer {source} is no file, no tune run with a {HEALER_NAME} ({error})"
            + (f", and none of those included ({known})" if known else "")
        ) from error


def with_healer(config: HealConfig, store: Store) -> tuple[HealConfig, Healer | None]:
    """A healing configuration with the settings of the healer that it names, and the healer.

    Raises:
        ConfigError: There is no such healer, or a setting that was given contradicts it.
    """
    if not config.healer:
        return config, None
    healer = find_healer(config.healer, store)
    return healer.applied(config), healer


def healers_of(config: SweepConfig, store: Store) -> dict[str, tuple[str, Healer]]:
    """Label of a model → its healer as it was named, and itself; empty where none is named. For
    ``auto`` models may have none.

    Raises:
        ConfigError: One cannot be had, two are for one model, a model has none or one has no model,
            or a seed was used to select one.
    """
    found: dict[str, tuple[str, Healer]] = {}
    seeds = {
        model_label(model, config.revision, config.deduped): own
        for model, own in config.seeds_by_model().items()
    }
    if config.healer == AUTO:
        return dict(_included(config, seeds, store))
    for source in config.healer_list():
        healer = find_healer(source, store)
        label = healer.model
        if label in found or label not in seeds:
            why = "two are" if label in found else "one is"
            raise ConfigError(f"--healer {config.healer}: {why} for {label}; name one per model")
        healer.check_use(source, label, seeds[label])
        found[label] = (source, healer)
    without = [label for label in seeds if label not in found]
    if found and without:
        raise ConfigError(
            f"--healer {config.healer} has none for {', '.join(without)}: tune one, or leave the "
            "model out of --models"
        )
    return found


def _included(
    config: SweepConfig, seeds: Mapping[str, Iterable[int]], store: Store
) -> Iterator[tuple[str, tuple[str, Healer]]]:
    """The included healers of models, where no setting that they decide is given as another one."""
    plain = {field.name: field.default for field in dataclasses.fields(config)}
    for label in sorted(set(seeds) & set(included_healers())):
        healer = find_healer(label, store)
        decided = {name: value for name, value in healer.settings.items() if name in plain}
        if all(getattr(config, n) in (value, plain[n]) for n, value in decided.items()):
            healer.check_use(f"{label} (none: the default rate)", label, seeds[label])
            yield label, (label, healer)
