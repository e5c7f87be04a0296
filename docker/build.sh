#!/bin/bash
# Build the image recsys:cpu or recsys:gpu with Docker or, where that does not answer, with podman or buildah.
#
#   docker/build.sh cpu|gpu [more options of `docker build`]
#
# Taken from the environment, where it is set there:
#   ENGINE                                                docker, podman or buildah
#   BASE_IMAGE, TORCH_INDEX, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS      the Dockerfile's arguments
#   PIP_CERT (a bundle of certificates), PIP_CONFIG_FILE  files that pip reads in the build and the image does not hold
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cpu}
shift || true
case $device in cpu | gpu) ;; *)
    echo "docker/build.sh: no device '$device': cpu or gpu" >&2
    exit 2
    ;;
esac
engine=${ENGINE:-}
for candidate in docker podman buildah; do
    if [ -z "$engine" ] && "$candidate" info >/dev/null 2>&1; then engine=$candidate; fi
done
if [ -z "$engine" ]; then
    echo "docker/build.sh: neither docker nor podman nor buildah answers on this machine: docs/docker.md says what to do" >&2
    exit 2
fi
options=()
for name in BASE_IMAGE TORCH_INDEX PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS; do
    if [ -n "${!name+set}" ]; then options+=(--build-arg "$name=${!name}"); fi
done
if [ -f "${PIP_CERT:-}" ]; then options+=(--secret "id=ca,src=$PIP_CERT" --build-arg PIP_CERT=/run/secrets/ca); fi
if [ -f "${PIP_CONFIG_FILE:-}" ]; then options+=(--secret "id=pip.conf,src=$PIP_CONFIG_FILE"); fi
if [ "${engine##*/}" != docker ] && [ -d "${PIP_FIND_LINKS:-}" ]; then
    options+=(--volume "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro")
fi
revision=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
export DOCKER_BUILDKIT=1
exec "$engine" build --file docker/Dockerfile --target "$device" --tag "recsys:$device" \
    --label "org.opencontainers.image.revision=$revision" "${options[@]}" "$@" .
