"""How long requests wait at a server on CPUs: latency and throughput with 1, 4 and 16 clients.

Usage: serve_queue.py MODEL_DIR --program target/release/monteclora [--seconds 60] [--tokens 32] [--replicas 1 --cores 2] [--draw ADAPTER]
Each client sends one request after the other, of a prompt of its own, and waits for the whole answer. With `--replicas`, each
replica has `--cores` cores of its own, and client i asks replica i modulo their number. With `--draw`, the requests go to
NAME@draw-0 of that adapter with a posterior, which the trainer's decoder answers instead of mistral.rs. Prints one line of JSON
per number of clients. Linux only.
"""
import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))
from served import served  # noqa: E402

TOPICS = ["rivers", "bread", "clocks", "bridges", "stars", "letters", "gardens", "trains", "islands", "glass", "rope", "coal", "music", "ice", "maps", "salt"]


def ask(url, model, topic, tokens):
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Write a long text about {topic}."}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=900) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def measure(urls, model, clients, seconds, tokens):
    latencies, n_tokens, lock = [], [0], threading.Lock()
    end = time.monotonic() + seconds

    failed = []

    def client(idx):
        while time.monotonic() < end and not failed:
            began = time.monotonic()
            try:
                found = ask(urls[idx % len(urls)], model, TOPICS[idx % len(TOPICS)], tokens)
            except OSError as error:
                failed.append(error)
                return
            with lock:
                latencies.append(time.monotonic() - began)
                n_tokens[0] += found

    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(idx,)) for idx in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(f"a request failed: {failed[0]}")
    spent = time.monotonic() - began
    latencies.sort()
    at = lambda share: round(latencies[min(len(latencies) - 1, int(share * len(latencies)))], 2)
    return {"requests": len(latencies), "p50_s": at(0.5), "p99_s": at(0.99), "tokens_per_second": round(n_tokens[0] / spent, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--program", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--draw", metavar="ADAPTER", help="an adapter directory with a posterior")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    model = "tuned@draw-0" if args.draw else "base"
    adapters = []
    if args.draw:
        source = json.dumps(os.path.abspath(args.draw))
        adapters = ["[models.uncertainty]", "enabled = true", 'dtype = "f32"', "[[models.adapters]]", 'alias = "tuned"', f"source = {source}", "draws = 1"]
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as servers:
        config = pathlib.Path(work, "serve.toml")
        lines = ["[server]", "port = 0", "[[models]]", f"model_id = {json.dumps(os.path.abspath(args.model))}", 'name = "base"', 'dtype = "f32"', "device.cpu = true", *adapters]
        config.write_text("\n".join(lines) + "\n")
        urls = []
        for replica in range(args.replicas):
            cores = range(replica * args.cores, (replica + 1) * args.cores)
            os.sched_setaffinity(0, cores)
            urls.append(servers.enter_context(served(args.program, str(config)))[0])
        os.sched_setaffinity(0, range(os.cpu_count()))
        for url in urls:
            ask(url, model, "time", 4)
        for clients in args.clients:
            figures = measure(urls, model, clients, args.seconds, args.tokens)
            print(json.dumps({"model": model, "replicas": args.replicas, "cores": args.cores, "clients": clients, **figures}), flush=True)


main()
