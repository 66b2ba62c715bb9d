# The commands of a developer; `just` lists them.
default:
    @just --list

# everything that needs no tests: lint, format, types
check:
    ruff check .
    ruff format --check .
    mypy

# mend what can be mended by itself
fmt:
    ruff check --fix .
    ruff format .

# the tests, on all cores or as given: just test tests/models -k gate
test *args:
    OMP_NUM_THREADS=1 pytest -n auto {{args}}

# what continuous integration runs, on a clean clone
ci:
    bash .ci/run
