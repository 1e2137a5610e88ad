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

# what keeps a Python from running it; nothing when it can
trouble() {
    command -v "$1" >/dev/null || { echo "is not here; install Python 3.9 or newer"; return; }
    answer=$("$1" -c '
import sys
if sys.version_info < (3, 9):
    print("is Python %d.%d; install 3.9 or newer" % sys.version_info[:2])
else:
    try:
        import email.utils, http.server, sqlite3
        print("works")
    except ImportError as error:
        print("lacks %s of its standard library; install all of it (Debian, Ubuntu: apt install python3)" % error.name)
' 2>/dev/null </dev/null) || answer=
    case $answer in                     # other programs say nothing, or anything
        works) ;;
        "is Python "* | "lacks "*) echo "$answer" ;;
        *) echo "is no Python that works; install 3.9 or newer" ;;
    esac
}

why= said=
if [ -n "${PYTHON:-}" ]; then
    why=$(trouble "$PYTHON")
    said="$PYTHON $why"
else
    for PYTHON in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python; do
        why=$(trouble "$PYTHON")
        [ -n "$why" ] || break
        said=${said:-$PYTHON $why}      # of several that do not do, the first tells most
    done
fi
if [ -n "$why" ]; then
    echo "run.sh: $said; PYTHON=/path/to/python3 $0 takes another" >&2
    exit 2
fi

case "${1:-start}" in
    start) [ $# -eq 0 ] || shift; exec "$PYTHON" "$here/webhook_server.py" "$@" ;;
    test) shift; exec "$PYTHON" "$here/test_webhook_server.py" "$@" ;;
    *) exec "$PYTHON" "$here/webhook_server.py" "$@" ;;
esac
