#!/bin/sh
# The appointment webhook receiver, with the first Python that is new enough.
#
#   ./run.sh [SETTINGS]         start it; --port 9000 and the like, see ./run.sh help
#   ./run.sh test [WORD...]     test it, or only the tests whose name holds a word
#   ./run.sh bench              measure how fast it is on this machine
#   ./run.sh help               every command and setting
#   PYTHON=/path/to/python3 ./run.sh ...    use that Python
set -eu

me=$0
while [ -h "$me" ]; do                  # a link to this file is as good as the file
    link=$(readlink "$me")
    case $link in /*) me=$link ;; *) me=$(dirname -- "$me")/$link ;; esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$me")" && pwd)

fits() {
    "$1" -c 'import sys, sqlite3; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1 </dev/null
}

if [ -z "${PYTHON:-}" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python; do
        if fits "$candidate"; then
            PYTHON=$candidate
            break
        fi
    done
fi
if ! fits "${PYTHON:-python3}"; then
    echo "run.sh: ${PYTHON:-no python3 here} is not Python 3.9 or newer with its sqlite3 module;" \
        "try PYTHON=/path/to/python3 $0" >&2
    exit 2
fi

case "${1:-start}" in
    start) [ $# -eq 0 ] || shift; exec "$PYTHON" "$here/webhook_server.py" "$@" ;;
    test) shift; exec "$PYTHON" "$here/test_webhook_server.py" "$@" ;;
    help) exec "$PYTHON" "$here/webhook_server.py" --help ;;
    *) exec "$PYTHON" "$here/webhook_server.py" "$@" ;;
esac
