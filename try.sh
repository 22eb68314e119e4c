#!/bin/sh
# Make a virtual environment beside this file (once), install minidp into it at pinned versions, and run it.
#   sh try.sh demo [options]     the demo: one worker against N
#   sh try.sh test [options]     the tests (options go to pytest)
#   sh try.sh notebooks          JupyterLab, with the notebooks
#   sh try.sh plan [options]     how far a model scales on machines that one does not have
#   sh try.sh bench [options]    the benchmarks (PyTorch and MPI are optional: see README)
#   sh try.sh gpu                all that needs a GPU: doctor, tests, demo, benchmarks
#   sh try.sh docs               the documentation, as pages in build/html
#   sh try.sh check              ruff and mypy
set -eu
cd "$(dirname "$0")"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "minidp needs Python 3.11 or newer; $("$python" --version 2>&1) was found. Set PYTHON=/path/to/python3." >&2
    exit 1
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

make_venv() { rm -rf .venv && "$python" -m venv .venv; }

# Debian and Ubuntu keep venv in a package of its own.
if [ ! -x .venv/bin/pip ]; then
    make_venv >/dev/null 2>&1 || {
        echo "Installing Debian's python3-venv (once) ..." >&2
        as_root apt-get update -qq && as_root apt-get install -qq -y python3-venv >/dev/null
        make_venv
    }
fi

extras=test
[ "${1:-}" != check ] || extras=test,lint
[ "${1:-}" != notebooks ] || extras=test,notebooks
[ "${1:-}" != gpu ] || extras=test,${MINIDP_GPU:-gpu13}  # MINIDP_GPU=gpu12 for drivers older than 580
wanted="$extras $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
    echo "Installing minidp and what it needs into .venv (once) ..." >&2
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    echo "$wanted" >.venv/installed
fi

command=${1:-help}
[ $# = 0 ] || shift
case $command in
    demo) exec .venv/bin/python -m minidp.demo "$@" ;;
    test) exec .venv/bin/python -m pytest "$@" ;;
    notebooks)
        [ "$(id -u)" != 0 ] || set -- --allow-root "$@"  # else JupyterLab refuses
        exec .venv/bin/python -m jupyterlab "$@" notebooks
        ;;
    plan) exec .venv/bin/python -m minidp.plan "$@" ;;
    bench) exec .venv/bin/python -m minidp.bench "$@" ;;
    gpu)
        .venv/bin/python -m minidp.doctor --device cuda &&
            .venv/bin/python -m pytest -m gpu "$@" &&
            .venv/bin/python -m minidp.demo --device cuda &&
            .venv/bin/python -m minidp.bench step --device cuda &&
            .venv/bin/python -m minidp.bench allreduce --device cuda
        ;;
    docs)
        .venv/bin/python -m sphinx -c docs -b html -W --keep-going -q . build/html "$@" &&
            echo "Open $PWD/build/html/index.html"
        ;;
    check)
        .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
        ;;
    *)
        sed -n '2,/^set/s/^# //p' try.sh
        exit 2
        ;;
esac
