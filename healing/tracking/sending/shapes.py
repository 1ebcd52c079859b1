"""What a request may look like. An outbox is read from disk: it may be damaged, of another version,
or made by somebody else, and a store takes some of what is wrong for a failure of its own.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import PIL.Image

from healing.tracking.sending.outbox import Request

Check = Callable[[Any], bool]

_LARGEST = 2**63
"""Whole numbers of a database are below it."""
_ID = re.compile(r"[\w-]{1,250}", re.ASCII)
_STATUSES = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")


def _text(value: Any) -> bool:
    """Whether it can be written everywhere: half a pair of surrogates cannot, nor a null byte."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _number(value: Any) -> bool:
    return type(value) is float or _whole(value)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(k) and _text(v) for k, v in value.items())


def _points(value: Any) -> bool:
    return isinstance(value, list) and all(_point(point) for point in value)


def _point(value: Any) -> bool:
    """Name, value, time, step."""
    checks = (_text, _number, _whole, _whole)
    if not isinstance(value, list) or len(value) != len(checks):
        return False
    return all(check(part) for check, part in zip(checks, value, strict=True))


def _below(value: Any) -> bool:
    """Whether it names a folder of a run's artifacts."""
    if value is None:
        return True
    return _text(value) and not {"..", "/"} & {*pathlib.PurePosixPath(value).parts}


def _experiment(value: Any) -> bool:
    return _texts(value) and len({"id", "name"} & {*value}) == 1


def _columns(value: Any) -> bool:
    lists = isinstance(value, dict) and all(isinstance(cells, list) for cells in value.values())
    return lists and len({len(cells) for cells in value.values()}) <= 1


def _file_name(value: Any) -> bool:
    return _text(value) and "/" not in value and value not in ("", ".", "..")


def _status(value: Any) -> bool:
    return value in _STATUSES


def _moment(value: Any) -> bool:
    return value is None or _whole(value)


_FILE: Mapping[str, Check] = {"path": _text, "folder": _below}
_MODEL: Mapping[str, Check] = {"id": _id, "name": _text}
_FACTS: Mapping[str, Check] = {"facts": _texts, "tags": _texts}
SHAPES: Mapping[str, Mapping[str, Check]] = {
    "create": {"experiment": _experiment, "name": _text, "tags": _texts, "start": _whole},
    "join": {},
    "batch": {"what": _text, "metrics": _points, "params": _texts, "tags": _texts},
    "describe": {"markdown": _text, "parent": _text},
    "input": {"name": _text, "digest": _text, "context": _text, "facts": _texts},
    "end": {"status": _status, "time": _moment},
    "artifact": _FILE,
    "image": {"path": _text, "key": _text, "step": _whole, "time": _whole, "id": _id},
    "table": {"name": _file_name, "columns": _columns},
    "model": {**_MODEL, **_FACTS, "step": _whole},
    "model_file": {**_MODEL, **_FILE},
    "model_ready": {**_MODEL, **_FACTS, "metrics": _points, "register_as": _text},
}
"""Kind → entry of its content → whether a value is one."""


def unusable(request: Request, file: pathlib.Path | None) -> str:
    """Why nothing can be done with a request; empty where it is one that this version writes.

    Args:
        request: From an outbox.
        file: That it sends.
    """
    shape = SHAPES.get(request.kind)
    if shape is None:
        return "this version does not know its kind"
    if not _id(request.run):
        return "its run has no proper id"
    for name, check in shape.items():
        if name not in request.content:
            return f"it lacks {name}"
        if not check(request.content[name]):
            return f"its {name} cannot be read"
    return _undrawn(file) if request.kind == "image" and file is not None else ""


def _undrawn(file: pathlib.Path) -> str:
    """Whether a file is no picture, or half of one."""
    try:
        with PIL.Image.open(file) as picture:
            picture.load()
    except FileNotFoundError:
        return ""  # said where it is needed
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return "its picture cannot be read"
    return ""
