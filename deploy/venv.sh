# Sourced by the set-up scripts. `make_venv FOLDER PYTHON` creates a virtual environment unless a working one exists.

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1; }

make_venv() {
    "$2" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: $2 is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2
        exit 2
    }
    if "$1/bin/python" -m pip --version >/dev/null 2>&1; then  # fails if set-up was interrupted
        return
    fi
    # Debian packages venv separately.
    if ! "$2" -c 'import ensurepip, venv' 2>/dev/null; then
        can_install && apt-get update -qq && apt_install python3-venv || {
            echo "setup: Python has no venv; as root: apt-get install python3-venv" >&2
            exit 2
        }
    fi
    "$2" -m venv --clear "$1"
}
