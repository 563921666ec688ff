"""Sequences that `data.packing = "auto"` and TRL make of the same rows, and the places that each leaves empty.

The rows' lengths are those that `qlora preview` shows; TRL packs rows of these lengths by its strategy "bfd", a thousand rows at a time as
it does unless told otherwise, and all at once.

    pip install trl datasets
    python3 check_packing.py target/release/qlora examples/quickstart/qlora.toml --set data.max_length=2048
"""

import argparse
import re
import subprocess
import sys


def preview(program, config, sets, rows):
    command = [program, "preview", config, "--rows", str(rows)]
    for assignment in ["data.packing=auto", *sets]:
        command += ["--set", assignment]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def number(text):
    return int(text.replace(",", ""))


def trl(lengths, capacity, at_a_time):
    import pyarrow
    from trl.data_utils import _pack_bfd  # what pack_dataset gives datasets' map

    parts = (lengths[start : start + at_a_time] for start in range(0, len(lengths), at_a_time))
    tables = (pyarrow.table({"input_ids": [[0] * length for length in part]}) for part in parts)
    return sum(len(_pack_bfd(table, capacity)) for table in tables)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    count = number(re.search(r": ([\d,]+) rows? \(", preview(args.program, args.config, args.set, 0)).group(1))
    shown = preview(args.program, args.config, args.set, count)
    lengths = [number(length) for length in re.findall(r"^line \d+: ([\d,]+) tokens?, ", shown, re.MULTILINE)]
    packed = re.search(r"of ([\d,]+) sequences? of up to ([\d,]+) tokens: rows lie end to end", shown)
    if len(lengths) != count or packed is None:
        sys.exit(f"{len(lengths)} of {count} rows were shown, packed: {packed is not None}")
    ours, capacity = map(number, packed.groups())
    theirs, at_once = (trl(lengths, capacity, at_a_time) for at_a_time in (1000, count))
    print(f"{count} rows, {sum(lengths)} tokens, sequences of up to {capacity}")
    for name, sequences in [("qlora", ours), ("TRL bfd", theirs), ("at once", at_once)]:
        empty = 1 - sum(lengths) / (sequences * capacity)
        print(f"{name:>8}: {sequences} sequences, {100 * empty:.3f} % of their places empty")
    sys.exit(0 if ours <= at_once <= theirs else 1)


if __name__ == "__main__":
    main()
