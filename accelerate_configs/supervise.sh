#!/usr/bin/env bash
# Start a run again, as a whole, until it ends, for example when a GPU fails during the night.
#
#     accelerate_configs/supervise.sh accelerate launch --config_file accelerate_configs/ddp.yaml recipes/pretrain.py ...
#
# The recipe resumes by itself from its newest whole checkpoint, so a relaunch costs the steps since then, and may run on
# another number of processes. All processes are started together: a single new one would find the others in the
# middle of a step.
#
# It gives up, with the run's exit code, when the run ends well (0), when an option is wrong (2), or when the run fails
# MAX_QUICK_FAILURES times in a row within QUICK_SECONDS, when another start would not help. SIGTERM, Ctrl-C and a
# closed terminal are passed to the run at any time: it saves, and nothing is started again. A second signal stops it at
# once. The script needs only bash, sleep, mktemp, grep and rm.
set -u

QUICK_SECONDS=${QUICK_SECONDS:-120}
MAX_QUICK_FAILURES=${MAX_QUICK_FAILURES:-3}
WAIT_SECONDS=${WAIT_SECONDS:-10}

if [ $# -eq 0 ]; then
    echo "usage: $0 COMMAND...   e.g. $0 accelerate launch recipes/pretrain.py --output_dir out/run" >&2
    exit 2
fi

# A trap only stores the signal; the loops below check it several times a second. So a signal may interrupt anything.
LOOK_SECONDS=0.2
signal="" # the last one received
child=""  # the run's launcher
told=" "  # the processes that were sent SIGTERM since then, each between spaces
trap 'signal=TERM told=" "' TERM
trap 'signal=INT told=" "' INT
trap 'signal=HUP told=" "' HUP

# `accelerate launch` ends with 1 for any failure of its workers, so each recipe also adds its exit code to this file.
HFLLM_EXIT_CODES=$(mktemp) || exit 1
export HFLLM_EXIT_CODES
trap 'rm -f "$HFLLM_EXIT_CODES"' EXIT

# All processes, as lines of pid, parent and state: from /proc where there is one, as `ps` is missing in many containers.
processes() {
    if [ ! -r /proc/self/stat ]; then
        ps -A -o pid=,ppid=,state=
        return
    fi
    local stat line
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue # it has ended meanwhile
        # The line is `pid (name) state parent ...`, and a name may hold spaces and brackets.
        # shellcheck disable=SC2086
        set -- "${line%% *}" ${line##*) }
        echo "$1 $3 $2"
    done
}

child_is_at_rest() { # stopped, or ended
    ! processes | grep -q "^ *$child  *[0-9]*  *[^TtZ]"
}

workers() { # of the launcher, without those that have ended
    processes | while read -r pid parent state; do
        [ "$parent" != "$child" ] || [ "${state:0:1}" = Z ] || echo "$pid"
    done
}

# Send SIGTERM to each worker of the launcher that has not got it yet. A launcher that gets it may leave its workers
# behind, so it is sent to the launcher only while there is no worker. We hold the launcher still while we look, so that
# it starts none meanwhile.
tell_workers() {
    local pids pid
    case $told in *" $child "*) return ;; esac # it had no worker, and will not start one
    kill -STOP "$child" 2>/dev/null || return 0
    for _ in {1..50}; do
        child_is_at_rest && break
        sleep 0.02
    done
    pids=$(workers)
    for pid in ${pids:-$child}; do
        case $told in *" $pid "*) continue ;; esac
        told="$told$pid " # first: a signal that arrives now resets it
        kill -TERM "$pid" 2>/dev/null
    done
    kill -CONT "$child" 2>/dev/null
}

finish() {
    echo "supervise: stopped by SIG$signal (exit code $1). The same command resumes the run." >&2
    exit "$1"
}

# In its own session the run gets the terminal's Ctrl-C only from us, once.
own_session=$(command -v setsid)
quick_failures=0
while true; do
    [ -z "$signal" ] || finish $((128 + $(kill -l "$signal")))
    started=$SECONDS
    : >"$HFLLM_EXIT_CODES"
    ${own_session:+"$own_session"} "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        [ -z "$signal" ] || tell_workers # again and again: a worker may have started since we looked
        sleep "$LOOK_SECONDS"
    done
    wait "$child"
    code=$?
    took=$((SECONDS - started))
    for noted in 143 2; do
        [ "$code" -eq 0 ] || ! grep -qx "$noted" "$HFLLM_EXIT_CODES" || code=$noted
    done
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    fi
    [ -z "$signal" ] || finish "$code"
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
    sleep "$WAIT_SECONDS" >/dev/null 2>&1 &
    while kill -0 $! 2>/dev/null && [ -z "$signal" ]; do
        sleep "$LOOK_SECONDS"
    done
    kill $! 2>/dev/null
done
