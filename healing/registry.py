"""Arms, healing methods and extra measurements by name: one file each, found in its folder.

Name = file name, help = first line of the file's docstring. What must be known without running
anything (label, role, colour …) is read from the file's text, so that ``--help``, statistics and
figures import neither the file nor torch. Other distributions add their own through entry points
(``importlib.metadata``) that name a module.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import pathlib
import pkgutil
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from healing.errors import ConfigError

NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
"""Names go into folder names, tags and metrics."""
BUILT_IN = "built in"

TREATMENT, MECHANISM, POSITIVE_CONTROL, CONTROL, DAMAGE_CONTROL, YARDSTICK, SHAM = (
    "treatment",
    "mechanism",
    "positive_control",
    "control",
    "damage_control",
    "yardstick",
    "sham",
)
ROLES = {
    TREATMENT: (
        "the attack that the question is about: verdicts are of its groups, all contrasts are of "
        "it, the noise is matched to it, `main --basin` examines its landscape"
    ),
    MECHANISM: (
        "the treatment with what it searches for put in by construction: what its theory alone "
        "does; the second primary contrast"
    ),
    POSITIVE_CONTROL: (
        "does directly what the treatment is meant to cause, by means that the treatment does not "
        "have: shows that the measurement sees the effect"
    ),
    CONTROL: (
        "the same training without what is special to the treatment; the first primary contrast"
    ),
    DAMAGE_CONTROL: (
        "harm by other means, of the size of a given attack's: takes a reference, runs after the "
        "treatment of its seed and is paired with it; secondary contrasts"
    ),
    YARDSTICK: (
        "no attack: a model that knows nothing, healed through the same budget; a collapsed model "
        "that ends no better has lost everything"
    ),
    SHAM: (
        "the healthy model itself: healed first, the reference of recoveries; has no damage, and "
        "therefore no half-recovery time, line in figures or place among undefined runs"
    ),
}
"""What an arm is in the design of the experiment: role → meaning. Code asks for these, never for
the name of an arm."""

MATCHES = ("norm", "loss", "rank", "rank+loss")
"""What a damage control can share with its reference."""
NEEDS = ("reference", "direction")
"""Other attacks without whose checkpoint there is nothing that an arm could do."""


REFERENCES = HEALTHY, COLLAPSED = ("healthy", "collapsed")
"""States that a measurement can compare with."""


@dataclass(frozen=True)
class Facts:
    """What a file says of itself in its text.

    Attributes:
        name: Of the entry.
        help: First line of its docstring.
        constants: Upper-case names at its top level whose values are plain literals.
        source: ``built in``, or distribution and version of a plug-in.
    """

    name: str
    help: str
    constants: Mapping[str, Any]
    source: str = BUILT_IN

    @property
    def built_in(self) -> bool:
        """Whether it is one of this project's own."""
        return self.source == BUILT_IN

    def get(self, constant: str, default: Any) -> Any:
        """A constant's value, or the default where the file does not give it."""
        return self.constants.get(constant, default)


@dataclass(frozen=True)
class _Entry:
    module: str
    source: str
    problem: str = ""


