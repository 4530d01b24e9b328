#!/bin/sh
# usage: run.sh filter... ; runs the built test binary
bin=$(ls -t target/debug/deps/release-* | grep -v '\.d$' | head -1)
exec $bin --nocapture --test-threads=1 "$@"
