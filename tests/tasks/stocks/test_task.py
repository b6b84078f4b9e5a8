"""The real command line on a generated market and on a file of the user's own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from command_line import sentence

import zoo
from tasks.stocks.data import ALPHA20
from tasks.stocks.model import Miga, MigaEnsemble
from tasks.stocks.panel import BARS, generate_market
from tasks.stocks.task import LOW_VOLATILITY, StocksTask, calmness
from zoo import hub
from zoo.cli import main
from zoo.errors import UnknownNameError

SMALL = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--data.window=3", "--data.features=alpha20"]
GENERATED = ["--data.source=generated", "--data.train_index=null", "--data.market={days: 190, stocks: 24}", *SMALL]
NETWORK = "features: 20, window: 3, hidden_dim: 8, expert_dim: 4, num_groups: 2, experts_per_group: 3, top_k: 2"
NEW = ["--model.network", f"{{{NETWORK}}}"]
SPANS = [
    *("--data.train=[2000-03-03, 2000-03-08]", "--data.val=[2000-03-09, 2000-03-14]"),
    "--data.test=[2000-03-15, 2000-03-20]",
]
CONFIGS = sorted(Path("configs/stocks").glob("*.yaml"))
RELEASED = "stocks/miga-conv-csi300"
METRICS = {
    *("IC", "ICIR", "RankIC", "RankICIR", "neutral_RankIC", "excess_AR", "excess_AR_cost", "IR_cost", "MDD_cost"),
    *("turnover", "coverage"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    main(
        [
            "fit",
            "-c",
            "configs/stocks/miga-conv.yaml",
            *GENERATED,
            "--model.network",
            f"{{{NETWORK}}}",
            "--out",
            str(folder),
        ]
    )
    return folder


def write_bars(folder: Path, stocks: int = 12) -> Path:
    """Daily bars of the user's own under names of their own."""
    panel = generate_market(days=80, stocks=stocks).panel
    rows = [
        {"ticker": symbol, "day": date, **{name: getattr(panel, name)[row, column] for name in BARS}}
        for row, date in enumerate(panel.dates.astype(str))
        for column, symbol in enumerate(panel.symbols)
    ]
    path = folder / "bars.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    """Such bars."""
    return write_bars(tmp_path)


@pytest.fixture(scope="module")
def learned_from_a_file(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The checkpoint of a run on a file of the user's own, and what names the file."""
    folder = tmp_path_factory.mktemp("own")
    named = ["--data.file", str(write_bars(folder)), "--data.columns={symbol: ticker, date: day}"]
    main(["fit", "-c", "configs/stocks/own.yaml", *named, *SPANS, *SMALL, *NEW, "--out", str(folder / "run")])
    return [str(folder / "run/checkpoint"), *named, SMALL[1]]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_learns(config: Path, tmp_path: Path) -> None:
    kind = "mixture: false" if "twin" in config.stem else "mixture: true"
    network = ["--model.network", f"{{{NETWORK}, {kind}}}", "--trainer.max_epochs=1"]
    main(["fit", "-c", str(config), *GENERATED, *network, "--out", str(tmp_path)])
    hub.verify(tmp_path / "checkpoint")


def test_fit_saves_the_best_epoch_with_the_scaling_of_the_training_days(trained: Path) -> None:
    state = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    model = zoo.load(trained / "checkpoint")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"]), name
    assert model.feature_scale.ne(1).any()


