"""Writes testdata/rows: rows as Parquet files, for the tests of qlora-data and qlora-train. Needs pyarrow."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

folder = Path(__file__).parent / "rows"
folder.mkdir(exist_ok=True)
rows = [
    {
        "id": 1,
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4"},
        ],
    },
    {
        "id": 2,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Höhe in m?"},
            {"role": "assistant", "content": "2962"},
        ],
    },
]
table = pa.Table.from_pylist(rows)
for name in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]:
    pq.write_table(table, folder / f"{name}.parquet", compression=name, write_statistics=False, store_schema=False)
# A key that some messages have only is null in the others.
rows[0]["messages"][1]["name"] = "adder"
pq.write_table(pa.Table.from_pylist(rows), folder / "names.parquet", write_statistics=False, store_schema=False)

# The layouts that Axolotl, LLaMA-Factory and TRL document, with rows of our own, as JSON and as Parquet.
asked = [
    ("Which bird can't fly?", "The ostrich. It runs instead."),
    ("Name a prime above 90.", "97"),
    ("What do bees make?", "Honey, and wax."),
    ("Say \"grün\" in English,\nplease.", "Green; it is a colour."),
]
turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in asked]
names = {"user": "human", "assistant": "gpt"}
layouts = {
    "alpaca": [
        {"instruction": question, "input": "In a word." if index % 2 else "", "output": answer}
        for index, (question, answer) in enumerate(asked)
    ],
    "sharegpt": [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in row]} for row in turns
    ],
    "messages": [{"messages": [{"role": "system", "content": "Be brief."}, *row]} for row in turns],
    "prompt_completion": [{"prompt": question, "completion": f" {answer}"} for question, answer in asked],
    "messages_completion": [{"prompt": row[:1], "completion": row[1:]} for row in turns],
    "text": [{"text": f"{question} {answer}"} for question, answer in asked],
}
(folder / "layouts.json").write_text(json.dumps(layouts, ensure_ascii=False, indent=1) + "\n")
for name, rows in layouts.items():
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd", write_statistics=False, store_schema=False)
