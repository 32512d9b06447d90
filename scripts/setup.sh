# Sourced by demo.sh and test.sh: makes .venv in the repository and installs into it.
# Usage: . scripts/setup.sh EXTRAS

cd "$(dirname "$0")/.."
python=""
for candidate in "${PYTHON:-}" python3.14 python3.13 python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && "$candidate" -c \
        'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "tova_mlx needs Python 3.11 or newer. Install it, or set PYTHON." >&2
    exit 1
fi
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    if ! "$python" -m venv .venv 2>/dev/null; then
        # Debian's Python has no ensurepip until python3-venv is installed.
        rm -rf .venv
        if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
            apt-get update -qq && apt-get install -qq -y python3-venv >/dev/null
            "$python" -m venv .venv
        else
            echo "Cannot make a virtual environment: install python3-venv." >&2
            exit 1
        fi
    fi
fi
echo "Installing into .venv …" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
