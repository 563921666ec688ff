#!/bin/bash
# Runs the recorded tiny model under the launchers that are at hand and compares each run's adapter with that of one process: --gpus, torchrun,
# Open MPI's mpirun, MPICH's (PMI), and a real Slurm of one node that slurm.sh starts. Then a rank is killed: under torchrun, which
# restarts all ranks, and in Slurm's batch job of examples/distributed/train.sbatch, which is queued again, as it is when it is told to end; all
# must go on from the newest checkpoint to the unbroken run's adapter. Wants `qlora` in the PATH, or its path in QLORA; torchrun's in TORCHRUN. A launcher that is not there
# is told and left out.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
torchrun=$(command -v "${TORCHRUN:-torchrun}" || true)
write_run "$root/testdata/reference/tiny-llama" 40 96 5

train() { # output folder, micro-batches of a rank, and the command before the configuration
    local dir=$1 accumulation=$2
    shift 2
    "$@" qlora.toml --output-dir "$dir" --gradient-accumulation-steps "$accumulation" > "$dir.log" 2>&1 ||
        { cat "$dir.log"; echo "$dir: failed"; exit 1; }
    grep -h "ranks on .*, by " "$dir.log" || true
    cmp one/adapter/adapter_model.safetensors "$dir/adapter/adapter_model.safetensors"
    echo "$dir: the adapter of one process"
}

# Kills rank 1 of the run whose output folder this is, when it has saved something, by the variable that has its number.
kill_rank_1() { # output folder, variable
    local dir=$1 variable=$2
    for _ in $(seq 600); do
        if [ -n "$(ls -d "$dir"/checkpoint-* 2> /dev/null)" ]; then
            for pid in $(pgrep -x "$(basename "$qlora")"); do
                if tr '\0' '\n' < "/proc/$pid/environ" 2> /dev/null | grep -qx "$variable=1" &&
                    [ "$(readlink "/proc/$pid/cwd")" = "$work" ]; then
                    kill -9 "$pid" && echo "$dir: rank 1 was killed after $(ls "$dir" | grep -c checkpoint-) checkpoint(s)"
                    return
                fi
            done
        fi
        sleep 0.05
    done
    echo "$dir: there was no rank 1 to kill"
}
# The run was started twice, began with the first step once, and ended with the unbroken run's adapter.
same_as_long() { # output folder, log
    cmp long/adapter/adapter_model.safetensors "$1/adapter/adapter_model.safetensors"
    local starts firsts
    starts=$(grep -c "ranks on 1 host, by " "$2") firsts=$(grep -c "^step 1/" "$2")
    [ "$starts" -ge 2 ] && [ "$firsts" = 1 ] || { cat "$2"; echo "$1: $starts starts, of which $firsts from the first step"; exit 1; }
    echo "$1: ended, started again, and the adapter of a run that was left alone"
}
long=(--max-steps 40 --set train.save_every=5)

train one 4 "$qlora" train
train gpus 2 "$qlora" train --gpus 2
"$qlora" train qlora.toml --output-dir long --gradient-accumulation-steps 2 "${long[@]}" > long.log 2>&1
if [ -n "$torchrun" ]; then
    train torchrun-standalone 2 "$torchrun" --standalone --no-python --nproc-per-node 2 "$qlora" train
    train torchrun 1 "$torchrun" --no-python --nproc-per-node 4 "$qlora" train
    kill_rank_1 torchrun-restarted RANK &
    "$torchrun" --standalone --no-python --nproc-per-node 2 --max-restarts 2 "$qlora" train qlora.toml --resume auto-or-start \
        --output-dir torchrun-restarted --gradient-accumulation-steps 1 "${long[@]}" > torchrun-restarted.log 2>&1 ||
        { cat torchrun-restarted.log; exit 1; }
    wait $!
    same_as_long torchrun-restarted torchrun-restarted.log
else
    echo "no torchrun in the PATH: left out (set TORCHRUN)"
fi
openmpi=$(command -v mpirun.openmpi || command -v mpirun || true)
if [ -n "$openmpi" ] && "$openmpi" --version 2>&1 | grep -q "Open MPI\|OpenRTE"; then
    [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    train openmpi 2 "$openmpi" --oversubscribe -n 2 "$qlora" train
else
    echo "no mpirun of Open MPI in the PATH: left out (Debian: openmpi-bin)"
fi
if hydra=$(command -v mpiexec.hydra); then
    train mpich 2 "$hydra" -n 2 "$qlora" train
else
    echo "no mpiexec.hydra in the PATH: left out (Debian: mpich)"
fi
if PATH=$PATH:/usr/sbin command -v slurmctld > /dev/null && [ "$(id -u)" = 0 ]; then
    export root qlora work
    export -f train kill_rank_1 same_as_long
    slurm() {
        set -euo pipefail
        train srun 2 srun -n 2 "$qlora" train
        local job dir
        for dir in batch told; do
            job=$(QLORA=$qlora sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output=$dir.log \
                "$root/examples/distributed/train.sbatch" qlora.toml --output-dir $dir --gradient-accumulation-steps 1 \
                --max-steps 40 --set train.save_every=5)
            if [ $dir = batch ]; then
                kill_rank_1 batch SLURM_PROCID
            else
                # As Slurm does when the time of the job is nearly over.
                for _ in $(seq 600); do [ -d told/checkpoint-000005 ] && break; sleep 0.1; done
                scancel --signal=TERM "$job"
            fi
            for _ in $(seq 240); do [ -z "$(squeue -h -j "$job" 2> /dev/null)" ] && break; sleep 1; done
            scontrol show job "$job" | grep -o "JobState=[A-Z]*\|Restarts=[0-9]*" | paste -sd " "
            same_as_long $dir $dir.log
        done
    }
    export -f slurm
    "$root/benches/slurm.sh" bash -c slurm
else
    echo "no slurmctld in the PATH, or not root: Slurm is left out (Debian: slurmctld slurmd slurm-client munge)"
fi
