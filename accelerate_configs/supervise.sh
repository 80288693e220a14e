#!/usr/bin/env bash
# Start a run again, as a whole, until it ends: a lost GPU at 3 a.m. is then a relaunch, not a loss.
#
#     accelerate_configs/supervise.sh accelerate launch --config_file accelerate_configs/ddp.yaml recipes/pretrain.py ...
#
# The recipe goes on by itself from its last whole checkpoint, so a relaunch costs the steps since then, and may run on
# another number of processes. All processes are started anew together: one that joins the others in place would find
# them in the middle of a step.
#
# It gives up, with the run's exit code, when the run ends well (0), when an option is wrong (2), or when it fails
# MAX_QUICK_FAILURES times in a row within QUICK_SECONDS, which no new start will mend. Ctrl-C and SIGTERM are handed on:
# the run saves, and nothing is started again.
set -u

QUICK_SECONDS=${QUICK_SECONDS:-120}
MAX_QUICK_FAILURES=${MAX_QUICK_FAILURES:-3}
WAIT_SECONDS=${WAIT_SECONDS:-10}

if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND...   e.g. $0 accelerate launch recipes/pretrain.py --output_dir out/run" >&2
    exit 2
fi

signal=""
child=""
# A launcher that is told to stop may leave its workers behind, so the workers are told, and the launcher waits for them.
hand_on() {
    signal=TERM
    [ -n "$child" ] && { pkill -TERM -P "$child" || kill -TERM "$child"; } 2>/dev/null
}
trap hand_on TERM
trap 'signal=INT' INT # from the terminal, which sends it to all of them

quick_failures=0
while true; do
    started=$SECONDS
    "$@" &
    child=$!
    # A signal ends `wait` early; the run is over when the process is.
    while true; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    took=$((SECONDS - started))
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    fi
    if [ -n "$signal" ]; then
        echo "supervise: stopped by SIG$signal (exit code $code). The same command goes on." >&2
        exit "$code"
    fi
    if [ "$took" -lt "$QUICK_SECONDS" ]; then
        quick_failures=$((quick_failures + 1))
    else
        quick_failures=0
    fi
    if [ "$quick_failures" -ge "$MAX_QUICK_FAILURES" ]; then
        echo "supervise: failed $quick_failures times in a row within $QUICK_SECONDS s; giving up (exit code $code)." >&2
        exit "$code"
    fi
    echo "supervise: the run ended with exit code $code after $took s; starting it again in $WAIT_SECONDS s." >&2
    sleep "$WAIT_SECONDS"
done
