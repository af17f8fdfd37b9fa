"""The fits of times against sizes."""

from __future__ import annotations

import xml.dom.minidom

import pytest

from t2v_rt.benchmarks.scaling import fit, parse_size, plot
from t2v_rt.errors import RequestError


def test_a_parabola_is_found_and_so_is_the_share_of_its_square() -> None:
    tokens = [80, 320, 1280, 5120]
    found = fit(tokens, [0.001 + 2e-5 * n + 3e-9 * n * n for n in tokens], 2)
    assert found["coefficients"] == pytest.approx([0.001, 2e-5, 3e-9])
    assert found["largest_error"] < 1e-9
    whole = 0.001 + 2e-5 * 5120 + 3e-9 * 5120**2
    assert found["shares"] == pytest.approx([0.001 / whole, 2e-5 * 5120 / whole, 3e-9 * 5120**2 / whole])


def test_what_is_no_line_is_told_by_its_error() -> None:
    assert fit([1, 2, 3, 4], [1, 4, 9, 16], 1)["largest_error"] > 0.1


def test_the_plot_has_a_panel_for_each_fit() -> None:
    rows = [{"tokens": n, "num_frames": n, "p50": 0.1 * n, "peak_rss_bytes": 10**8} for n in (1, 2, 3)]
    line = {"coefficients": [0.0, 0.1]}
    svg = plot({"predictions": rows, "decodes": rows, "fits": dict.fromkeys("abc", line)})
    texts = {item.firstChild.data for item in xml.dom.minidom.parseString(svg).getElementsByTagName("text")}  # type: ignore[union-attr]
    assert {"seconds of a prediction", "seconds of decoding", "MB of decoding", "tokens", "frames"} <= texts


def test_sizes_are_read_width_first() -> None:
    assert parse_size("832x480x81") == (480, 832, 81)
    with pytest.raises(RequestError, match="WIDTHxHEIGHTxFRAMES"):
        parse_size("832x480")
