# Sourced by run_train_*.sh, which set: config results_dir data_path init_from settings, and nnodes nproc_per_node node_rank
# master_addr master_port. Starts one svg_t2i.train a process; the script's own arguments come last and win.
# SIGTERM or SIGUSR1 to the script reach the run, which finishes its step, saves and ends within PET_SHUTDOWN_TIMEOUT
# seconds, or torchrun kills it. The exit code is the run's (docs/reliability.md). (PET_* are torchrun's options; a
# version that does not know one yet ignores it.)
case " $node_rank $* " in *" -h "* | *" --help "*)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit
    ;;
esac

repo_root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$repo_root${PYTHONPATH:+:$PYTHONPATH}"
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}

if ! [[ $node_rank =~ ^[0-9]+$ ]] || (( node_rank >= nnodes )); then
    echo "error: RANK ID $node_rank: with $nnodes machine(s) it is one of 0 to $(( nnodes - 1 )); set NNODES for more" >&2
    exit 2
fi
if (( nnodes > 1 )) && [[ $master_addr == 127.0.0.1 ]]; then
    echo "note: MASTER_ADDR is 127.0.0.1, which other machines cannot reach; set it to machine 0's address" >&2
fi

overrides=()
[[ -z $results_dir ]] || overrides+=("results_dir=$results_dir")
[[ -z $data_path ]] || overrides+=("data.path=$data_path")
[[ -z $init_from ]] || overrides+=("init_from=$init_from")

launch_train() {
    local rendezvous=(--standalone)  # one machine: any free port
    (( nnodes == 1 )) && [[ -z $master_port ]] ||
        rendezvous=(--nnodes "$nnodes" --node_rank "$node_rank"
                    --master_addr "$master_addr" --master_port "${master_port:-29500}")
    exec python -m autoencoder.common.launch "${rendezvous[@]}" --nproc_per_node "$nproc_per_node" -m svg_t2i.train \
        --config "$config" "${overrides[@]}" "${settings[@]}" "$@"
}
