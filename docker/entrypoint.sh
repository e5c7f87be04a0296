#!/bin/sh
# What the image runs: `recsys` with the given arguments, or one of the programs below by its name.
set -eu
# Where a run folder of the host is mounted, the folders in it that programs write to are not there yet.
if ! why=$(mkdir -p "$HOME" "$TMPDIR" 2>&1); then
    echo "recsys: error: user $(id -u) cannot write to the run folder ($(echo "$why" | head -n 1));" \
        "mount one that it owns, or start the container with --user and the folder's owner" >&2
    exit 2
fi
case "${1-}" in
    recsys | torchrun | python | make | bash) exec "$@" ;;
    *) exec recsys "$@" ;;
esac
