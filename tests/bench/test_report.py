"""The plot of `fused-resnet bench`."""

from __future__ import annotations

import pytest

from fused_resnet.bench import report

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("iqr_ms", [1.0, 400.0])
def test_labels_are_inside_the_axes(iqr_ms):
    """Also those of figures that a busy machine scattered over several times their median."""
    from matplotlib.figure import Figure

    def row(images_per_s: float) -> dict[str, float]:
        return {"images_per_s": images_per_s, "median_ms": 100.0, "iqr_ms": iqr_ms,
                "ratio_to_eager": 0.5}  # fmt: skip

    case = {"batch": 1, "dtype": "float32", "contenders": {"eager": row(20.0), "fused": row(40.0)}}
    figure = Figure(figsize=(9, 4))
    ax = figure.subplots()
    report._draw_panel(ax, ("resnet18", "infer"), [case], ["eager", "fused"])
    figure.draw_without_rendering()
    top = ax.get_window_extent().y1
    assert [t.get_text() for t in ax.texts] == ["20.0", f"40.0\n2.00{report.TIMES}"]
    assert all(t.get_window_extent().y1 <= top for t in ax.texts)
