#!/bin/sh
# Creates the token of a Ray cluster: 256 random bits that only this user may read.
#   ray-token.sh FILE
# An existing token is kept. Nodes that start at the same time on a shared folder agree on one token.
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
    ln "$new" "$file" 2>/dev/null || [ -s "$file" ]  # another process was first
fi
chmod 600 "$file"
