# Sourced by the scripts beside it: `setup EXTRA` makes the virtual environment (.venv, or $FINETUNE_VENV) and installs
# this checkout with the extra, again only when pyproject.toml has changed. Needs Python 3.11 or newer and a package
# registry, no root. Afterwards $VENV is its absolute path.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${CI:-}" = true ] && exec </dev/null # nobody is there to answer a question

VENV=${FINETUNE_VENV:-.venv}

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "No Python 3.11 or newer on the PATH (tried python3, python3.11 to python3.14, python)."
    say "Install one, for instance with your package manager, conda (environment.yml) or from python.org."
    return 1
}

make_venv() {
    local python
    python=$(find_python)
    say "Making the virtual environment $VENV with $("$python" --version) …"
    if ! "$python" -m venv --clear "$VENV" >&2; then
        say "$python cannot make virtual environments; on Debian and Ubuntu install the package python3-venv."
        return 1
    fi
}

setup() {
    local extra=$1
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        make_venv
    fi
    VENV=$(cd "$VENV" && pwd)
    # The stamps hold the pyproject.toml that was installed; dev contains every other extra.
    if cmp -s pyproject.toml "$VENV/installed-dev" || cmp -s pyproject.toml "$VENV/installed-$extra"; then
        return
    fi
    say "Installing finetune[$extra] and what it needs into $VENV (the first time several minutes: PyTorch is large) …"
    "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check --editable ".[$extra]" >&2
    cp pyproject.toml "$VENV/installed-$extra"
}
