#!/usr/bin/env bash
# Makes the CPU image's base out of Debian's packages and imports it under the name that the Dockerfile asks for:
# `base.sh NAME`. Prints the arguments that `podman build` needs for pip's local directories.
#
# What is particular to this machine (pip's configuration, trusted certificates) goes into that base only.
set -euo pipefail

name=$1
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >&2
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
# `pip config list` prints SECTION.KEY='VALUE', those of the environment as :env:.KEY.
{
    echo "[global]"
    { python3 -m pip config list || true; } | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" | sort --unique
} > "$root/etc/pip.conf"
tar --create --directory "$root" . | podman import - "$name" >&2
grep -oE "(^|[ =]|file://)/[^ ,]+" "$root/etc/pip.conf" | sed -E 's#^[ =]*(file://)?##' | sort --unique \
    | while read -r path; do
        # Only the first two parts of file:// addresses: an index refers to files beside it.
        path=$(cut -d/ -f1-3 <<< "$path")
        [[ -e $path && ! $path -ef /etc/ssl ]] && echo "--volume=$path:$path:ro"
    done | sort --unique
