"""Questions to a store that never answers: nobody waits for them longer than he said."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest

from healing.errors import OutageError, TrackingError
from healing.tracking.sending.waiting import answer


def test_an_answer_or_its_error_comes_back() -> None:
    assert answer(lambda: 3, 60.0) == 3
    assert answer(lambda: None, None) is None

    def refused() -> int:
        raise TrackingError("no")

    with pytest.raises(TrackingError, match="no"):
        answer(refused, 60.0)


def test_who_gets_no_answer_in_time_goes_on() -> None:
    never = threading.Event()
    with pytest.raises(OutageError, match="no answer"):
        answer(never.wait, 0.0)
    never.set()


@pytest.mark.slow
def test_a_process_ends_though_its_question_has_no_answer() -> None:
    """A server may send its answer byte by byte, for ever."""
    script = """
        import threading
        from healing.errors import OutageError
        from healing.tracking.sending.waiting import answer
        try:
            answer(threading.Event().wait, 0.0)
        except OutageError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "no answer" in done.stdout
