#!/bin/sh
# Makes the token of a Ray cluster at its first start: 256 random bits that only this user may read.
#   ray-token.sh FILE
# A file that is there stays, whoever wrote it. Head and workers that start at once on a shared folder agree on one.
set -eu
file=$1

if [ -e "$file" ] && [ ! -s "$file" ]; then
    rm "$file"
fi
if [ ! -e "$file" ]; then
    umask 077
    mkdir -p "$(dirname "$file")"
    new=$(mktemp "$file.XXXXXX")
    trap 'rm -f "$new"' EXIT
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$new"
    ln "$new" "$file" 2>/dev/null || [ -s "$file" ]  # by now another one's
fi
chmod 600 "$file"
