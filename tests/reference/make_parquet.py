#!/usr/bin/env python3
"""Writes the Parquet files of tests/data/parquet: python3 tests/reference/make_parquet.py (pyarrow 26)."""

import datetime
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

OUT = pathlib.Path(__file__).parent.parent / "data/parquet"
OUT.mkdir(parents=True, exist_ok=True)


def write(name, table, **options):
    pq.write_table(table, OUT / f"{name}.parquet", **options)


call = pa.struct([("type", pa.string()), ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())]))])
message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
said = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4, naïvely."}]
called = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Sunny."},
]
rows = [said, called, said, called, said]
write(
    "messages",
    pa.table({"messages": pa.array(rows, pa.list_(message)), "id": pa.array(range(5), pa.uint8())}),
    row_group_size=2,
    compression="snappy",
)
write(
    "prompt_completion",
    pa.table(
        {
            "prompt": pa.array(["red", "green", "blue"], pa.large_string()),
            "completion": pa.array(["rose", "leaf", "sky"]).dictionary_encode(),
            "choices": pa.array([["rose", "leaf"], None, ["sky", "sea"]], pa.list_(pa.string())),
            "answer": pa.array([0, None, 0], pa.int64()),
            "score": pa.array([0.5, float("nan"), None], pa.float32()),
            "at": pa.array([datetime.datetime(2024, 5, 17, 12, 30)] * 3, pa.timestamp("us")),
        }
    ),
    compression="zstd",
)
write("text", pa.table({"text": ["one", "two", None]}), compression="none", data_page_version="2.0")
write("bytes", pa.table({"text": ["one"], "image": pa.array([{"png": b"\x89PNG"}], pa.struct([("png", pa.binary())]))}))
write("gzip", pa.table({"text": ["one"]}), compression="gzip")
