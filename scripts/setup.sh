# Sourced by the scripts beside it: `setup EXTRA` makes the virtual environment (.venv, or $FINETUNE_VENV) and installs
# this checkout with the extra, again only when pyproject.toml has changed. TORCH=2.6 asks for that version of torch and
# the torchvision that belongs to it, in .venv-torch2.6; without it the newest ones are installed. Needs Python 3.11 or
# newer and a package registry, no root. Afterwards $VENV is the absolute path of the environment.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${CI:-}" = true ] && exec </dev/null # no interactive questions

TORCH=${TORCH:-}
VENV=${FINETUNE_VENV:-.venv${TORCH:+-torch$TORCH}}

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
    local stamp=$VENV/installed${TORCH:+-torch$TORCH}
    if cmp -s pyproject.toml "$stamp-dev" || cmp -s pyproject.toml "$stamp-$extra"; then
        return
    fi
    say "Installing finetune[$extra]${TORCH:+ with torch $TORCH} into $VENV (the first time several minutes: PyTorch is large) …"
    "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check --editable ".[$extra]" \
        ${TORCH:+"torch==$TORCH.*"} >&2
    cp pyproject.toml "$stamp-$extra"
}