def source_file(module: str) -> pathlib.Path | None:
    """File of a module without importing it (its parent packages are); ``None`` where there is
    none.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return pathlib.Path(spec.origin)


_PARSING = threading.Lock()
"""Python 3.11 counts its parser's depth once per process: two threads that parse at once end in
``SystemError: AST constructor recursion depth mismatch``."""


def parse(source: str) -> ast.Module:
    """Syntax tree of a source; for threads too."""
    with _PARSING:
        return ast.parse(source)


def _said(text: str) -> tuple[str, dict[str, Any]]:
    """First line of the docstring, and the literal constants of a source."""
    tree = parse(text)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name) and target.id.isupper():
            try:
                found[target.id] = ast.literal_eval(value)
            except ValueError:  # an expression: known only once it is imported
                continue
    return (ast.get_docstring(tree) or "").partition("\n")[0].rstrip("."), found


class Registry:
    """Files of one kind by name, loaded when they are used.

    Args:
        package: Holds exactly one module per built-in name.
        group: Entry points in which other distributions name their modules.
        kind: What an entry is called in messages.
        required: What a loaded module must have.
        order: Sorts the entries by their facts.
        objection: What is wrong with a file's facts; empty where nothing is.
    """

    def __init__(
        self,
        package: str,
        group: str,
        kind: str,
        required: tuple[str, ...],
        order: Callable[[Facts], Any] = lambda facts: facts.name,
        objection: Callable[[Facts], str] = lambda _: "",
    ) -> None:
        self.package, self.group, self.kind, self.required = package, group, kind, required
        self._order, self._objection = order, objection

    @functools.cached_property
    def _found(self) -> dict[str, _Entry]:
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        found = {
            module.name: _Entry(f"{self.package}.{module.name}", BUILT_IN)
            for module in pkgutil.iter_modules(folders)
        }
        plug_ins = importlib.metadata.entry_points(group=self.group)
        for entry in sorted(plug_ins, key=lambda e: (e.name, e.value)):
            source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module
            problem = ""
            if not NAME.fullmatch(entry.name):
                problem = "a name has at most 31 of a-z, 0-9 and _, the first a letter"
            elif entry.attr:
                problem = f"its entry point must name a module, not {entry.value}"
            if entry.name in found:
                taken = found[entry.name]
                problem = f"{taken.source} has the same name: uninstall {source}"
                found[entry.name] = _Entry(taken.module, taken.source, f"{source}: {problem}")
            else:
                found[entry.name] = _Entry(entry.module, source, problem and f"{source}: {problem}")
        return found

    @functools.cached_property
    def _facts(self) -> dict[str, Facts]:
        return {name: self._read(name, entry) for name, entry in self._found.items()}

    def _read(self, name: str, entry: _Entry) -> Facts:
        path = source_file(entry.module)
        if path is None:
            return Facts(name, f"(module {entry.module} is not found)", {}, entry.source)
        try:
            return Facts(name, *_said(path.read_text(encoding="utf-8")), entry.source)
        except (OSError, SyntaxError, ValueError) as error:
            return Facts(name, f"({path} cannot be read: {error})", {}, entry.source)

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        sound = [f for f in self._facts.values() if NAME.fullmatch(f.name)]
        return tuple(f.name for f in sorted(sound, key=self._order))

    def forget(self) -> None:
        """Look for files and entry points again at the next question."""
        for name in ("_found", "_facts", "_names"):
            self.__dict__.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All names in their order; a plug-in with a fault is among them until it is asked for."""
        return self._names

    def known(self, name: str) -> bool:
        """Whether there is such a name here; stored runs may have others."""
        return name in self._found

    def facts(self, name: str) -> Facts:
        """What the text of a file says; nothing is imported.

        Raises:
            ConfigError: There is no such name.
        """
        if name not in self._facts:
            raise ConfigError(
                f"unknown {self.kind} {name!r}: choose one of {', '.join(self.names())}"
            )
        return self._facts[name]

    def all_facts(self) -> list[Facts]:
        """Of every name, in their order."""
        return [self.facts(name) for name in self.names()]

    def describe(self) -> str:
        """Every name with its clause, for ``--help``."""
        return "; ".join(f"{f.name}: {f.help}" for f in self.all_facts())

    def check(self, name: str) -> None:
        """Check what can be checked without importing anything.

        Raises:
            ConfigError: No such name, or a plug-in whose name or facts are not admissible.
        """
        facts = self.facts(name)
        problem = self._found[name].problem
        if not problem and (objection := self._objection(facts)):
            problem = f"{facts.source}: {objection}"
        if problem:
            raise ConfigError(f"{self.kind} {name!r} of {problem}")

    def module(self, name: str) -> str:
        """Name of the module behind a name: the root of its part of a code digest.

        Raises:
            ConfigError: As :meth:`check`.
        """
        self.check(name)
        return self._found[name].module

    def load(self, name: str) -> Any:
        """The module behind a name, imported now.

        Raises:
            ConfigError: As :meth:`check`; or it cannot be imported, or lacks what is required.
        """
        module, source = self.module(name), self._found[name].source
        try:
            loaded = importlib.import_module(module)
        except (ImportError, SyntaxError) as error:
            raise ConfigError(
                f"{self.kind} {name!r} of {source}: {module} cannot be imported ({error})"
            ) from error
        lacking = [r for r in self.required if not hasattr(loaded, r)]
        if lacking:
            raise ConfigError(
                f"{self.kind} {name!r} of {source}: {module} lacks {', '.join(lacking)}"
            )
        return loaded


def role_of(facts: Facts) -> str:
    """Role of an arm; ``control`` where its file gives none."""
    return str(facts.get("ROLE", CONTROL))


def _arm_order(facts: Facts) -> tuple[int, str]:
    roles = list(ROLES)
    role = role_of(facts)
    return roles.index(role) if role in roles else len(roles), facts.name


def _arm_objection(facts: Facts) -> str:
    role, colour, marker = role_of(facts), facts.get("COLOUR", "#666666"), facts.get("MARKER", "o")
    if role not in ROLES:
        return f"ROLE is {role!r}, not one of {', '.join(ROLES)}"
    if role == SHAM and not facts.built_in:
        return "the sham is the healthy model itself, there is no second one: choose another ROLE"
    choices = (("MATCHES", MATCHES), ("NEEDS", NEEDS), ("FORMER_ROLES", tuple(ROLES)))
    for name, admissible in choices:
        given = facts.get(name, ())
        if not isinstance(given, tuple) or not set(given) <= set(admissible):
            return f"{name} is {given!r}, not a tuple of some of {', '.join(admissible)}"
    if not re.fullmatch(r"#[0-9A-Fa-f]{6}", str(colour)):
        return f"COLOUR is {colour!r}, not of the form #RRGGBB"
    if marker not in tuple("ov^<>1234sp*hH+xDdPX8"):
        return f"MARKER is {marker!r}, not one of matplotlib's letters"
    return ""


ARMS = Registry(
    "healing.attacks.arms", "llm_healing.arms", "arm", ("make",), _arm_order, _arm_objection
)
"""``make(context: AttackContext) -> Arm``; ROLE, FORMER_ROLES (of stored runs),
LABEL, SHORT, COLOUR, MARKER, MATCHES, NEEDS and OPTIONS as literals."""
METHODS = Registry(
    "healing.training.methods",
    "llm_healing.methods",
    "healing method",
    ("check", "n_trainable", "adapted"),
)
"""``check(config)``, ``n_trainable(model, config)``, ``adapted(model, config, generator)``;
RATE_RATIO, KEEPS_WEIGHTS, SHARDED and OPTIONS as literals (see ``training/methods/lora.py``)."""


def _measurement_objection(facts: Facts) -> str:
    needs = facts.get("NEEDS", ())
    if not isinstance(needs, tuple) or not set(needs) <= set(REFERENCES):
        return f"NEEDS is {needs!r}, not a tuple of {', '.join(REFERENCES)}"
    return ""


MEASUREMENTS = Registry(
    "healing.measurements.extra",
    "llm_healing.measurements",
    "measurement",
    ("measure",),
    objection=_measurement_objection,
)
"""``measure(state: ProbeState) -> Mapping[str, float]``; UNITS (name → unit) and SHARDED as
literals. One that compares states names those it compares with in NEEDS, of :data:`REFERENCES`,
and has ``remember(model, windows) -> object``, which is called at each of them."""
