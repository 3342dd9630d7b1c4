"""The options of sbatch by name (Slurm 25.05), which `submit` passes on beside its own."""

_ALONE = """consolidate-segments contiguous exclusive get-user-env hold ignore-pbs kill-on-invalid-dep no-kill
    no-requeue overcommit oversubscribe reboot requeue resv-ports spread-job stepmgr test-only use-min-nodes verbose
    wait"""
TAKE_NO_VALUE = frozenset(_ALONE.split())
"""Options that stand alone. Some take a value as well, which must then follow =, as in --exclusive=user."""

_WITH_VALUE = """acctg-freq batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    container-id core-spec cores-per-socket cpu-freq cpus-per-gpu deadline delay-boot dependency distribution
    error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-socket
    gpus-per-task gres gres-flags hint input job-name licenses mail-type mail-user mcs-label mem mem-bind
    mem-per-cpu mem-per-gpu mincpus network nice nodefile nodelist ntasks ntasks-per-core ntasks-per-gpu
    ntasks-per-socket oom-kill-step open-mode output power prefer priority profile propagate reservation
    segment signal sockets-per-node switches thread-spec threads-per-core time-min tmp tres-bind tres-per-task
    uid wait-all-nodes wckey"""
TAKE_A_VALUE = frozenset(_WITH_VALUE.split())


def split_options(words: list[str]) -> tuple[list[str], list[str]]:
    """Return (the words that are none of sbatch's, the options of sbatch, each in one word with its value).

    >>> split_options(["train", "r.yaml", "--mem", "64G", "--mail_type=END", "--nodes=2", "--exclusive"])
    (['train', 'r.yaml', '--nodes=2'], ['--mem=64G', '--mail-type=END', '--exclusive'])
    """
    own, passed_on, rest = [], [], iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--") or name not in TAKE_NO_VALUE | TAKE_A_VALUE:
            own.append(word)
        elif equals or name in TAKE_NO_VALUE:
            passed_on.append(f"--{name}{equals}{value}")
        else:
            passed_on.append(f"--{name}={next(rest, '')}")
    return own, passed_on
