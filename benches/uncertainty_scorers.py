#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["uqlm==0.6.7", "lm-polygraph==0.7.0", "langchain-openai==1.7.4", "openai==3.57.0", "torch==2.9.1", "pyarrow==19.0.1"]
# ///
"""Which number tells wrong answers from right ones? The server's own, UQLM's and lm-polygraph's, all about the same answers.

    monteclora quickstart
    uv run --script benches/uncertainty_scorers.py quickstart-out -m BASE [--program monteclora] [--limit N]

BASE is the model directory that the quickstart tuned. Every ticket of the test rows is answered once, greedily, by the posterior's mean,
and the answer is right if it is the row's to the letter. Each scorer then says how sure that answer is. The libraries' scorers are
their own classes, over the server's OpenAI endpoint.

Prints a Markdown table: per scorer the AUROC of right against wrong answers (ties count half) with an interval of 95 % from a bootstrap
over tickets, what it needs, and the seconds that took. G is a generation, S a pass over question and answer, and each count begins with
the generation of the answer. What was found of each ticket is kept in --results, and a run that was stopped goes on from there.
The samples have no seed: another run draws others. Linux or macOS; needs the network to fetch the packages only.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
import urllib.request
import warnings

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))
from served import served  # noqa: E402

MAX_TOKENS = 128
TOP_LOGPROBS = 5
SEED = 42
RESAMPLES = 2000
ONE_ANSWER = ["sequence_probability", "min_probability", "mean_token_negentropy", "min_token_negentropy", "probability_margin"]
LEFT_OUT = """Left out, as they load a second model: UQLM's `semantic_negentropy`, `semantic_sets_confidence`, `noncontradiction`, `entailment`, `cosine_sim`, `bert_score`,
`semantic_density`, `consistency_and_confidence` and judges; of lm-polygraph all that compare by NLI or a cross-encoder (`SemanticEntropy`, `NumSemSets`, `LUQ`, `SAR`, CoCoA, ...).
Left out of lm-polygraph, too: what needs hidden states, attention, the probabilities of the whole vocabulary, models that it loads itself, or another prompt than the ticket's."""


def scorers(n_draws, n_samples):
    """Library, scorer, what it needs, and the steps that this takes, in the order of the table."""
    found = [("ours", "p_correct, mean", "1 G", ["score of the mean"])]
    found += [("ours", name, f"1 G + {n_draws} S", ["score of the draws"]) for name in ("p_correct, draws", "predictive_entropy", "mutual_information")]
    found += [("ours", "agreement", f"{1 + n_draws} G", ["score of the draws"])]
    found += [("UQLM", name, "1 G", ["UQLM's answer"]) for name in ONE_ANSWER]
    found += [("UQLM", f"p_true, asked of {of}", "1 G + 1 S", ["UQLM's answer", f"p_true of {of}"]) for of in ("triage", "base")]
    found += [("lm-polygraph", name, "1 G", ["lm-polygraph's answer"]) for name in ("MaximumSequenceProbability", "Perplexity", "MeanTokenEntropy")]
    samples = ("samples", f"{1 + n_samples} G", ["UQLM's samples"])
    draws = ("draws", f"{1 + n_draws} G", ["UQLM's answer", "answers of the draws"])
    for of, needs, steps in (samples, draws):
        found += [("UQLM", f"{name}, {of}", needs, steps) for name in ("exact_match", "monte_carlo_probability")]
        found += [("lm-polygraph", f"{name}, {of}", needs, steps) for name in of_samples()]
    return found


def of_samples():
    """lm-polygraph's estimators that compare several answers."""
    similar = [f"{name}_Jaccard_score" for name in ("DegMat", "EigValLaplacian", "Eccentricity")]
    return ["LexicalSimilarity_rougeL", *similar, "MonteCarloSequenceEntropy", "MonteCarloNormalizedSequenceEntropy"]


