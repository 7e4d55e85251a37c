"""Two ranks in two network namespaces of a core each against one rank on one core, alternating; and the bytes that they exchange.

    sudo python3 benches/ranks.py --program target/release/monteclora --base BASE --data rows.jsonl [--steps 12] [--rounds 3]

Needs Linux, root, two idle cores, iproute2, Open MPI and a program built with `--features mpi`. Prints one JSON object.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

HOSTS = ("monteclora-a", "monteclora-b")
AGENT = """#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec sh -c "$*"' "$host" "$@"
"""


def ip(*words, check=True):
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@contextlib.contextmanager
def network():
    """Two hosts on a wire of their own: network namespaces with a virtual Ethernet between them."""
    folders = [pathlib.Path("/etc/netns") / host for host in HOSTS]
    try:
        for host, folder in zip(HOSTS, folders):
            ip("netns", "add", host)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} {name}\n" for n, name in enumerate(HOSTS)))
        ip("link", "add", "wire0", "netns", HOSTS[0], "type", "veth", "peer", "name", "wire0", "netns", HOSTS[1])
        for n, host in enumerate(HOSTS):
            ip("-n", host, "addr", "add", f"10.77.0.{n + 1}/24", "dev", "wire0")
            for link in ("lo", "wire0"):
                ip("-n", host, "link", "set", link, "up")
        yield
    finally:
        for host, folder in zip(HOSTS, folders):
            ip("netns", "del", host, check=False)
            (folder / "hosts").unlink(missing_ok=True)
            if folder.exists():
                folder.rmdir()


def sent():
    """Bytes that each host has put on the wire."""
    found = []
    for host in HOSTS:
        said = subprocess.run(["ip", "-n", host, "-s", "-j", "link", "show", "wire0"], check=True, capture_output=True, text=True)
        found.append(json.loads(said.stdout)[0]["stats64"]["tx"]["bytes"])
    return found


def train(chosen, folder, many):
    """Trains with two ranks or one; returns seconds per step and tokens per second, both without the first two steps."""
    out = folder / "out"
    subprocess.run(["rm", "-rf", out], check=True)
    rows = chosen.rows
    settings = {
        "train.output_dir": str(out), "data.max_seq_length": chosen.length, "data.packing": True, "data.overlong": "drop", "train.max_steps": chosen.steps,
        "train.per_device_train_batch_size": rows, "train.logging_steps": 2, "train.save_steps": 1000, "lora.method": "lora",
    }
    command = [chosen.program, "train", "-m", chosen.base, "--data", chosen.data, "--cpu"]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if many:
        agent = folder / "agent"
        agent.write_text(AGENT)
        agent.chmod(0o755)
        pinned = 'exec taskset -c "$OMPI_COMM_WORLD_RANK" "$0" "$@"'
        mpirun = [
            "mpirun", "--mca", "plm_rsh_agent", str(agent), "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "wire0", "--mca",
            "oob_tcp_if_include", "wire0", "--mca", "pml", "ob1", "--bind-to", "none", "-n", "2", "--host", ",".join(f"{host}:1" for host in HOSTS),
        ]
        command = ["sh", str(agent), HOSTS[0], *mpirun, "sh", "-c", f"'{pinned}'", *(f"'{word}'" for word in map(str, command))]
    else:
        command = ["taskset", "-c", "0", *command]
    subprocess.run(list(map(str, command)), check=True, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if line["type"] == "train"][1:]
    seconds = found[-1]["wall_s"] - (begun := found[0])["wall_s"]
    tokens = found[-1]["tokens"] - begun["tokens"]
    record = json.loads((out / "run.json").read_text())
    between = {name: statistics.mean(line[name] for line in found) for name in ("wait_s", "exchange_s") if name in found[0]}
    return {**between, "tokens_per_second": tokens / seconds, "seconds_per_step": seconds / (found[-1]["step"] - begun["step"]), "parameters": record["trainable_parameters"], "ranks": record["ranks"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("program", "base", "data"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="packs per rank and step (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens per pack (default: 128)")
    chosen = parser.parse_args()
    chosen.program, chosen.base, chosen.data = (path.resolve() for path in (chosen.program, chosen.base, chosen.data))
    rounds = []
    with network(), tempfile.TemporaryDirectory() as folder:
        for _ in range(chosen.rounds):
            before = sent()
            two = train(chosen, pathlib.Path(folder), True)
            two["bytes_per_step"] = [round((after - start) / chosen.steps) for start, after in zip(before, sent())]
            one = train(chosen, pathlib.Path(folder), False)
            rounds.append({"two": two, "one": one, "ratio": two["tokens_per_second"] / one["tokens_per_second"]})
            print(json.dumps(rounds[-1]), file=sys.stderr)
    print(json.dumps({"rounds": rounds, "median_ratio": statistics.median(entry["ratio"] for entry in rounds)}))


if __name__ == "__main__":
    main()
