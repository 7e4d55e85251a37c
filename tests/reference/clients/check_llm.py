# /// script
# requires-python = ">=3.10"
# dependencies = ["llm==0.36", "openai==3.57.0"]
# ///
"""The command line program `llm`, with the server in its extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import tempfile

from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, City, check, is_city, main, same, true

HOME = tempfile.mkdtemp()
with open(f"{HOME}/extra-openai-models.yaml", "w") as file:
    for name, more in [("ours", "supports_schema: true"), ("ours-completion", "completion: true")]:
        file.write(f"- {{model_id: {name}, model_name: {MODEL}, api_base: {json.dumps(URL)}, api_key_name: ours, {more}}}\n")


def llm(*arguments):
    environment = os.environ | {"LLM_USER_PATH": HOME}
    done = subprocess.run([sys.executable, "-m", "llm", *arguments], env=environment, capture_output=True, text=True, timeout=120)
    true(f"status of llm {arguments}", done.returncode == 0, done.stderr, "none")
    return done.stdout.strip()


llm("keys", "set", "ours", "--value", KEY)
ASK = ("-m", "ours", "--no-log", "-o", "temperature", "0")


@check
def chat_streamed_and_whole():
    streamed = llm("prompt", *ASK, "-o", "max_tokens", "24", QUESTION)
    true("text", bool(streamed), streamed, "some text")
    same("without streaming", llm("prompt", *ASK, "-o", "max_tokens", "24", "--no-stream", QUESTION), streamed)


@check
def schema():
    text = llm("prompt", *ASK, "-o", "max_tokens", "100", "--no-stream", "--schema", json.dumps(City.model_json_schema()), CITY_QUESTION)
    is_city("answer", City.model_validate_json(text))


@check
def completion():
    text = llm("prompt", "-m", "ours-completion", "--no-log", "-o", "max_tokens", "8", "-o", "temperature", "0", "The capital of France is")
    true("text", bool(text), text, "some text")


main("llm", "openai")
