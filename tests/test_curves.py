"""The pictures of losses in docs/, by benchmarks/curves.py."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import curves

PICTURES = sorted((Path(curves.__file__).parents[1] / "docs").glob("*.svg"))


def test_a_picture_has_title_axes_with_units_legend_and_the_differences(tmp_path, monkeypatch, capsys):
    runs = {"one": [[step, 4.0] for step in range(1, 101)], "two": [[step, 4.5] for step in range(1, 101)]}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    picture = tmp_path / "new" / "picture.svg"
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path / "runs.json"), str(picture), "--title", "Two runs"])
    curves.main()
    assert capsys.readouterr().out == "one: 4.0000 (+0.00%)\ntwo: 4.5000 (+12.50%)\n"
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", picture.read_text())
    for text in (
        "Two runs",
        "loss (nats/token)",
        "Difference from one",
        "step (each point is the mean of 25)",
        "nats/token",
    ):
        assert text in texts, text
    assert {"one: 4.0000", "two: 4.5000"} <= set(texts)
    content = picture.read_bytes()
    curves.main()
    assert picture.read_bytes() == content  # so a picture changes with its data alone


def test_differences_are_those_at_the_same_steps():
    assert curves.differences([(1, 2.0), (2, 3.0), (9, 1.0)], [(1, 1.0), (2, 1.0)]) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_no_picture_of_the_docs_needs_the_network(path):
    references = re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)", path.read_text())
    assert all((link or url).startswith("#") for link, url in references)
