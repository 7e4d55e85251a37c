"""Answers tickets, and hands those over to a person that the model is too unsure about.

    monteclora calibrate -m BASE -a out --data valid.jsonl --posterior-samples 8 --target-error 0.05
    monteclora serve -c serve.toml                      # with enabled = true below [models.uncertainty]
    pip install openai
    python3 examples/router.py triage --choices billing bug question < tickets.txt
Calibrate on rows like the questions: with their system message, and with `choices` if they are given here."""

import argparse
import os
import sys

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--system", help="the system message that the model was trained and calibrated with")
parser.add_argument("--choices", nargs="+", help="possible answers; without them the model answers in its own words")
parser.add_argument("--target-error", type=float, help="share of wrong answers that is allowed (default: the calibration's)")
asked = parser.parse_args()
client = OpenAI(base_url=os.environ.get("BASE_URL", "http://127.0.0.1:1234/v1"), api_key=os.environ.get("API_KEY", "none"))
system = [{"role": "system", "content": asked.system}] if asked.system else []
for ticket in filter(None, map(str.strip, sys.stdin)):
    body = {"model": asked.model, "messages": [*system, {"role": "user", "content": ticket}]}
    body |= {key: value for key, value in (("choices", asked.choices), ("target_error", asked.target_error)) if value}
    score = client.post("/monteclora/score", body=body, cast_to=object)
    if score["abstain"] is None:
        sys.exit(f"no threshold holds for this request ({score['calibration_not_used'] or 'there is none'}): see `calibrate` above")
    who = "a person" if score["abstain"] else score["answer"].strip()
    print(f"{who}\t{score['p_correct']:.3f}\t{ticket}")
