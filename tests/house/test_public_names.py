"""What users import goes on working: the public names, and the paths of before the package had wings."""

from __future__ import annotations

import importlib
import warnings

import pytest

import prunekit

NAMES = [
    "Activation", "Algorithm", "AxisEvidence", "Budget", "Checkpoint", "Clock", "Collector", "Comparison", "Compensation",
    "Consumer", "ConsumerGradients", "Event", "Evolution", "GateGradients", "Ladder", "LeastSquares", "MaskHandle", "Merge",
    "Needs", "NextChanges", "Outcome", "Plan", "Profile", "Propagation", "Pruner", "RatioSearch", "RatioSpace",
    "Reconstruction", "Searcher", "Sensitivity", "Step", "Structure", "Trials", "Verification", "algorithms", "analyze",
    "compare", "cut", "cut_shards", "errors", "hookimpl", "load", "mask", "plan", "plan_of", "profile", "prune", "recalibrate",
    "save", "verify",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_public_names_of_version_0_1_are_still_there(name: str) -> None:
    assert name in prunekit.__all__
    assert getattr(prunekit, name) is not None


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "prunekit.axes": "Axis Axes Fixed Product Concat product concat positions mask polynomial",
        "prunekit.structure": "Structure AxisInfo Member KINDS DEFAULT_KINDS read_structure",
        "prunekit.evidence": "WeightEvidence weight_evidence",
        "prunekit.calibration": "Calibration Sums",
        "prunekit.profiling": "Profile Comparison profile interleaved",
        "prunekit.tracing": "Call dims_of tensors_in",
        "prunekit.errors": "PrunekitError",
        "prunekit.training": "Schedule GroupLasso distillation_loss cut_average",
        "prunekit.export": "to_onnx to_pt2",
        "prunekit.report": "Report make_report measure_sensitivity",
        "prunekit.testing": "CHECKS randomize toy",
    }.items(),
)
def test_old_paths_work_through_the_faces(module: str, names: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(importlib.import_module(module), name) is not None for name in names.split())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("prunekit.adapting.Adapter", "prunekit.plugin.Adapter"),
        ("prunekit.hookspecs.Event", "prunekit.Event"),
        ("prunekit.hookspecs.hookimpl", "prunekit.hookimpl"),
        ("prunekit.masking.MaskHandle", "prunekit.MaskHandle"),
        ("prunekit.compensation.Compensation", "prunekit.Compensation"),
        ("prunekit.structure.fingerprint", "prunekit.model.fingerprint"),
    ],
)
def test_what_has_moved_is_found_with_a_warning(old: str, new: str) -> None:
    def found(dotted: str) -> object:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)

    with pytest.warns(DeprecationWarning, match="has moved"):
        assert found(old) is found(new)


def test_a_name_that_never_was_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'novelty'"):
        importlib.import_module("prunekit.adapting").novelty  # noqa: B018
