#!/usr/bin/env python3
"""What `monteclora serve` holds in memory while adapters come and go.

    cargo build --release
    benches/serve_memory.py MODEL_DIR ADAPTER OTHER_ADAPTER [--monteclora target/release/monteclora] [--swaps 5] [--json]

Starts a server on a free port, loads, asks, swaps and unloads through its endpoints, and reads the process's memory from
/proc (Linux) after each step, once the generations that are no longer served are gone: resident (VmRSS), of it anonymous
(RssAnon), and the peak so far (VmHWM).
"""
import argparse
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

FIELDS = ("VmRSS", "RssAnon", "VmHWM")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("other")
    parser.add_argument("--monteclora", default="target/release/monteclora")
    parser.add_argument("--swaps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        for name, source in (("one", args.adapter), ("two", args.other)):
            (root / "adapters" / name).mkdir(parents=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(pathlib.Path(source) / file, root / "adapters" / name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (root / "serve.toml").write_text(
            f"[server]\nport = {port}\n[admin]\nenabled = true\nadapter_root = 'adapters'\n"
            f"[[models]]\nmodel_id = '{pathlib.Path(args.model).resolve()}'\nname = 'base'\ndtype = 'f32'\ndevice.cpu = true\n")
        server = subprocess.Popen([args.monteclora, "serve", "-c", root / "serve.toml"], stderr=subprocess.DEVNULL)
        try:
            rows = run(server, f"http://127.0.0.1:{port}", args.swaps)
        finally:
            server.terminate()
            server.wait()
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'MB':<34}" + "".join(f"{field:>10}" for field in FIELDS))
    for row in rows:
        print(f"{row['after']:<34}" + "".join(f"{row[field]:>10.0f}" for field in FIELDS))


def run(server, url, n_swaps):
    """Goes through the steps; one row each."""
    rows = []

    def note(after, generations):
        wait(lambda: metric(url, "monteclora_resident_generations") == generations, "generations stay in memory")
        time.sleep(2)  # engines end a moment after their generation
        rows.append({"after": after} | {field: memory(server.pid, field) for field in FIELDS})

    def load(source):
        post(url, "/v1/load_lora_adapter", {"lora_name": "triage", "lora_path": source, "load_inplace": True})

    def ask(model):
        for text in ("I was charged twice.", "Where is my parcel?"):
            post(url, "/v1/chat/completions", {"model": model, "max_tokens": 64, "temperature": 0,
                                               "messages": [{"role": "user", "content": text}]})

    wait(lambda: server.poll() is not None or ready(url), "the server does not start")
    if server.poll() is not None:
        sys.exit("the server stopped; run `monteclora serve` yourself to see why")
    note("the base is loaded", 1)
    ask("base")
    note("two requests to the base", 1)
    load("one")
    note("an adapter is loaded", 2)
    ask("triage")
    note("two requests to it", 2)
    post(url, "/v1/unload_lora_adapter", {"lora_name": "triage"})
    note("it is unloaded", 1)
    load("one")
    for swap in range(n_swaps):
        load("one" if swap % 2 else "two")
        ask("triage")
    note(f"{n_swaps} swaps in place, two requests each", 2)
    post(url, "/v1/unload_lora_adapter", {"lora_name": "triage"})
    note("unloaded again", 1)
    time.sleep(30)
    note("half a minute later", 1)
    return rows


def memory(pid, field):
    """Megabytes (10^6 bytes)."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def wait(condition, problem, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(problem)
        time.sleep(0.1)


def ready(url):
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def metric(url, name):
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
    raise KeyError(name)


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