class Clients:
    """The server's own scores, UQLM and lm-polygraph, of one question at a time."""

    def __init__(self, url, n_draws, n_samples):
        # lm-polygraph makes its client without an address.
        os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"] = f"{url}/v1", "none"
        warnings.simplefilter("ignore")
        from langchain_core.messages import convert_to_messages
        from langchain_openai import ChatOpenAI
        from lm_polygraph import BlackboxModel, estimators, stat_calculators
        from lm_polygraph.utils.generation_parameters import GenerationParameters
        from uqlm import BlackBoxUQ, WhiteBoxUQ

        self.url, self.n_draws, self.n_samples = url, n_draws, n_samples
        # One event loop for all: LangChain keeps its connections beyond a call.
        self.loop, self.to_langchain = asyncio.new_event_loop(), convert_to_messages

        def white_box(scorers, model="triage", max_tokens=MAX_TOKENS):
            llm = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=max_tokens, max_retries=0, timeout=600)
            return WhiteBoxUQ(llm=llm, scorers=scorers, top_k_logprobs=TOP_LOGPROBS)

        self.one_answer, self.several = white_box(ONE_ANSWER), white_box(["monte_carlo_probability"])
        # Of what a model says to the question whether an answer is true, UQLM reads the first token.
        self.p_true = {model: white_box(["p_true"], model, 1) for model in ("triage", "base")}
        self.match = BlackBoxUQ(scorers=["exact_match"])
        self.polygraph = BlackboxModel.from_openai("none", "triage", supports_logprobs=True, generation_parameters=GenerationParameters(temperature=0.0))
        self.calculators = stat_calculators.BlackboxGreedyTextsCalculator(TOP_LOGPROBS), stat_calculators.EntropyCalculator()
        self.of_one = [estimators.MaximumSequenceProbability(), estimators.Perplexity(), estimators.MeanTokenEntropy()]
        jaccard = [getattr(estimators, name)("Jaccard_score") for name in ("DegMat", "EigValLaplacian", "Eccentricity")]
        self.of_several = [estimators.LexicalSimilarity("rougeL"), *jaccard]
        self.of_several += [estimators.MonteCarloSequenceEntropy(), estimators.MonteCarloNormalizedSequenceEntropy()]

    def post(self, path, body):
        request = urllib.request.Request(f"{self.url}/v1/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def chat(self, model, messages):
        """The greedy answer and its tokens' log-probabilities."""
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": True}
        choice = self.post("chat/completions", body)["choices"][0]
        return choice["message"]["content"], choice["logprobs"]["content"]

    def score(self, messages, draws):
        return self.post("monteclora/score", {"model": "triage", "messages": messages, "draws": draws, "max_tokens": MAX_TOKENS})

    def of_ticket(self, messages):
        """What all scorers say of the answer to one ticket. Higher is surer."""
        run = self.loop.run_until_complete
        seconds, scores, answers = {}, {}, {}

        def timed(step, call):
            began = time.perf_counter()
            found = call()
            seconds[step] = time.perf_counter() - began
            return found

        answer, _ = timed("answer", lambda: self.chat("triage", messages))
        mean = timed("score of the mean", lambda: self.score(messages, 0))
        draws = timed("score of the draws", lambda: self.score(messages, self.n_draws))
        answers |= {"score of the mean": mean["answer"], "score of the draws": draws["answer"]}
        scores |= {"ours p_correct, mean": mean["p_correct"], "ours p_correct, draws": draws["p_correct"]}
        scores["ours agreement"] = draws["uncertainty"]["agreement"]
        scores |= {f"ours {name}": -draws["uncertainty"][name] for name in ("predictive_entropy", "mutual_information")}

        prompt, quiet = [self.to_langchain(messages)], {"show_progress_bars": False}
        one = timed("UQLM's answer", lambda: run(self.one_answer.generate_and_score(prompts=prompt, **quiet))).data
        scores |= {f"UQLM {name}": one[name][0] for name in ONE_ANSWER}
        several = timed("UQLM's samples", lambda: run(self.several.generate_and_score(prompts=prompt, num_responses=self.n_samples, **quiet))).data
        answers |= {"UQLM's answer": one["responses"][0], "UQLM's samples": several["responses"][0]}
        # p_true puts the question into a text of its own, and so is given the messages as one text.
        asked = {"prompts": ["\n".join(message["content"] for message in messages)], "responses": [answer], "logprobs_results": one["logprob"]}
        for model, scorer in self.p_true.items():
            scores[f"UQLM p_true, asked of {model}"] = timed(f"p_true of {model}", lambda: run(scorer.score(**asked, **quiet))).data["p_true"][0]

        said = timed("answers of the draws", lambda: [self.chat(f"triage@draw-{k}", messages) for k in range(self.n_draws)])
        texts = {"samples": several["sampled_responses"][0], "draws": [text for text, _ in said]}
        tokens = {"samples": several["sampled_logprob"][0], "draws": [tokens for _, tokens in said]}
        for of in texts:
            scores[f"UQLM exact_match, {of}"] = self.match.score(responses=[answer], sampled_responses=[texts[of]], **quiet).data["exact_match"][0]
            sampled = {"sampled_responses": [texts[of]], "sampled_logprobs_results": [tokens[of]]}
            of_all = run(self.several.score(responses=[answer], logprobs_results=one["logprob"], **sampled, **quiet)).data
            scores[f"UQLM monte_carlo_probability, {of}"] = of_all["monte_carlo_probability"][0]
            log_probs = [[sum(token["logprob"] for token in answer) for answer in tokens[of]]]
            stats = {"sample_texts": [texts[of]], "sample_log_probs": log_probs, "sample_tokens": [tokens[of]]}
            scores |= {f"lm-polygraph {estimator}, {of}": -estimator(stats)[0] for estimator in self.of_several}

        greedy, entropy = self.calculators
        stats = timed("lm-polygraph's answer", lambda: greedy({}, [messages], self.polygraph, max_new_tokens=MAX_TOKENS))
        stats |= entropy(stats)
        answers["lm-polygraph's answer"] = stats["greedy_texts"][0]
        scores |= {f"lm-polygraph {estimator}": -estimator(stats)[0] for estimator in self.of_one}
        scores = {name: float(value) if math.isfinite(value) else None for name, value in scores.items()}
        differing = [step for step, other in answers.items() if other != answer]
        return {"answer": answer, "scores": scores, "seconds": seconds, "differing": differing, "texts": texts}


def auroc(right, values, counts):
    """The share of pairs in which the right answer has the higher value, and its interval. `counts[b][i]`: how often ticket i is in resample b."""
    # What differs by rounding only is a tie.
    right, values = np.array(right, bool), np.round(np.array(values, float), 12)
    if right.all() or not right.any():
        return None
    surer, other = values[right][:, None], values[~right][None]
    wins = (surer > other) + 0.5 * (surer == other)
    of_right, of_wrong = counts[:, right].astype(float), counts[:, ~right].astype(float)
    pairs = of_right.sum(1) * of_wrong.sum(1)
    shares = ((of_right @ wins) * of_wrong).sum(1)[pairs > 0] / pairs[pairs > 0]
    return wins.mean(), *np.quantile(shares, [0.025, 0.975])


def table(records, n_draws, n_samples):
    right = np.array([record["right"] for record in records])
    counts = np.random.default_rng(SEED).multinomial(len(records), np.full(len(records), 1 / len(records)), RESAMPLES)
    print(f"{len(records)} tickets, {(~right).sum()} answered wrongly; {n_samples} samples at temperature 1, {n_draws} draws.\n")
    print("| library | scorer | AUROC | 95 % | needs | s | no value |\n|---|---|---|---|---|---|---|")
    for library, name, needs, steps in scorers(n_draws, n_samples):
        values = [record["scores"][f"{library} {name}"] for record in records]
        kept = [idx for idx, value in enumerate(values) if value is not None]
        found = auroc(right[kept], [values[idx] for idx in kept], counts[:, kept]) if kept else None
        shown = f"{found[0]:.3f} | {found[1]:.3f} to {found[2]:.3f}" if found else "– | –"
        seconds = statistics.median(sum(record["seconds"][step] for step in steps) for record in records)
        print(f"| {library} | {name} | {shown} | {needs} | {seconds:.2f} | {len(records) - len(kept) or ''} |")
    differing = collections.Counter(step for record in records for step in record["differing"])
    said = ", ".join(f"{step} {count}" for step, count in sorted(differing.items()))
    print(f"\nTickets whose answer was not the judged one: {said or 'none'}. The plain answer alone took {statistics.median(r['seconds']['answer'] for r in records):.2f} s (median, as all seconds).")
    print(f"One request gives all scores of the draws, so that their seconds hold {n_draws} more generations, for `agreement`. UQLM pauses for 0.1 s after generations.\n\n{LEFT_OUT}")


def serve_toml(base, posterior, n_draws):
    return (
        f"[server]\nport = 0\n[[models]]\nmodel_id = '{base.resolve()}'\nname = 'base'\ndtype = 'f32'\ndevice.cpu = true\n"
        f"[models.uncertainty]\nenabled = true\ndtype = 'f32'\ndraws = {n_draws}\n"
        f"[[models.adapters]]\nalias = 'triage'\nsource = '{posterior.resolve()}'\ndraws = {n_draws}\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the quickstart's directory, with data/test.jsonl and posterior/")
    parser.add_argument("-m", required=True, type=pathlib.Path, metavar="BASE")
    parser.add_argument("--program", default="monteclora")
    parser.add_argument("--data", type=pathlib.Path, help="other tickets than those of data/test.jsonl")
    parser.add_argument("--draws", type=int, default=4, help="posterior draws; those of calibration.json, unless it is to go unused")
    parser.add_argument("--samples", type=int, default=5, help="answers drawn at temperature 1")
    parser.add_argument("--limit", type=int, help="the first tickets only")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("uncertainty_scorers.jsonl"))
    asked = parser.parse_args()
    data = asked.data or asked.out / "data" / "test.jsonl"
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines() if line.strip()][: asked.limit]
    posterior = hashlib.sha256((asked.out / "posterior" / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]
    settings = {"base": asked.m.resolve().name, "posterior": posterior, "draws": asked.draws, "samples": asked.samples}
    lines = asked.results.read_text().splitlines() if asked.results.exists() else []
    records = {record["question"]: record for record in map(json.loads, lines)}
    if any(record["settings"] != settings for record in records.values()):
        sys.exit(f"{asked.results} is of another base or posterior, or of other draws or samples")
    todo = [row for row in rows if row[-2]["content"] not in records]
    if todo:
        with tempfile.TemporaryDirectory() as temporary, asked.results.open("a") as results:
            config = pathlib.Path(temporary) / "serve.toml"
            config.write_text(serve_toml(asked.m, asked.out / "posterior", asked.draws))
            with served(asked.program, config) as (url, _):
                clients = Clients(url, asked.draws, asked.samples)
                # The first questions of a server take longer.
                clients.of_ticket(todo[0][:-1])
                for idx, row in enumerate(todo):
                    found = clients.of_ticket(row[:-1])
                    right = found["answer"].strip() == row[-1]["content"].strip()
                    record = {"question": row[-2]["content"], "settings": settings, "right": right, **found}
                    records[record["question"]] = record
                    results.write(json.dumps(record) + "\n")
                    results.flush()
                    print(f"{idx + 1} of {len(todo)}: {'right' if right else 'wrong'}, {sum(found['seconds'].values()):.1f} s", file=sys.stderr)
    table([records[row[-2]["content"]] for row in rows], asked.draws, asked.samples)


if __name__ == "__main__":
    main()
