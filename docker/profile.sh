# shellcheck shell=sh
# Login shells on every node find the shared environment first, as a site's module file would arrange it.
export PATH="/shared/env/bin:$PATH"
