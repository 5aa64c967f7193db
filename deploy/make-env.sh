#!/bin/sh
# Creates .env for docker-compose.yml from .env.example, with new random credentials. An existing file is kept; only
# credentials that it lacks are added.
#   make-env.sh [FILE]
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
file=${1:-$top/.env}

random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
with_credential() {  # prints a line of .env.example, filled in. Not by sed, whose arguments every user can see
    case $1 in
    AWS_ACCESS_KEY_ID=) printf '%s\n' "$1$(random 10)" ;;
    AWS_SECRET_ACCESS_KEY=) printf '%s\n' "$1$(random 32)" ;;
    GRAFANA_PASSWORD= | PAGE_PASSWORD=) printf '%s\n' "$1$(random 16)" ;;
    *) printf '%s\n' "$1" ;;
    esac
}
umask 077
if [ -e "$file" ]; then
    for name in GRAFANA_PASSWORD PAGE_PASSWORD; do  # not the S3 keys, which may come from elsewhere
        grep -q "^$name=" "$file" || { with_credential "$name=" >>"$file" && echo "make-env: $name added to $file"; }
    done
    echo "make-env: $file already exists"
    exit 0
fi
while IFS= read -r line; do
    with_credential "$line"
done <"$top/.env.example" >"$file.new"
mv "$file.new" "$file"
echo "make-env: created $file"
