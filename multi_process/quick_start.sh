#!/bin/sh
# The same as ../quick_start.sh.
exec sh "$(dirname "$0")/../quick_start.sh" "$@"
