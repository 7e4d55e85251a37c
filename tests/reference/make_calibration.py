"""Writes calibration.json: scores of predictions by numpy, scipy and scikit-learn.

Usage: make_calibration.py [OUT]; needs numpy, scipy and scikit-learn. The keys of a case are those of the tests;
null stands for what is undefined. Averages are over the draws of a row, entropies in nats.
"""
import json
import sys

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import entr, log_softmax, softmax
from scipy.stats import beta
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

BINS, LOW, HIGH = 15, 0.05, 20.0


def mean_nll(scores, answers, temperature=1.0):
    return float(-np.mean(log_softmax(scores / temperature, axis=1)[np.arange(len(answers)), answers]))


def brier(p, answers):
    return float(np.mean(np.sum((p - np.eye(p.shape[1])[answers]) ** 2, axis=1)))


def ece(confidence, correct):
    total, edges = 0.0, np.arange(BINS + 1) / BINS
    # An edge that rounding could cross would make the value depend on the implementation.
    assert np.abs(confidence[:, None] - edges[None, :-1]).min() > 1e-7
    for m in range(BINS):
        inside = (confidence > edges[m]) & (confidence <= edges[m + 1])
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(total)


def aurc(confidence, correct):
    risks, errors, n = [], 0.0, 0
    for value in sorted(set(confidence), reverse=True):
        tied = confidence == value
        m, e = int(tied.sum()), int((~correct[tied]).sum())
        risks += [(errors + e * j / m) / (n + j) for j in range(1, m + 1)]
        errors, n = errors + e, n + m
    return float(np.mean(risks))


def expected(scores, answers):
    p = softmax(scores, axis=1)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == answers
    gaps = np.diff(np.unique(confidence))
    # Confidences are equal or far enough apart; and no row has two best choices.
    assert gaps.size == 0 or gaps.min() > 1e-12
    assert np.diff(np.sort(scores, axis=1)[:, -2:], axis=1).min() > 1e-6
    fit = minimize_scalar(lambda log: mean_nll(scores, answers, np.exp(log)), bounds=(np.log(LOW), np.log(HIGH)),
                          method="bounded", options={"xatol": 1e-10, "maxiter": 1000})
    assert fit.success
    temperature = float(np.exp(fit.x))
    after = softmax(scores / temperature, axis=1)
    nll = mean_nll(scores, answers)
    if scores.min() > -700:
        assert abs(log_loss(answers, p, labels=range(p.shape[1])) - nll) < 1e-12
    assert accuracy_score(answers, p.argmax(axis=1)) == correct.mean()
    return {
        "accuracy": float(correct.mean()),
        "nll": nll,
        "brier": brier(p, answers),
        "ece": ece(confidence, correct),
        "auroc": float(roc_auc_score(correct, confidence)) if 0 < correct.sum() < len(correct) else None,
        "aurc": aurc(confidence, correct),
        "temperature": temperature,
        "nll_after": mean_nll(scores, answers, temperature),
        "ece_after": ece(after.max(axis=1), correct),
        "brier_after": brier(after, answers),
    }


def drawn(random, p):
    return np.array([random.choice(p.shape[1], p=row) for row in p])


def log_scores(random, n, choices, spread):
    """As sums of log-probabilities are: not normalised over the choices."""
    return np.round(random.normal(0.0, spread, (n, choices)) - random.uniform(1.0, 30.0, (n, 1)), 10)


def inputs():
    random = np.random.default_rng(1)
    scores = log_scores(random, 200, 2, 3.0)
    yield "binary-overconfident", scores, drawn(random, softmax(scores / 3.0, axis=1))
    scores = log_scores(random, 300, 2, 1.5)
    yield "binary-calibrated", scores, drawn(random, softmax(scores, axis=1))
    scores = log_scores(random, 150, 4, 2.0)
    yield "four-class", scores, drawn(random, softmax(scores / 1.5, axis=1))
    # Eight confidences, each in both orders of the choices.
    below = random.choice([-0.125, -0.25, -0.5, -1.0, -1.5, -2.0, -3.0, -4.5], 120)
    scores = np.stack([below, np.zeros(120)], axis=1)
    flipped = random.random(120) < 0.5
    scores[flipped] = scores[flipped][:, ::-1]
    yield "ties", scores, drawn(random, softmax(scores / 2.0, axis=1))
    # Near enough to each other that the likelihood still changes at either bound of the temperature.
    scores = np.stack([np.zeros(40), -np.round(random.uniform(0.05, 1.5, 40), 10)], axis=1)
    yield "all-right", scores, np.zeros(40, dtype=int)
    yield "all-wrong", scores - 2.0, np.ones(40, dtype=int)
    yield "one-row", np.array([[-1.25, -0.5, -2.0]]), np.array([1])
    # Confidences of 1, of 1 but for rounding, and lower ones; right and wrong.
    gaps = np.repeat([800.0, 20.0, 5.0, 1.0], 8)
    answers = np.array(([0] * 7 + [1]) + ([0] * 7 + [1]) + ([0] * 6 + [1] * 2) + ([0] * 5 + [1] * 3))
    scores = np.stack([np.zeros(32), -gaps], axis=1)
    swap = np.arange(32) % 2 == 1
    scores[swap] = scores[swap][:, ::-1]
    yield "very-confident", scores, np.where(swap, 1 - answers, answers)


def main():
    cases = []
    for name, scores, answers in inputs():
        cases.append({"name": name, "log_scores": scores.tolist(), "answers": answers.tolist(),
                      "expected": expected(scores, answers)})
        print(name, cases[-1]["expected"])

    def upper(errors, n, confidence=0.95):
        return 1.0 if errors == n else float(beta.ppf(confidence, errors + 1, n - errors))

    pairs = [(0, 1), (0, 10), (0, 59), (0, 1000), (1, 1), (1, 2), (1, 20), (3, 50), (5, 100), (17, 100), (50, 100),
             (10, 10), (9, 10), (100, 5000)]
    bounds = [{"errors": e, "n": n, "confidence": 0.95, "upper": upper(e, n)} for e, n in pairs]
    needed = [{"target": t, "n": next(n for n in range(1, 10**6) if upper(0, n) < t)} for t in (0.01, 0.05, 0.1)]
    print(needed)

    random = np.random.default_rng(2)
    averages = []
    for _ in range(3):
        scores = np.round(random.normal(0.0, 1.5, (4, 3)) - random.uniform(1.0, 30.0, (4, 1)), 10)
        p = softmax(scores, axis=1)
        mean = p.mean(axis=0)
        total, inner = float(entr(mean).sum()), float(entr(p).sum(axis=1).mean())
        averages.append({"log_scores": scores.tolist(), "expected": {
            "probabilities": mean.tolist(), "predictive_entropy": total, "expected_entropy": inner,
            "mutual_information": total - inner}})
    result = {"cases": cases, "clopper_pearson": bounds, "rows_needed": needed, "averages": averages}
    with open(sys.argv[1] if len(sys.argv) > 1 else "calibration.json", "w") as file:
        json.dump(result, file, allow_nan=False)
        file.write("\n")


main()
