#!/usr/bin/env python3
"""Starts `monteclora serve` on a model and runs every client of `clients/` against it, each unmodified and of a pinned version.

    cargo build --release -p monteclora
    tests/reference/check_clients.py MODEL_DIR [--adapter DIR] [--monteclora FILE] [--data ROWS.jsonl] [--only NAME]... [--all]

MODEL_DIR is SmolLM2-135M-Instruct as a Hugging Face directory, as `monteclora quickstart` leaves one in its cache: the checks
expect a ChatML model that is able to answer with a short JSON object. With `--adapter` some clients ask the adapter, too, and
transformers is given the base with the adapter merged in. `--data` has rows for lm-evaluation-harness in this project's form of ARC or OpenBookQA; without it that client is left out.

Needs Python 3.10, npm, curl and Debian's `chromium`; fetches uv, the clients and a Node 22 from PyPI and npm into `--cache` (about
9 GB, most of it PyTorch). Prints a table, and ends with status 1 if a check fails. With `--all` a client goes on after a failure.
"""

import argparse
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent / "clients"
ROOT = HERE.parents[2]
# Clients whose checks hold for an adapter of any task.
OF_ADAPTER = {"instructor", "lm_eval", "openai", "transformers"}
KEY = "a-key-of-the-check"
UV = "uv==0.13.9"


def free_ports():
    """Ports of two origins, one after the other, and of the server."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            try:
                first.bind(("127.0.0.1", 0))
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
                third.bind(("127.0.0.1", 0))
            except OSError:
                continue
            return first.getsockname()[1], third.getsockname()[1]


def install(cache):
    """uv, which makes an environment for each script from the versions at its head, and Node's packages."""
    venv, node = cache / "venv", cache / "node"
    if not (venv / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "--quiet", UV], check=True)
    node.mkdir(exist_ok=True)
    wanted = (HERE / "package.json").read_bytes()
    if not (node / "node_modules").exists() or (node / "package.json").read_bytes() != wanted:
        shutil.rmtree(node / "node_modules", ignore_errors=True)
        (node / "package.json").write_bytes(wanted)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=node, check=True)
    # Node finds packages beside the script only.
    for file in HERE.glob("*.mjs"):
        shutil.copy(file, node)
    return venv / "bin" / "uv", node


def serve(options, work, port, origin):
    keys, config = work / "keys.txt", work / "serve.toml"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    adapter = f'[[models.adapters]]\nalias = "adapter"\nsource = "{options.adapter.resolve()}"\n' if options.adapter else ""
    model = f'[[models]]\nmodel_id = "{options.model.resolve()}"\n'
    cpu = "[models.device]\ncpu = true\n"
    config.write_text(
        f'[server]\nport = {port}\nallowed_origins = ["http://localhost:{origin}"]\n[auth]\napi_keys_file = "{keys}"\n'
        f'{model}name = "base"\n{cpu}{adapter}'
        f'{model}name = "tools"\nchat_template = "{HERE / "tools.jinja"}"\n{cpu}'
    )
    log = open(work / "serve.log", "w")
    server = subprocess.Popen([options.monteclora, "serve", "-c", config], stdout=log, stderr=log)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
            return server
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                break
            time.sleep(0.5)
    server.kill()
    sys.exit(f"the server did not start:\n{(work / 'serve.log').read_text()}")


def merged(options, work):
    """A model with the adapter in it, for transformers."""
    command = [options.monteclora, "merge", "-m", options.model, "-a", options.adapter, "-o", work / "merged", "--dtype", "f32"]
    subprocess.run(command, check=True)
    return work / "merged"


def commands(options, uv, node, port, origin, asked, reference):
    shared = [f"http://127.0.0.1:{port}/v1", asked, "--key", KEY, "--tools-model", "tools"]
    shared += ["--all"] if options.all else []
    found = {}
    for file in sorted(HERE.glob("check_*")):
        name = file.stem.removeprefix("check_")
        if file.suffix == ".mjs":
            program = node / "node_modules" / "node" / "bin" / "node"
            found[name] = [program, node / file.name, *shared, "--origin-port", str(origin)]
        elif file.suffix == ".sh":
            found[name] = [file, *shared]
        else:
            more = ["--model-dir", reference] + (["--data", options.data.resolve()] if options.data else [])
            found[name] = [uv, "run", "--quiet", "--script", "--python", sys.executable, file, *shared, *more]
    if not options.data:
        found.pop("lm_eval")
    unknown = set(options.only or []) - set(found)
    if unknown:
        sys.exit(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    chosen = set(options.only or found) & (set(found) if asked == "base" else OF_ADAPTER)
    return {(name, asked): command for name, command in found.items() if name in chosen}


def run(name, command, options, node):
    """One row of the table: versions, counts, what failed."""
    environment = os.environ | {"UV_CACHE_DIR": str(options.cache / "uv"), "NODE_NO_WARNINGS": "1"}
    print(f"== {name[0]}, {name[1]}", flush=True)
    done = subprocess.Popen(
        command, env=environment, cwd=node, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        out, err = done.communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)
        out, err = done.communicate()
        out += f"FAIL the script: not done after {options.timeout} s\n"
    print(out, end="", flush=True)
    lines = out.splitlines()
    versions = ", ".join(" ".join(line.split()[1:]) for line in lines if line.startswith("client "))
    passed = sum(line.startswith("ok   ") for line in lines)
    failures = [line.removeprefix("FAIL ") for line in lines if line.startswith("FAIL ")]
    if done.returncode and not failures:
        failures = [f"status {done.returncode}: {' '.join(err.split())[-300:]}"]
    return name, versions, passed, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--adapter", type=pathlib.Path)
    parser.add_argument("--monteclora", type=pathlib.Path, default=ROOT / "target" / "release" / "monteclora")
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path.home() / ".cache" / "monteclora" / "clients")
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a client may take")
    options = parser.parse_args()
    options.cache = options.cache.resolve()
    options.cache.mkdir(parents=True, exist_ok=True)
    uv, node = install(options.cache)
    origin, port = free_ports()
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        chosen = commands(options, uv, node, port, origin, "base", options.model.resolve())
        if options.adapter:
            chosen |= commands(options, uv, node, port, origin, "adapter", merged(options, work))
        server = serve(options, work, port, origin)
        try:
            rows = [run(name, command, options, node) for name, command in chosen.items()]
            alive = server.poll() is None
        finally:
            server.terminate()
            status = server.wait(timeout=150)
        if not alive or status:
            print(f"the server ended with status {status}\n{(work / 'serve.log').read_text()[-2000:]}")
    print("\n| client | model | version | passed | failed | |\n|---|---|---|---|---|---|")
    for (name, asked), versions, passed, failures in rows:
        print(f"| {name} | {asked} | {versions} | {passed} | {len(failures)} | {' // '.join(failure.replace('|', '/')[:160] for failure in failures)} |")
    sys.exit(1 if not alive or status or any(failures for *_, failures in rows) else 0)


if __name__ == "__main__":
    main()
