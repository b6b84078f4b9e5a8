"""Alpha158 and Alpha360 of one stock on one day, window by window, by general-purpose functions."""

import numpy as np
import pandas as pd
from scipy import stats

WINDOWS = (5, 10, 20, 30, 60)


def safe(part, whole):
    return part / whole if whole else 0.0


def pearson(x, y):
    return np.corrcoef(x, y)[0, 1] if np.ptp(x) and np.ptp(y) else np.nan


def alpha158(bars: pd.DataFrame) -> dict[str, float]:
    """Features of the last row of a stock's own trading days."""
    today = bars.iloc[-1]
    o, h, low, c = (today[name] for name in ("open", "high", "low", "close"))
    top, bottom, span = max(o, c), min(o, c), h - low
    features = {
        "KMID": (c - o) / o,
        "KLEN": span / o,
        "KMID2": safe(c - o, span),
        "KUP": (h - top) / o,
        "KUP2": safe(h - top, span),
        "KLOW": (bottom - low) / o,
        "KLOW2": safe(bottom - low, span),
        "KSFT": (2 * c - h - low) / o,
        "KSFT2": safe(2 * c - h - low, span),
        "OPEN0": o / c,
        "HIGH0": h / c,
        "LOW0": low / c,
        "VWAP0": (o + h + low + c) / 4 / c,
    }
    for window in WINDOWS:
        features |= {f"{name}{window}": value for name, value in rolling(bars, window).items()}
    return features


def rolling(bars: pd.DataFrame, d: int) -> dict[str, float]:
    frame = bars.iloc[-d:]
    with_before = bars.iloc[-d - 1 :]
    close, volume = frame["close"].to_numpy(), frame["volume"].to_numpy()
    high, low = frame["high"].to_numpy(), frame["low"].to_numpy()
    c, v = close[-1], volume[-1]
    time = np.arange(1, d + 1)
    slope, intercept = np.polyfit(time, close, 1)
    step = np.diff(with_before["close"])
    volume_step = np.diff(with_before["volume"])
    growth = with_before["close"].pct_change().to_numpy()[1:] + 1
    volume_growth = with_before["volume"].pct_change().to_numpy()[1:] + 1
    weighted = np.abs(growth - 1) * volume
    gains, losses = step[step > 0].sum(), -step[step < 0].sum()
    more, less = volume_step[volume_step > 0].sum(), -volume_step[volume_step < 0].sum()
    return {
        "ROC": bars["close"].iloc[-1 - d] / c,
        "MA": close.mean() / c,
        "STD": close.std(ddof=1) / c,
        "BETA": slope / c,
        "RSQR": pearson(time, close) ** 2,
        "RESI": (c - slope * d - intercept) / c,
        "MAX": high.max() / c,
        "MIN": low.min() / c,
        "QTLU": np.quantile(close, 0.8) / c,
        "QTLD": np.quantile(close, 0.2) / c,
        "RANK": stats.rankdata(close)[-1] / d,
        "RSV": safe(c - low.min(), high.max() - low.min()),
        "IMAX": (high.argmax() + 1) / d,
        "IMIN": (low.argmin() + 1) / d,
        "IMXD": (high.argmax() - low.argmin()) / d,
        "CORR": pearson(close, np.log(volume)),
        "CORD": pearson(growth, np.log(volume_growth + 1)),
        "CNTP": (step > 0).mean(),
        "CNTN": (step < 0).mean(),
        "CNTD": (step > 0).mean() - (step < 0).mean(),
        "SUMP": safe(gains, gains + losses),
        "SUMN": safe(losses, gains + losses),
        "SUMD": safe(gains - losses, gains + losses),
        "VMA": volume.mean() / v,
        "VSTD": volume.std(ddof=1) / v,
        "WVMA": safe(weighted.std(ddof=1), weighted.mean()),
        "VSUMP": safe(more, more + less),
        "VSUMN": safe(less, more + less),
        "VSUMD": safe(more - less, more + less),
    }


def alpha360(bars: pd.DataFrame) -> dict[str, float]:
    """Features of the last row of a stock's own trading days."""
    bars = bars.assign(vwap=bars[["open", "high", "low", "close"]].mean(axis=1))
    features = {}
    for name in ("close", "open", "high", "low", "vwap", "volume"):
        scale = bars["volume" if name == "volume" else "close"].iloc[-1]
        features |= {f"{name.upper()}{lag}": bars[name].iloc[-1 - lag] / scale for lag in reversed(range(60))}
    return features
