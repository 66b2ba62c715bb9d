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

# the tests, or those that are named: just test tests/models -k gate
test *args:
    pytest {{args}}

# what continuous integration runs, on a clean clone
ci:
    bash .ci/run
