"""Scores of predictions on rows with two choices, and what chance makes of them."""

import functools

import numpy as np

BINS = 15
FLOOR_DRAWS = 1000
RESAMPLES = 10_000


def log_odds(nll):
    """ln(p / (1 - p)) of the right choice from its NLL; exact where p is near 0 and where it is near 1."""
    nll = np.maximum(np.asarray(nll, dtype=float), 1e-12)
    return -nll - np.log(-np.expm1(-nll))


class Predictions:
    """Probabilities of n rows: `nll` of the right choice, `confidence` of the likelier, `correct`."""

    def __init__(self, nll, correct):
        self.odds = log_odds(nll)
        self.nll = np.logaddexp(0.0, -self.odds)
        self.correct = np.asarray(correct, dtype=bool)
        self.doubt = np.exp(-np.logaddexp(0.0, np.abs(self.odds)))  # 1 - confidence, without its rounding near 1
        self.confidence = 1.0 - self.doubt

    def at(self, temperature):
        """The predictions p^(1/T), renormalised."""
        return Predictions(np.logaddexp(0.0, -self.odds / temperature), self.correct)


def brier(predictions):
    """Mean over rows of the sum over choices of (p - y)^2."""
    return float(np.mean(2.0 * np.exp(-2.0 * np.logaddexp(0.0, predictions.odds))))


def bins_of(confidence, bins=BINS):
    """Index from 0 of each confidence's bin, where bin m is ((m-1)/M, m/M]."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def ece(confidence, correct, bins=BINS):
    """Expected calibration error: mean over rows of |accuracy - confidence| of their bin."""
    gaps = np.bincount(bins_of(confidence, bins), weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def ece_floor(confidence, bins=BINS, draws=FLOOR_DRAWS):
    """Mean ECE of a model that is calibrated: rows are right as often as their confidences say."""
    random = np.random.default_rng(0)
    members = np.eye(bins)[bins_of(confidence, bins)]
    gaps = (random.random((draws, len(confidence))) < confidence) - confidence
    return float(np.abs(gaps @ members).sum(axis=1).mean() / len(confidence))


def auroc(score, positive, weights=None):
    """Probability that a positive row has the higher score than a negative one, ties counting half.

    `weights` [R, n] gives the rows' multiplicities in R resamples, and the result is one value for each; NaN where a class is empty.
    """
    score, positive = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool)
    weights = np.ones((1, len(score))) if weights is None else weights
    above, below = score[positive][:, None], score[~positive]
    wins = ((above > below) + 0.5 * (above == below)).astype(weights.dtype)
    of_above, of_below = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((of_above @ wins) * of_below).sum(axis=1) / (of_above.sum(axis=1) * of_below.sum(axis=1))


def risk_coverage(doubt, correct):
    """Share of errors among the i least doubtful rows, i = 1..n; rows of equal doubt come in all orders, averaged."""
    order = np.argsort(doubt, kind="stable")
    doubt, wrong = np.asarray(doubt)[order], 1.0 - np.asarray(correct, dtype=float)[order]
    starts = np.flatnonzero(np.r_[True, np.diff(doubt) != 0])
    sizes = np.diff(np.r_[starts, len(doubt)])
    shared = np.repeat(np.add.reduceat(wrong, starts) / sizes, sizes)
    return np.cumsum(shared) / np.arange(1, len(doubt) + 1)


def scores(predictions):
    """All scores of one set of predictions but those that need draws."""
    p = predictions
    return {
        "accuracy": float(p.correct.mean()),
        "nll": float(p.nll.mean()),
        "ece": ece(p.confidence, p.correct),
        "floor": ece_floor(p.confidence),
        "brier": brier(p),
        "auroc": float(auroc(p.doubt, ~p.correct)[0]),
        "aurc": float(risk_coverage(p.doubt, p.correct).mean()),
    }


@functools.cache
def resamples(rows, name):
    """How often each of n rows is in each of 10,000 resamples, [R, n]; `name` is the seed."""
    random = np.random.default_rng(list(name.encode()))
    return random.multinomial(rows, np.full(rows, 1.0 / rows), size=RESAMPLES).astype(np.float32)


def interval(values):
    """The 95 % interval of resampled values by percentiles."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def p_value(values):
    """Two-sided p: twice the smaller share of resamples on one side of 0."""
    values = values[~np.isnan(values)]
    tail = min(np.sum(values <= 0), np.sum(values >= 0))
    return float(min(1.0, 2.0 * (tail + 1) / (len(values) + 1)))


def holm(p_values):
    """Holm's adjusted p, in the order given."""
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
