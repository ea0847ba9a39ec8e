#!/usr/bin/env bash
# Makes the image that docker/Dockerfile starts from, out of Debian packages, where no image registry can be reached.
#
#   sudo tests/end_to_end/debian_base.sh        # needs debootstrap, a Docker engine and root
#
# The result bears the name of the Python image and holds what the Dockerfile asks of it: python3 with venv, and this
# machine's certificates, so that pip trusts whom this machine trusts. DOCKER names another client, DEBIAN_MIRROR
# another archive.
set -euo pipefail

readonly root=$(cd "$(dirname "$0")/../.." && pwd)
readonly image=$(sed -n 's/^ARG PYTHON_IMAGE=//p' "$root/docker/Dockerfile")
readonly docker=${DOCKER:-docker}
readonly certificates=/etc/ssl/certs/ca-certificates.crt

[[ $(id -u) == 0 ]] || { echo "debootstrap needs root: run with sudo" >&2; exit 1; }
for command in debootstrap "$docker"; do
    command -v "$command" >/dev/null || { echo "not installed: $command" >&2; exit 1; }
done

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$tree" ${DEBIAN_MIRROR:-}
[[ ! -f $certificates ]] || cp "$certificates" "$tree$certificates"
rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/usr/share/{doc,locale,man}

tar --create --directory "$tree" --one-file-system --numeric-owner . |
    "$docker" import --change "ENV LANG=C.UTF-8 PIP_CERT=$certificates" --change 'CMD ["python3"]' - "$image"
