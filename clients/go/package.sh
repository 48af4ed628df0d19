#!/bin/sh
# What publishing a version of the module comes to: its zip, made from HEAD like the go command makes it from a tag, put
# where a module proxy has it (dist/), and taken from there by a module of its own, which builds everything in it.
set -eu
module=$1 version=$2
cd "$(dirname "$0")"
top=$(git rev-parse --show-toplevel)
rm -rf dist
at=dist/$module/@v
mkdir -p "$at"
# The licence is that of the repository: for a module in a directory below the top the go command puts it in.
git archive --format=zip --prefix="$module@$version/" --add-file="$top/LICENSE" --output="$at/$version.zip" HEAD
git show HEAD:./go.mod >"$at/$version.mod"
printf '{"Version": "%s", "Time": "%s"}\n' "$version" "$(TZ=UTC git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd)" >"$at/$version.info"

taker=$(mktemp -d)
trap 'chmod -R u+w "$taker" && rm -rf "$taker"' EXIT
proxy="file://$(pwd)/dist,$("$GO" env GOPROXY)"
cd "$taker"
"$GO" mod init taker.example >/dev/null 2>&1
# Its own module cache for what is being published, filled from the one there is.
export GOPROXY="file://$("$GO" env GOMODCACHE)/cache/download,$proxy" GOMODCACHE="$taker/cache" GONOSUMDB="$module" GOFLAGS=-mod=mod
"$GO" get "$module@$version"
"$GO" build "$module" "$module/keyturn/v1"
"$GO" build -o "$taker/" "$module/examples/gateway" "$module/conformance"
"$GO" vet "$module"
test -f "$GOMODCACHE/$module@$version/LICENSE"
test -f "$GOMODCACHE/$module@$version/README.md"
echo "$module@$version: $(wc -c <"$OLDPWD/$at/$version.zip") bytes in clients/go/$at"
