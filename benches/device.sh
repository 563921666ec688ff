#!/usr/bin/env bash
# The kernels on an NVIDIA card, from programs that were built elsewhere: are they right, are they fast, does the first
# use stall, does compute-sanitizer find anything. Four minutes and a half; every step has a limit of its own and says
# at once what came out, so that one that fails costs no other.
#
# usage: benches/device.sh BIN OUT [STEP...]     from the repository's root; steps: correct bars attention first-use sanitizer
#   BIN  qlora-bench, conformance, and the test programs matmul, kernels (nf4-quant), low_rank, attention, elementwise
#        (fused-kernels) and updates (paged-optim), as `cargo test --release --no-run --message-format=json` names
#        them, without their hash; what is not there is left out
#   OUT  takes the record of the bars, kernels.json, attention.json, first-use.json and the logs
# bitsandbytes is looked for by python3 (PYTHONPATH); without it the bars have no peer.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: benches/device.sh BIN OUT [STEP...]" >&2; exit 2; }
bin=$(realpath "$1") out=$(realpath "$2")
shift 2
steps=${*:-correct bars attention first-use sanitizer}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} RUST_BACKTRACE=0 PYTHONUNBUFFERED=1 QLORA_REFERENCE=$PWD/testdata/reference
# Compiled kernels: ours, and the driver's machine code, are kept from step to step.
export BURN_QLORA_KERNEL_CACHE=$work/kernels CUDA_CACHE_PATH=$work/driver CUDA_CACHE_MAXSIZE=4294967296
began=$SECONDS
peer=()
if python3 -c 'import torch' 2>/dev/null; then peer=(--peer python3); fi

# job NAME SECONDS COMMAND...: runs it in the background, and prints one line, and what went wrong where it failed.
job() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    {
        timeout "$limit" "$@" >"$work/$name.log" 2>&1
        local code=$? said verdict=WRONG
        [ $code = 0 ] && verdict=ok
        [ $code = 124 ] && verdict="SLOW "
        said=$(grep -hE '^test result|passed|ERROR SUMMARY|RACECHECK SUMMARY' "$work/$name.log" | tail -1 | cut -c1-90)
        grep -q '^skipped: ' "$work/$name.log" && verdict=SKIP
        said=$(printf '%-5s %s, %s s: %s' "$verdict" "$name" $((SECONDS - start)) "$said")
        if [ $code != 0 ]; then
            said+=$'\n'$({ grep -E -A3 'panicked|FAIL |=== (ERROR|Error|Invalid)' "$work/$name.log" ||
                tail -5 "$work/$name.log"; } | head -7 | cut -c1-240)
        fi
        # In one write: others are at it too.
        printf '%s\n' "$said"
    } &
}
# The tests of a program, by name.
tests() { "$bin/$1" --list 2>/dev/null | sed -n 's/: test$//p'; }

echo "== $(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader)"

case " $steps " in *" correct "*)
    echo "== correct (all at once: compiling takes the host's time)"
    for program in matmul kernels low_rank attention elementwise updates; do
        for test in $(tests $program); do
            job "$program-$test" 110 env QLORA_TEST_DEVICES=cuda \
                "$bin/$program" --exact "$test" --nocapture
        done
    done
    job conformance 200 "$bin/conformance" --reference testdata/reference --device cuda
    # The layers once more, on the kernel for other cards.
    job conformance-ampere 200 env NF4_QUANT_MATMUL=ampere "$bin/conformance" --reference testdata/reference --device cuda
    # Bars are measured alone; what they launch is compiled here.
    job compile-bars 110 "$bin/qlora-bench" kernels --bars --compile --device cuda
    wait
    echo "   $((SECONDS - began)) s so far"
esac

case " $steps " in *" bars "*)
    echo "== bars"
    timeout 110 "$bin/qlora-bench" kernels --bars --device cuda "${peer[@]}" --json "$out/kernels.json" 2>&1 |
        tee "$out/bars.log" | cut -c1-200
    echo "   $((SECONDS - began)) s so far"
esac

case " $steps " in *" attention "*)
    echo "== attention"
    timeout 45 "$bin/qlora-bench" kernels --only attention --device cuda "${peer[@]}" --json "$out/attention.json" 2>&1 |
        tee "$out/attention.log" | cut -c1-160
    echo "   $((SECONDS - began)) s so far"
esac

case " $steps " in *" first-use "*)
    echo "== first use"
    timeout 45 "$bin/qlora-bench" first-use --device cuda --json "$out/first-use.json" 2>&1 | tee "$out/first-use.log"
    echo "   $((SECONDS - began)) s so far"
esac

case " $steps " in *" sanitizer "*)
    # The tools make everything slow: every so many'th case.
    echo "== compute-sanitizer"
    sanitizer=$(command -v compute-sanitizer || echo "$CUDA_PATH/bin/compute-sanitizer")
    sane() {
        local tool=$1 test=$2 every=$3
        job "$tool-$test" 70 env NF4_QUANT_EVERY="$every" "$sanitizer" --tool "$tool" --error-exitcode 9 \
            --report-api-errors no --print-limit 4 "$bin/matmul" --exact "$test" --nocapture --test-threads 1
    }
    for tool in memcheck racecheck; do
        sane $tool gemv_low_rank_and_formats 25
        sane $tool gemv_weights 17
        sane $tool ampere_tiles 1
        sane $tool ampere_low_rank_4bit 9
        sane $tool hopper_tiles 3
    done
    wait
    echo "   $((SECONDS - began)) s so far"
esac
cp "$work"/*.log "$out" 2>/dev/null
tar -C "$out" --remove-files -czf "$out/logs.tgz" $(cd "$out" && ls -- *.log) 2>/dev/null
echo "== $((SECONDS - began)) s"
