#!/bin/bash
# Run a command where containers can be built and run, with ENGINE and BASE_IMAGE set for docker/build.sh and the tests.
#
#   docker/with-engine.sh COMMAND...
#
# Docker is taken where it answers and has the base image or can fetch it; else podman; else, on Debian and as root, a podman
# from Debian's packages with storage of its own and a base made by debootstrap: it needs no registry, no daemon and no
# rights over control groups. The base is made once and kept in CONTAINER_CACHE (default: ~/.cache/recsys-containers); the
# storage beside it is removed at the end, unless KEEP_IMAGES=1.
set -euo pipefail
base=${BASE_IMAGE:-docker.io/library/python:3.11-slim}
for engine in docker podman; do
    if "$engine" info >/dev/null 2>&1 && { "$engine" image inspect "$base" || "$engine" pull -q "$base"; } >/dev/null 2>&1; then
        ENGINE=$engine BASE_IMAGE=$base exec "$@"
    fi
done

if [ "$(id -u)" != 0 ] || ! [ -f /etc/debian_version ]; then
    echo "docker/with-engine.sh: no engine here has $base or can fetch it, and only root of a Debian can make another base" >&2
    exit 2
fi
cache=${CONTAINER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/recsys-containers}
mkdir -p "$cache"
if ! { command -v podman && command -v runc && command -v debootstrap; } >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends podman buildah runc conmon debootstrap >/dev/null
fi
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
if ! [ -f "$cache/$release.tar" ]; then
    echo "docker/with-engine.sh: no engine here can fetch $base: making a base of Debian's $release (some minutes)" >&2
    tree=$(mktemp -d "$cache/tree.XXXX")
    chmod 755 "$tree" # it becomes the root folder of every user of the image
    sources=/etc/apt/sources.list.d/debian.sources
    mirror=$(sed -n 's/^URIs: //p' "$sources" 2>/dev/null | head -1)
    debootstrap --variant=minbase --include=ca-certificates "$release" "$tree" ${mirror:+"$mirror"} >"$cache/debootstrap.log"
    if [ -f "$sources" ]; then cp "$sources" "$tree/etc/apt/sources.list.d/" && rm -f "$tree/etc/apt/sources.list"; fi
    tar -C "$tree" -cf "$cache/$release.part" .
    mv "$cache/$release.part" "$cache/$release.tar"
    rm -rf "$tree"
fi
work=$cache/podman
mkdir -p "$work"
clean() {
    if [ "${KEEP_IMAGES:-0}" = 1 ]; then return; fi
    podman rm --all --force >/dev/null 2>&1 || true
    awk -v work="$work/" 'index($2, work) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount 2>/dev/null || true
    rm -rf "$work"
}
cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
END
cat >"$work/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$work/store"
runroot = "$work/run"
END
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf BUILDAH_ISOLATION=chroot
export ENGINE=podman BASE_IMAGE=localhost/debian-base
trap clean EXIT
podman import --quiet "$cache/$release.tar" "$BASE_IMAGE" >/dev/null
"$@"
