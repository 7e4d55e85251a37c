"""What the client scripts share: arguments, checks, the last line that `check_clients.py` reads.

    python NAME.py BASE_URL MODEL [--key KEY] [--tools-model NAME] [--model-dir DIR] [--data FILE] [--all]

A script stops at the first thing that is wrong and ends with status 1; with `--all` it goes on and names every one.
"""

import argparse
import importlib.metadata
import os
import sys
import traceback

import pydantic

_parser = argparse.ArgumentParser()
_parser.add_argument("url", help="the server's base URL, with /v1")
_parser.add_argument("model", help="a model whose chat template takes no tools")
_parser.add_argument("--key", help="the server's API key; checks of keys need it")
_parser.add_argument("--tools-model", help="a model whose chat template takes tools; checks of tools need it")
_parser.add_argument("--model-dir", help="the model's directory, for its tokenizer and for transformers")
_parser.add_argument("--data", help="rows in JSONL, for a task of lm-evaluation-harness")
_parser.add_argument("--all", action="store_true", help="go on after something wrong")
ARGS = _parser.parse_args()
URL, MODEL, TOOLS_MODEL = ARGS.url.rstrip("/"), ARGS.model, ARGS.tools_model
# Clients refuse to start without a key, and a server without keys ignores it.
KEY = ARGS.key or "none"
os.environ["OPENAI_API_KEY"], os.environ["OPENAI_BASE_URL"] = KEY, URL

QUESTION = "Where is Paris?"
CITY_QUESTION = "Name a city in France and its number of people, as JSON."


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    people: int = pydantic.Field(ge=0, le=9999999)


class Wrong(Exception):
    """Something that is not as it has to be."""


def same(what, got, expected):
    if got != expected:
        raise Wrong(f"{what}: got {got!r}, expected {expected!r}")


def true(what, holds, got, expected):
    """`expected` says in words what `got` should have been."""
    if not holds:
        raise Wrong(f"{what}: got {got!r}, expected {expected}")


def raises(what, kind, call, *words):
    """The error, whose text holds each of `words`."""
    try:
        got = call()
    except kind as error:
        for word in words:
            true(what, word.lower() in str(error).lower(), str(error), f"an error that says {word!r}")
        return error
    raise Wrong(f"{what}: got {got!r}, expected {kind.__name__}")


def is_city(what, got):
    """Checks what a structured answer was read into."""
    true(what, isinstance(got, City) and got.name != "", got, "a City with a name")


_checks = []


def check(function):
    _checks.append(function)
    return function


def main(*packages):
    for package in packages:
        print(f"client {package} {importlib.metadata.version(package)}", flush=True)
    passed = failed = 0
    for function in _checks:
        name = function.__name__.replace("_", " ")
        try:
            skipped = function()
        except Exception as error:
            failed += 1
            text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            print(f"FAIL {name}: {' '.join(text.split())[:700]}", flush=True)
            if not isinstance(error, Wrong):
                traceback.print_exc(limit=-3)
            if not ARGS.all:
                break
        else:
            passed += not skipped
            print(f"skip {name}: {skipped}" if skipped else f"ok   {name}", flush=True)
    print(f"{passed} passed, {failed} failed", flush=True)
    sys.stdout.flush()
    # Some libraries leave threads behind that would hold up the end.
    os._exit(1 if failed or not passed else 0)