def test_test_scores_beside_the_twin_and_volatility(trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoint")
    metrics = main(["test", checkpoint, *GENERATED, "--model.twin", checkpoint, "--out", str(tmp_path)])
    for method in ("", "twin/", f"{LOW_VOLATILITY}/"):
        assert {f"{method}{name}" for name in METRICS} <= set(metrics)
    assert metrics["RankIC"] == metrics["twin/RankIC"] and metrics["minus_twin/RankIC/high"] == 0
    assert metrics["RankIC/low"] <= metrics["RankIC"] <= metrics["RankIC/high"]
    assert 0 <= metrics["style_nmi"] <= 1
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["low_volatility/neutral_RankIC"] is None and written["IC"] == pytest.approx(metrics["IC"])
    for picture in ("rank_ic", "excess", "horizons", "experts"):
        assert (tmp_path / f"{picture}.png").is_file()
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    # Anyone can re-score it: a day's IC follows from its rows.
    by_day = [day["score"].corr(day["target"]) for _, day in rows.groupby("date")]
    assert np.mean(by_day) == pytest.approx(metrics["IC"], abs=1e-6)


def test_the_shipped_checkpoint_verifies_scores_and_predicts(tmp_path: Path) -> None:
    hub.verify(RELEASED)
    source = ["--data.source=generated", "--data.market={days: 190, stocks: 24}"]
    metrics = main(["test", RELEASED, *source, "--out", str(tmp_path / "test")])
    assert metrics["coverage"] == 100 and np.isfinite(metrics["RankIC"])
    main(["predict", RELEASED, *source, "--out", str(tmp_path / "latest")])
    rows = pd.read_parquet(tmp_path / "latest/predictions.parquet")
    assert len(rows) == 24 and rows["score"].is_monotonic_decreasing


def test_predict_ranks_the_latest_day_of_a_file(trained: Path, bars: Path, tmp_path: Path, capsys) -> None:
    columns = ["--data.columns={symbol: ticker, date: day}", "--trainer.enable_progress_bar=false"]
    columns += ["--data.window=3", "--data.features=alpha20"]
    model = ["--model.network=null", "--model.pretrained", str(trained / "checkpoint")]
    main(
        [
            "predict",
            "-c",
            "configs/stocks/own.yaml",
            *model,
            "--data.file",
            str(bars),
            *columns,
            "--out",
            str(tmp_path / "out"),
        ]
    )
    rows = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert rows["rank"].tolist() == list(range(1, 13)) and rows["score"].is_monotonic_decreasing
    assert set(rows["date"]) == {"2000-03-20"} and rows["experts"].str.match(r"\d \(0\.\d\d\), ").all()
    assert "Best of 12 stocks on 2000-03-20" in capsys.readouterr().out


def test_a_checkpoint_is_tested_on_what_it_learned_from(trained: Path, tmp_path: Path) -> None:
    checkpoint, quiet = str(trained / "checkpoint"), SMALL[1]
    metrics = main(["test", checkpoint, quiet, "--out", str(tmp_path)])
    assert "style_nmi" in metrics and not any(name.startswith("twin/") for name in metrics)
    assert set(pd.read_parquet(tmp_path / "predictions.parquet")["symbol"].str[0]) == {"S"}
    fit = ["fit", "-c", "configs/stocks/twin.yaml", *GENERATED, "--model.network=null", "--trainer.max_epochs=1"]
    fit += ["--model.pretrained", checkpoint, "--model.twin", checkpoint]
    main([*fit, "--out", str(tmp_path / "tuned")])
    again = main(["test", str(tmp_path / "tuned/checkpoint"), quiet, "--out", str(tmp_path)])
    assert again["twin/RankIC"] == metrics["RankIC"] and again["coverage"] == 100


def test_a_checkpoint_of_a_file_asks_for_the_file(
    learned_from_a_file: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, *named = learned_from_a_file
    for command in ("test", "predict"):
        assert "--data.file FILE" in sentence(capsys, command, checkpoint, "--out", str(tmp_path))
    main(["test", checkpoint, *named, "--out", str(tmp_path)])
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert (rows["date"].min(), rows["date"].max(), len(rows)) == ("2000-03-15", "2000-03-18", 4 * 12)
    main(["predict", checkpoint, *named, "--out", str(tmp_path)])
    assert set(pd.read_parquet(tmp_path / "predictions.parquet")["date"]) == {"2000-03-20"}


def test_network_and_data_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--model.network", "{features: 20, window: 5}"]
    words = sentence(capsys, "fit", "-c", "configs/stocks/miga-conv.yaml", *GENERATED, *network, "--out", str(tmp_path))
    assert "20 features on 5 days, the data have 20 on 3" in words


def test_features_are_compared_by_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, names = str(trained / "checkpoint"), list(ALPHA20)
    test = ["test", checkpoint, SMALL[1], "--out", str(tmp_path)]
    for features, words in (
        ([names[1], names[0], *names[2:]], f"feature 1 is {names[0]}, in the data {names[1]}"),
        ([*names[:-1], "KMID"], f"feature 20 is {names[-1]}, in the data KMID"),
    ):
        assert words in sentence(capsys, *test, f"--data.features=[{', '.join(features)}]")
    card = hub.info(checkpoint).card
    fewer = replace(card, preprocessing={"features": names[:19], "window": 3})
    twin = zoo.save(Miga(features=19, window=3, hidden_dim=8), tmp_path / "twin", card=fewer)
    assert f"feature 20 is nothing, in the data {names[-1]}" in sentence(capsys, *test, f"--model.twin={twin}")
    # Only a test looks at the twin.
    main(["predict", checkpoint, SMALL[1], "--model.twin=nowhere", "--out", str(tmp_path / "latest")])
    # A card that names none, as of a checkpoint from elsewhere, is let through.
    silent = zoo.save(zoo.load(checkpoint), tmp_path / "silent", card=replace(card, preprocessing={}))
    assert "twin/IC" in main([*test, f"--model.twin={silent}"])


def test_several_processes_and_too_few_stocks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = ["fit", "-c", "configs/stocks/own.yaml", *SPANS, *SMALL, *NEW, "--out", str(tmp_path)]
    fit += ["--data.columns={symbol: ticker, date: day}", "--data.file"]
    assert "needs 10 stocks" in (words := sentence(capsys, *fit, str(write_bars(tmp_path, stocks=9))))
    assert "no day of --data.val has more than 9" in words
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    assert "--trainer.devices=1" in sentence(capsys, *fit, str(write_bars(tmp_path)))


def test_wrong_words(trained: Path) -> None:
    with pytest.raises(UnknownNameError, match="num_groups"):
        StocksTask(network={"num_group": 8})
    with pytest.raises(UnknownNameError, match="mse"):
        StocksTask(loss="mae")
    with pytest.raises(ValueError, match="brings its own"):
        StocksTask(network={"window": 8}, pretrained=str(trained / "checkpoint"))
    with pytest.raises(ValueError, match="LeNet"):
        StocksTask(pretrained="customization/lenet5-emnist")


def test_an_ensemble_averages_its_networks_on_one_scale(trained: Path, tmp_path: Path) -> None:
    arguments = {"features": 2, "window": 3, "hidden_dim": 8, "expert_dim": 4, "top_k": 2}
    ensemble = MigaEnsemble(arguments, size=2).eval()
    ensemble.score_scale.copy_(torch.tensor([2.0, 0.5]))
    features = torch.randn(5, 3, 2)
    first, second = (network(features) for network in ensemble.members)
    scores, weights = ensemble.explain(features)
    torch.testing.assert_close(scores, (first / 2 + second / 0.5) / 2)
    torch.testing.assert_close(weights[:, :63], ensemble.first.explain(features)[1] / 2)
    torch.testing.assert_close(ensemble(features[1:2]), scores[1:2])
    with pytest.raises(ValueError, match="at least 1"):
        MigaEnsemble(arguments, size=0)
    card = hub.info(trained / "checkpoint").card
    loaded = zoo.load(zoo.save(ensemble, tmp_path / "two", card=card, golden_input=features))
    torch.testing.assert_close(loaded(features), scores)


def test_quarters_of_volatility(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset:
        universe = np.ones((2, 4), dtype=bool)
        days = np.array([1])

    minus_volatility = np.array([[-0.4, -0.1, np.nan, -0.2]])
    monkeypatch.setattr("tasks.stocks.task.low_volatility", lambda dataset: minus_volatility)
    assert calmness(Dataset()).tolist() == [4, 2, 0, 3]


def test_an_ensemble_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    ensemble = MigaEnsemble({"features": 20, "window": 3, "hidden_dim": 8})
    zoo.save(
        ensemble, tmp_path / "five", card=hub.info(trained / "checkpoint").card, golden_input=torch.randn(2, 3, 20)
    )
    model = ["--model.network=null", "--model.pretrained", str(tmp_path / "five"), "--out", str(tmp_path / "out")]
    words = sentence(capsys, "fit", "-c", "configs/stocks/miga-conv.yaml", *GENERATED, *model)
    assert "one seed" in words
    assert isinstance(zoo.load(tmp_path / "five").first, Miga)
