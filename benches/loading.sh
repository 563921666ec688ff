#!/bin/bash
# What N ranks of one host read from the disk when they load a base that nobody has read before, and how long they take to the first step:
#   benches/loading.sh MODEL_FOLDER [RANKS...]
# The files are written out of the page cache first (posix_fadvise), so that each run begins cold; what is read is the sum of the ranks'
# read_bytes (/proc/PID/io), which counts what came from the disk. Linux; on the CPU, or on what DEVICE says.
# Wants `qlora` in the PATH, or its path in QLORA.
set -euo pipefail
model=$(realpath "${1:?a folder of a model}")
shift
[ $# -gt 0 ] || set -- 1 2 4
. "$(dirname "$0")/setup.sh"
write_run "$model" 8 64 1
for ranks in "$@"; do
    QLORA=$qlora RANKS=$ranks MODEL=$model python3 - <<'PY'
import glob, os, subprocess, time

files = glob.glob(os.environ["MODEL"] + "/*.safetensors")
size = sum(os.path.getsize(file) for file in files)
for file in files:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
ranks = os.environ["RANKS"]
command = [os.environ["QLORA"], "train", "qlora.toml", "--overwrite", "--batch-size", "1", "--gradient-accumulation-steps", "1"]
command += ["--set", "data.eval_fraction=0"] + (["--gpus", ranks] if ranks != "1" else [])
start = time.time()
run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open("said", "w"))
seen = {}


def children(pid):
    try:
        pids = [int(p) for t in glob.glob(f"/proc/{pid}/task/*/children") for p in open(t).read().split()]
    except OSError:
        return []
    return pids + [below for p in pids for below in children(p)]


def look():
    # A process that starts ranks has read what those have that ended: the system adds it up.
    for pid in children(run.pid) or [run.pid]:
        try:
            counts = dict(line.split(": ") for line in open(f"/proc/{pid}/io").read().splitlines())
            seen[pid] = int(counts["read_bytes"])
        except (OSError, KeyError, ValueError):
            pass


first = None
while run.poll() is None:
    look()
    said = open("said").read()
    if first is None and "step 1/1" in said:
        first = time.time() - start
    time.sleep(0.02)
if run.returncode:
    raise SystemExit(open("said").read())
if len(seen) > 1:
    seen.pop(run.pid, None)
disk = list(seen.values())
total = sum(disk)
print(f"{ranks} ranks: weights of {size / 1e9:.2f} GB, read from the disk {total / 1e9:.2f} GB ({total / size:.2f} times), by process "
      + ", ".join(f"{read / 1e9:.2f}" for read in disk) + f" GB; first step after {first:.1f} s", flush=True)
PY
done
