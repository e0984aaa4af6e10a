# Sourced by quickstart.sh, quickstart_lora.sh and test.sh: an environment to run in, and threads that suit the machine.
# In an active virtual or conda environment that one is used; otherwise .venv is made at the top of the repository.

REPO_ROOT=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)

activate_environment() {
    [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && return
    if [ ! -f "$REPO_ROOT/.venv/bin/activate" ]; then
        local python=${PYTHON:-python3}
        echo "making a virtual environment in $REPO_ROOT/.venv"
        if ! "$python" -m venv "$REPO_ROOT/.venv"; then
            rm -rf "$REPO_ROOT/.venv"
            echo "error: '$python -m venv' failed; install Python 3.10 or newer with its venv module" \
                "(Debian, Ubuntu: apt install python3-venv), or activate an environment of your own" >&2
            return 2
        fi
    fi
    source "$REPO_ROOT/.venv/bin/activate"
}

# install ARGUMENTS OF PIP INSTALL
install() {
    echo "installing: pip install $*"
    (cd "$REPO_ROOT" && python -m pip install --quiet --disable-pip-version-check "$@")
}

# Small networks gain little from many threads. On a busy machine threads that wait for each other by spinning made them
# ten times slower, so they sleep.
set_threads() {
    local cores
    cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
}

# run_recipe SCRIPT RECIPE ARGUMENTS: the help at the top of the script, or its recipe in the environment.
run_recipe() {
    local script=$1 recipe=$2
    shift 2
    case " $* " in *" -h "* | *" --help "*)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$script"
        return
        ;;
    esac
    activate_environment
    install -r requirements.txt
    set_threads
    export PYTHONPATH="$REPO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    exec python "$REPO_ROOT/scripts/quickstart/$recipe" "$@"
}
