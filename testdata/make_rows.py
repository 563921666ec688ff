"""Writes testdata/rows: conversations as Parquet files, for the tests of qlora-data. Needs pyarrow."""

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
