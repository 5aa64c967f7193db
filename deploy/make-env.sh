#!/bin/sh
# Makes .env for docker-compose.yml from .env.example, with credentials of its own. In one that is there nothing changes,
# but a credential that a newer version asks for is added.
#   make-env.sh [FILE]
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
file=${1:-$top/.env}

random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
with_credential() {  # a line of .env.example; not by sed: everybody sees the arguments of a process
    case $1 in
    AWS_ACCESS_KEY_ID=) printf '%s\n' "$1$(random 10)" ;;
    AWS_SECRET_ACCESS_KEY=) printf '%s\n' "$1$(random 32)" ;;
    GRAFANA_PASSWORD= | PAGE_PASSWORD=) printf '%s\n' "$1$(random 16)" ;;
    *) printf '%s\n' "$1" ;;
    esac
}
umask 077
if [ -e "$file" ]; then
    for name in GRAFANA_PASSWORD PAGE_PASSWORD; do  # not those of a store, which may take them from elsewhere
        grep -q "^$name=" "$file" || { with_credential "$name=" >>"$file" && echo "make-env: $name added to $file"; }
    done
    echo "make-env: $file is there already"
    exit 0
fi
while IFS= read -r line; do
    with_credential "$line"
done <"$top/.env.example" >"$file.new"
mv "$file.new" "$file"
echo "make-env: made $file"
