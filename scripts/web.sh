#!/usr/bin/env bash
exec bash "$(dirname "$0")/webui.sh" "$@"  # the name that the page had first
