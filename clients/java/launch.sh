#!/bin/sh
# Starts @MAIN@ with what `make build` laid under target/.
here=$(dirname "$(readlink -f "$0")")/..
exec java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto \
  -cp "$here/target/classes:$here/target/test-classes:$here/target/lib/*" @MAIN@ "$@"
