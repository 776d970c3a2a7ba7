#!/usr/bin/env bash
# Sets up .venv, lints and runs the tests; arguments go to pytest. Works from any directory.
# With the oldest transformers: CONSTRAINTS=scripts/constraints-oldest.txt scripts/test.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
[ "$constraints" != scripts/constraints.txt ] || mypy  # annotations of older transformers differ
# One thread per worker, one worker per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest --numprocesses auto --dist worksteal "$@"
