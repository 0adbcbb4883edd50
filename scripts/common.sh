# common.sh: what the scripts in this folder share. They source it.

die() { echo "error: $*" >&2; exit 1; }

# usage ARGUMENT...: if the first argument is -h or --help, prints the comment at the script's beginning, and ends it.
usage() { case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac; }

# no_arguments ARGUMENT...: of a script that takes none
no_arguments() { [ $# -eq 0 ] || die "$1: ${0##*/} takes no arguments; -h lists the variables that it reads"; }

# whole_numbers VARIABLE...: each holds whole numbers of at least 1
whole_numbers() {
    local name word
    for name; do
        [[ ${!name} == *[![:space:]]* ]] || die "$name is empty: give a whole number of at least 1"
        for word in ${!name}; do
            [[ $word =~ ^[1-9][0-9]{0,8}$ ]] || die "$name=${!name}: $word must be a whole number of at least 1, below 1,000,000,000"
        done
    done
}

# attention_modes: MODES holds attention modes
attention_modes() {
    local word
    for word in $MODES; do [[ $word =~ ^(nsa|full|window)$ ]] || die "MODES=$MODES: $word must be nsa, full or window"; done
}

# gpu_list: prints the GPUs of this host, or of CUDA_VISIBLE_DEVICES if it is set, a line each. CUDA ignores what follows -1.
gpu_list() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then tr ', ' '\n\n' <<<"$CUDA_VISIBLE_DEVICES" | awk '$1 == -1 { ended = 1 } NF && !ended'
    else { nvidia-smi -L 2>/dev/null || true; } | awk '/^GPU/ { print n++ + 0 }'; fi
}

# all_gpus: prints their number; 0 if there are none
all_gpus() { gpu_list | wc -l; }

# need_gpus: GPUS is set to a number, and not 0
need_gpus() {
    [ "$GPUS" != 0 ] || die "GPUS=0: nvidia-smi -L lists no GPU; set their number in GPUS"
    whole_numbers GPUS
}

# need_trainer: TRAINER is a program, here if it names no folder
need_trainer() {
    [[ $TRAINER == */* ]] || TRAINER=./$TRAINER
    [ -f "$TRAINER" ] && [ -x "$TRAINER" ] || die "$TRAINER: no such program; build it with make train_gpt_nsa, or name another one in TRAINER"
}

# need_maker PROGRAM: it is a program that makes data
need_maker() { [ -x "$1" ] || die "$1: no such program; build it with make $1"; }

# Programs that start, wait_for and run have process groups of their own. So a signal to the script and the terminal's
# Ctrl-C reach them once, through forward: as what they are, or all as the signal forward_as.
pids=() signals=() forward_as=
forward() {
    local signal=${forward_as:-$1}
    signals+=("$signal")
    [ ${#pids[@]} -eq 0 ] || kill -s "$signal" -- "${pids[@]}" 2>/dev/null || true
}

# start PROGRAM ARGUMENT...: starts it in the background; its process id is $!
start() {
    local signal early
    for signal in HUP INT TERM USR1 USR2; do trap "forward $signal" $signal; done
    set -m
    "$@" </dev/null &
    pids+=($!) early=("${signals[@]}")
    set +m
    for signal in "${early[@]}"; do kill -s "$signal" $! 2>/dev/null || true; done
}

# wait_for PID: returns the exit code of a program that was started; 1, with a message, if it was killed or has crashed
wait_for() {
    local received code i
    while :; do
        received=${#signals[@]} code=0
        wait "$1" 2>/dev/null || code=$?
        [ $code -gt 128 ] && [ ${#signals[@]} -gt "$received" ] || break # else a signal interrupted wait
    done
    for i in "${!pids[@]}"; do [ "${pids[i]}" != "$1" ] || unset "pids[i]"; done
    case $code in 132 | 134 | 135 | 136 | 137 | 139)
        echo "error: process $1 was ended by SIG$(kill -l "$code"); dmesg tells whether memory ran out" >&2
        code=1
    esac
    return $code
}

# run PROGRAM ARGUMENT...: runs a program and returns its exit code. After a signal the script ends with it.
run() {
    local code=0
    [ ${#signals[@]} -eq 0 ] || exit 1
    start "$@"
    wait_for $! || code=$?
    [ ${#signals[@]} -eq 0 ] || exit 1
    return $code
}
