#!/bin/sh
# Packs what publishing would upload into package/, and tries it out: a project with nothing but the
# packed client compiles against its types as strictly as can be, and runs. Its dependencies are those
# of this directory's node_modules; the linter sees to it that no others are imported.
set -eu
cd "$(dirname -- "$0")"
rm -rf package
mkdir package
npm pack --silent --pack-destination package >/dev/null
tarball=$(ls package/*.tgz)
trial=$(mktemp -d "$PWD/package/trial-XXXXXX")
trap 'rm -rf "$trial"' EXIT
client=$trial/node_modules/@keyturn/client
mkdir -p "$client"
tar -xzf "$tarball" -C "$client" --strip-components=1
for file in LICENSE README.md package.json dist/index.js dist/index.d.ts dist/gen/keyturn/v1/routing_service_pb.js; do
  test -s "$client/$file" || { echo "$tarball lacks $file" >&2; exit 1; }
done
cat >"$trial/package.json" <<'JSON'
{ "name": "trial", "private": true, "type": "module" }
JSON
cat >"$trial/trial.ts" <<'TS'
import { Client, Outcome, outcomeOf, VERSION } from "@keyturn/client";

const client = new Client({ target: "unix:/nowhere.sock", timeoutMs: 60_000, retries: { attempts: 1 } });
const outcome: Outcome = outcomeOf(401);
const error: unknown = await client.decide({ userId: "u1", provider: "openai" }).catch((failure) => failure);
await client.close();
console.log(VERSION, outcome === Outcome.AUTH_REJECTED, String(error).split(":")[0]);
TS
npx tsc --ignoreConfig --strict --exactOptionalPropertyTypes --noUncheckedIndexedAccess --target es2022 --module nodenext \
  --types node --outDir "$trial" "$trial/trial.ts"
version=$(node -p 'require("./package.json").version')
said=$(cd "$trial" && node trial.js)
test "$said" = "$version true UNAVAILABLE" || { echo "the packed client said: $said" >&2; exit 1; }
echo "$tarball ($(du -k "$tarball" | cut -f1) KiB): compiles and runs"
