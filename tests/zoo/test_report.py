"""Tables, numbers and figures."""

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from zoo.report import PALETTE, plot_style, print_table, run_folder, save_figure, write_metrics, write_predictions


def test_a_table_is_never_cut(capsys):
    rows = [{"name": "x" * 200, "score": 0.123456}, {"name": "[b]", "score": None, "count": 12345}]
    print_table("Title", rows, ["name", "score", "count"])
    shown = capsys.readouterr().out
    for part in ("Title", "x" * 200, "0.1235", "[b]", "12,345", " - "):
        assert part in shown


def test_a_table_without_rows(capsys):
    print_table("Nothing", [])
    assert "Nothing" in capsys.readouterr().out


def test_metrics(tmp_path):
    path = write_metrics(tmp_path, {"a": 1, "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1.0, "b": None}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_predictions(tmp_path):
    path = write_predictions(tmp_path, [{"id": 1, "experts": [0, 2]}, {"id": 2, "experts": [1]}])
    assert pd.read_parquet(path)["experts"].map(list).tolist() == [[0, 2], [1]]


def test_figures_share_a_style(tmp_path):
    with plot_style():
        figure = Figure(figsize=(4, 3))
        (line,) = figure.subplots().plot([1, 2])
    assert line.get_color() == PALETTE[0]
    path = save_figure(figure, tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = write_metrics(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        write_metrics(tmp_path, {"a": "one"})
    assert json.loads(path.read_text()) == {"a": 1.0}


def test_run_folder(tmp_path):
    assert run_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="Cannot write the run folder"):
        run_folder(tmp_path / "file")
