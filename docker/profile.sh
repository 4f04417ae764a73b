# shellcheck shell=sh
# Login shells on every node: the shared environment first on PATH, as a site's module file would arrange it, and the
# names that a real login sets and `docker exec` does not.
export PATH="/shared/env/bin:$PATH"
export USER="${USER:-$(id -un)}" LOGNAME="${LOGNAME:-$(id -un)}"
