# From here on every job is the same: check the nodes, start Ray and the driver, and decide how the job ends.
set -u
export SLURM_EXPORT_ENV=ALL RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token PYTHONUNBUFFERED=1
# Each job has a token of its own, or whoever shares a node could submit work to its Ray. It is nowhere on a disk.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN

run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
job=$SLURM_JOB_ID
[ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restart=${SLURM_RESTART_COUNT:-0}
say() { printf '%s job %s: %s\n' "$(date '+%F %T')" "$job" "$*"; }
if ! [ -d "$run/slurm" ]; then
    say "error: $(hostname) does not see the run directory $run. Set runs_dir to a directory of a shared file system."
    exit 2
fi
exec >>"$run/slurm/output.log" 2>&1

stop=
attempt=
ask_to_stop() {
    stop=$1
    say "$2: the run saves and stops"
    [ -n "$attempt" ] && touch "$attempt/stop"
}
trap '[ -n "$stop" ] || ask_to_stop limit "the time limit or a preemption is near"' USR1
trap 'ask_to_stop user "asked to stop"' TERM INT
trap 'set +u; after' EXIT

# A step on some nodes, always in the background, so that this shell stays free for signals. `--cpus-per-task` is said
# because srun does not take it from the job.
step() { exec srun "${srun_options[@]}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" "$@"; }

# `wait` returns early for each signal; a background process is waited for until it has ended.
await() {
    local code
    wait "$1"; code=$?
    while kill -0 "$1" 2>/dev/null; do wait "$1"; code=$?; done
    wait "$1" 2>/dev/null; local again=$?
    [ $again -eq 127 ] || code=$again
    return $code
}

# end_after SECONDS PID: end a step that does not end; srun answers SIGTERM by killing it, but not on a node that is lost.
end_after() {
    (
        for ((left = $1; left > 0; left--)); do sleep 1; kill -0 "$2" || exit; done
        kill -TERM "$2"; sleep 10; kill -KILL "$2"
    ) 2>/dev/null &
}

# check_nodes DIRECTORY NEEDED OPTION... : ask the nodes that are left, and choose among those that are sound.
check_nodes() {
    local directory=$1 needed=$2 checks; shift 2
    mkdir -p "$directory"
    scontrol show node -o "$SLURM_JOB_NODELIST" >"$directory/nodes"
    scontrol show topology >"$directory/topology" 2>/dev/null
    printf '%s\n' "${nodes[@]}" >"$directory/asked"
    # A step a node: srun ends a step on all its nodes when it cannot be started on one of them.
    (
        for node in "${nodes[@]}"; do
            (step --nodes=1 --ntasks=1 --nodelist="$node" "${python[@]}" -m slurm.preflight --attempt="$directory" \
                --run="$run" "${node_options[@]}" "${preflight_options[@]}" "$@") >>"$directory/reports" &
        done
        trap 'kill $(jobs -p) 2>/dev/null' TERM
        wait
    ) 2>"$directory/preflight.log" &
    checks=$!
    end_after "$preflight_seconds" $checks
    await $checks
    step --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${python[@]}" -m slurm.choose \
        --attempt="$directory" --run="$run" --num-nodes="$needed" "${choose_options[@]}" &
    await $!
}

# Nodes that failed get no ranks for the rest of the job, however often it is queued again.
leave_out() {
    local node kept=()
    for node in "${nodes[@]}"; do
        [[ ",$1," == *",$node,"* ]] || kept+=("$node")
    done
    nodes=("${kept[@]}")
    excluded=${excluded:+$excluded,}$1
}

queue_again() {
    local state before
    state=$(scontrol show job -o "$job" | grep -o 'JobState=[A-Z]*')
    # A job that was cancelled stays cancelled.
    [ "$state" = JobState=RUNNING ] || { say "not queued again: ${state#*=}"; exit "$1"; }
    [ "$restart" -lt "$max_requeues" ] || { say "not queued again: it was $restart times (max_requeues)"; exit "$1"; }
    trap '' TERM
    scontrol requeue "$job" || { say "not queued again: scontrol failed. Continue with resume=$run"; exit "$1"; }
    say "queued again: it continues from its newest checkpoint${excluded:+, without $excluded}"
    if [ -n "$excluded" ]; then
        before=$(scontrol show job -o "$job" | grep -o 'ExcNodeList=[^ ]*')
        before=${before#*=}
        [ "$before" = "(null)" ] || excluded=$before,$excluded
        scontrol update job="$job" excnodelist="$excluded"
    fi
    exit "$1"
}

# The ranks on the chosen nodes: Ray's workers behind, its head and the driver in front.
train() {
    local head rest workers=
    head=$(head -1 "$attempt/chosen" | cut -d' ' -f1)
    rest=$(tail -n +2 "$attempt/chosen" | cut -d' ' -f1 | paste -sd,)
    if [ -n "$rest" ]; then
        step --nodes=$((num_nodes - 1)) --ntasks=$((num_nodes - 1)) --no-kill --nodelist="$rest" \
            "${python[@]}" -m slurm.node worker --attempt="$attempt" --run="$run" "${node_options[@]}" \
            >"$attempt/ray-workers.log" 2>&1 &
        workers=$!
    fi
    step --nodes=1 --ntasks=1 --nodelist="$head" \
        "${python[@]}" -m slurm.node head --attempt="$attempt" --run="$run" "${node_options[@]}" --driver="$driver" \
        2>"$attempt/ray-head.log" &
    await $!
    local code=$?
    # Tells the workers, should their head have been killed before it could.
    touch "$attempt/done"
    if [ -n "$workers" ]; then
        # They end by themselves then, but not on a node that is lost: the check that follows a failure waits for each
        # on its own node.
        end_after 10 $workers
        case $code in 0 | 2 | 75 | 130) await $workers ;; esac
    fi
    return $code
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
excluded=
say "starts on $SLURM_JOB_NODELIST$([ "$restart" -gt 0 ] && echo ", for the $((restart + 1))th time")"
# Lines of a user's own, as of a conda environment, may read variables that nobody has set.
set +u
before
set -u
for ((number = 1; ; number++)); do
    attempt=$run/slurm/$job-$restart-$number
    check_nodes "$attempt" "$num_nodes" "${bandwidth_options[@]}"
    code=$?
    [ -n "$stop" ] && code=75
    if [ $code -eq 0 ]; then
        failed=$(cat "$attempt/failed")
        [ -n "$failed" ] && leave_out "$failed"
        train
        code=$?
    elif [ $code -eq 3 ]; then
        leave_out "$(cat "$attempt/failed")"
        queue_again 1
    elif [ $code -ne 75 ]; then
        break
    fi
    case $code in
        75)
            [ "$stop" = limit ] && queue_again 75
            [ -z "$stop" ] && [ -e "$attempt/terminated" ] && queue_again 75
            break
            ;;
        0 | 2 | 130) break ;;
    esac
    # A rank failed: by its node's fault, or by its own?
    check_nodes "$attempt/after" "$num_nodes" --after="$attempt"
    code_of_check=$?
    failed=$(cat "$attempt/after/failed" 2>/dev/null)
    [ -n "$failed" ] || break
    leave_out "$failed"
    [ $code_of_check -eq 0 ] || queue_again "$code"
    say "starts over without $failed"
done
say "ended with exit code $code"
exit "$code"
