#!/usr/bin/env bash
# Sets up .venv, lints and runs the tests; arguments go to pytest. Works from any directory.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
mypy
# One thread per worker, one worker per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest --numprocesses auto --dist worksteal "$@"
