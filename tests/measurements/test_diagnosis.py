"""Statuses and sentences by hand-made diagnoses: the whole decision table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from healing.measurements.diagnosis import Diagnosis, Failure, HealthyReplay

FINE = Diagnosis("fp32", None, None, False, None, 0, 0, 20)
UPDATE = Failure(1, "update", "embed.weight")
OVERFLOW = Failure(3, "forward", "layers.1.mlp")
BROKEN = Failure(0, "forward", "head")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"scaler_skipped_steps": 3, "precision": "fp16 autocast"}, "ok"),
        ({"nonfinite_steps": 2, "failure": OVERFLOW}, "nonfinite_steps"),
        ({"in_float32": BROKEN}, "lockout"),
        # Whatever else is known: a model that cannot compute in fp32 is locked out.
        (
            {"in_float32": BROKEN, "failure": UPDATE, "stalled": True, "precision": "pure fp16",
             "healthy_replay": HealthyReplay(1, UPDATE)},
            "lockout",
        ),
        (
            {"failure": UPDATE, "stalled": True, "precision": "pure fp16",
             "healthy_replay": HealthyReplay(1, Failure(1, "update", "another.weight"))},
            "optimiser_artifact",
        ),
        (
            {"failure": UPDATE, "stalled": True, "healthy_replay": HealthyReplay(1, UPDATE)},
            "optimiser_artifact",
        ),
        (
            {"failure": OVERFLOW, "stalled": True, "precision": "fp16 autocast",
             "healthy_replay": HealthyReplay(3, None)},
            "format_overflow",
        ),
        # A healthy model that fails in another way does not explain this failure.
        (
            {"failure": OVERFLOW, "stalled": True, "precision": "pure fp16",
             "healthy_replay": HealthyReplay(3, UPDATE)},
            "format_overflow",
        ),
        (
            {"failure": OVERFLOW, "stalled": True, "healthy_replay": HealthyReplay(3, None)},
            "diverged",
        ),
        (
            {"failure": OVERFLOW, "stalled": True, "healthy_replay": HealthyReplay(3, UPDATE)},
            "diverged",
        ),
    ],
)  # fmt: skip
def test_status(changes, status):
    assert replace(FINE, **changes).status == status


def test_sentences_say_what_failed_and_what_the_healthy_model_did():
    assert FINE.sentence == "20 of 20 steps were taken."
    skipped = replace(FINE, precision="fp16 autocast", scaler_skipped_steps=3)
    assert skipped.sentence == (
        "17 of 20 steps were taken; the gradient scaler skipped 3 to lower its scale."
    )
    lost = replace(FINE, nonfinite_steps=2, failure=OVERFLOW)
    assert lost.sentence == (
        "18 of 20 steps were taken; 2 were not finite: at step 3 the output of layers.1.mlp is not "
        "finite."
    )
    assert replace(FINE, in_float32=replace(BROKEN, origin="weights")).sentence == (
        "The collapsed model cannot compute in fp32: head to begin with is not finite."
    )
    stalled = replace(FINE, precision="pure fp16", failure=UPDATE, stalled=True)
    start = (
        "The collapsed model computes in fp32, but pure fp16 training could not go on: at step 1 "
        "embed.weight after the update is not finite; "
    )
    ends = {
        HealthyReplay(1, None): "the healthy model takes the same 1 steps.",
        HealthyReplay(
            1, UPDATE
        ): "the healthy model fails the same way: at step 1 embed.weight after "
        "the update is not finite.",
        HealthyReplay(
            1, Failure(1, "gradient", "w")
        ): "the healthy model fails differently: at step 1 the gradient of w is not finite.",
        None: "the healthy model was not tried.",
    }
    for control, end in ends.items():
        assert replace(stalled, healthy_replay=control).sentence == start + end


def test_summary_names_the_failure_that_decides():
    nothing = FINE.summary()
    assert (nothing["nonfinite_origin"], nothing["nonfinite_module"]) == ("none", "")
    assert math.isnan(nothing["nonfinite_step"])
    assert nothing["control_origin"] == ""
    both = replace(FINE, in_float32=BROKEN, failure=OVERFLOW, stalled=True).summary()
    assert (both["status"], both["nonfinite_module"], both["nonfinite_step"]) == (
        "lockout", "head", 0,
    )  # fmt: skip
    controlled = replace(
        FINE, failure=OVERFLOW, stalled=True, healthy_replay=HealthyReplay(3, UPDATE)
    ).summary()
    assert (controlled["nonfinite_origin"], controlled["nonfinite_step"]) == ("forward", 3)
    assert (controlled["control_steps"], controlled["control_origin"]) == (3, "update")
    assert (controlled["control_module"], controlled["control_step"]) == ("embed.weight", 1)
    passed = replace(
        FINE, failure=OVERFLOW, stalled=True, healthy_replay=HealthyReplay(3, None)
    ).summary()
    assert passed["control_origin"] == "none"
