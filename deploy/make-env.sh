#!/bin/sh
# Makes .env for docker-compose.yml from .env.example, with credentials of its own. One that is there stays.
#   make-env.sh [FILE]
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
file=${1:-$top/.env}

if [ -e "$file" ]; then
    echo "make-env: $file is there already"
    exit 0
fi
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
while IFS= read -r line; do  # not by sed: everybody sees the arguments of a process
    case $line in
    AWS_ACCESS_KEY_ID=) line=$line$(random 10) ;;
    AWS_SECRET_ACCESS_KEY=) line=$line$(random 32) ;;
    GRAFANA_PASSWORD= | PAGE_PASSWORD=) line=$line$(random 16) ;;
    esac
    printf '%s\n' "$line"
done <"$top/.env.example" >"$file.new"
mv "$file.new" "$file"
echo "make-env: made $file"
