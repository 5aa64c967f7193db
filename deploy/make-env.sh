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
sed -e "s/^AWS_ACCESS_KEY_ID=\$/&$(random 10)/" \
    -e "s/^AWS_SECRET_ACCESS_KEY=\$/&$(random 32)/" \
    -e "s/^GRAFANA_PASSWORD=\$/&$(random 16)/" "$top/.env.example" >"$file.new"
mv "$file.new" "$file"
echo "make-env: made $file"
