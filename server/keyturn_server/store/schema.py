"""What a schema holds, object by object, and what it should hold.

`schema.json` says what the migrations make: one line for each object of each migration that made,
changed or dropped it. `make schema` writes it, from the migrations applied one after the other to an
empty database, and a test compares the two. So a database is compared with it without writing to it, and
without a second one. Only what reads the same on every supported version of PostgreSQL is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import asyncpg

    from keyturn_server.store.database import Connection


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """One object of a schema."""

    kind: str
    """`table`, `column`, `constraint`, `index`, `trigger`, `function` or `type`."""
    table: str
    """The table it belongs to; empty for a table, a function, a type."""
    name: str
    """A function's with the types of its arguments."""

    def __str__(self) -> str:
        return f"{self.table}.{self.name}" if self.table else self.name


Facts: TypeAlias = Mapping[str, str | bool]
"""What is so about an object; what is empty or false is left out. `of` says what a table is: `table`,
`view`, …"""

_KINDS = {
    "r": "table",
    "p": "partitioned table",
    "v": "view",
    "m": "materialized view",
    "f": "foreign table",
}

_TABLES = """
SELECT relname AS name, relkind::text AS kind FROM pg_class
 WHERE relnamespace = $1::oid AND relkind IN ('r', 'p', 'v', 'm', 'f')
   AND ($2::text[] IS NULL OR relname = ANY ($2))
"""
_COLUMNS = """
SELECT c.relname AS table, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
       a.attnotnull AS is_required, a.attidentity <> '' AS is_identity,
       CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END AS default,
       CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END AS generated
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE c.relnamespace = $1::oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND a.attnum > 0
   AND NOT a.attisdropped AND ($2::text[] IS NULL OR c.relname = ANY ($2))
"""
# NOT NULL, a constraint of its own since PostgreSQL 18, is told with the column.
_CONSTRAINTS = """
SELECT c.relname AS table, o.conname AS name, pg_get_constraintdef(o.oid) AS definition,
       o.convalidated AS is_valid
  FROM pg_constraint o JOIN pg_class c ON c.oid = o.conrelid
 WHERE c.relnamespace = $1::oid AND o.contype IN ('p', 'u', 'f', 'c', 'x')
   AND ($2::text[] IS NULL OR c.relname = ANY ($2))
"""
_INDEXES = """
SELECT c.relname AS table, x.relname AS name, pg_get_indexdef(i.indexrelid, 0, true) AS definition,
       i.indisunique AS is_unique, i.indisvalid AS is_valid
  FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid
 WHERE c.relnamespace = $1::oid AND ($2::text[] IS NULL OR c.relname = ANY ($2))
   AND NOT EXISTS (SELECT FROM pg_constraint o
                    WHERE o.conindid = i.indexrelid AND o.contype IN ('p', 'u', 'x'))
"""
_TRIGGERS = """
SELECT c.relname AS table, t.tgname AS name, pg_get_triggerdef(t.oid, true) AS definition,
       t.tgenabled::text AS enabled
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
 WHERE c.relnamespace = $1::oid AND NOT t.tgisinternal AND ($2::text[] IS NULL OR c.relname = ANY ($2))
"""
_FUNCTIONS = """
SELECT format('%s(%s)', p.proname, oidvectortypes(p.proargtypes)) AS name,
       pg_get_function_identity_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS returns,
       l.lanname AS language, p.provolatile::text AS volatility, p.proisstrict AS is_strict,
       p.prosecdef AS is_security_definer, array_to_string(p.proconfig, ', ') AS settings,
       coalesce(nullif(p.prosrc, ''), pg_get_function_sqlbody(p.oid)) AS body
  FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE p.pronamespace = $1::oid AND ($2::text[] IS NULL OR p.proname = ANY ($2))
"""
_TYPES = """
SELECT t.typname AS name,
       string_agg(format('%s %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum)
       AS definition
  FROM pg_type t
  LEFT JOIN pg_class c ON c.oid = t.typrelid
  LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE t.typnamespace = $1::oid
   AND (c.relkind = 'c' OR (c.oid IS NULL AND t.typelem = 0 AND t.typtype <> 'm'))
   AND ($2::text[] IS NULL OR t.typname = ANY ($2))
 GROUP BY t.oid, t.typname
"""


# Relations share one space of names: tables, indexes, sequences.
_OCCUPIED = """
SELECT c.relname AS name, c.relkind::text AS kind, t.relname AS table FROM pg_class c
  LEFT JOIN pg_index i ON i.indexrelid = c.oid
  LEFT JOIN pg_class t ON t.oid = i.indrelid
 WHERE c.relnamespace = $1::oid AND c.relname = ANY ($2)
"""


async def occupied(connection: Connection, schema: int, names: Collection[str]) -> dict[str, str]:
    """Which of these names tables, indexes and the like have already, and what has them."""
    rows = await connection.fetch(_OCCUPIED, schema, sorted(names))
    return {
        row["name"]: f"an index of {row['table']}"
        if row["table"]
        else f"a {_KINDS.get(row['kind'], 'relation')}"
        for row in rows
    }


async def described(
    connection: Connection, schema: int, *, names: Collection[Name] | None = None
) -> dict[Name, Facts]:
    """The objects of the schema with this oid: all, or the tables, functions and types that go by those
    names, with what belongs to the tables."""

    def asked(*kinds: str) -> list[str] | None:
        if names is None:
            return None
        return sorted({one.name.partition("(")[0] for one in names if one.kind in kinds})

    async def rows(query: str, *kinds: str) -> list[asyncpg.Record]:
        return await connection.fetch(query, schema, asked(*kinds))

    found: dict[Name, Facts] = {}
    for row in await rows(_TABLES, "table"):
        found[Name("table", "", row["name"])] = {"of": _KINDS[row["kind"]]}
    for kind, query in (
        ("column", _COLUMNS),
        ("constraint", _CONSTRAINTS),
        ("index", _INDEXES),
        ("trigger", _TRIGGERS),
    ):
        for row in await rows(query, "table"):
            found[Name(kind, row["table"], row["name"])] = _facts(row)
    for row in await rows(_FUNCTIONS, "function"):
        facts = _facts(row)
        # The text of a body is long, and how it differs is for a diff tool.
        facts["body"] = hashlib.sha256(str(facts["body"]).encode()).hexdigest()[:16]
        found[Name("function", "", row["name"])] = facts
    for row in await rows(_TYPES, "type"):
        found[Name("type", "", row["name"])] = _facts(row)
    return found


def _facts(row: asyncpg.Record) -> dict[str, str | bool]:
    return {name: value for name, value in row.items() if value and name not in {"table", "name"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one migration did to one object."""

    version: int
    name: Name
    facts: Facts | None
    """What it made of it; None: it dropped it."""


def steps_between(version: int, before: Mapping[Name, Facts], after: Mapping[Name, Facts]) -> list[Step]:
    """What a migration did, in a fixed order."""
    return [
        Step(version=version, name=name, facts=after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def as_text(steps: Iterable[Step]) -> str:
    """The contents of `schema.json`."""
    lines = (
        json.dumps([step.version, step.name.kind, step.name.table, step.name.name, step.facts])
        for step in steps
    )
    return "[\n" + ",\n".join(lines) + "\n]\n"


def from_text(text: str) -> list[Step]:
    """What `as_text` wrote."""
    return [
        Step(version=version, name=Name(kind, table, name), facts=facts)
        for version, kind, table, name, facts in json.loads(text)
    ]


def shipped_steps() -> list[Step]:
    """What the migrations of this release make, one after the other."""
    return from_text(resources.files("keyturn_server.store").joinpath("schema.json").read_text("utf-8"))


def expected_at(steps: Iterable[Step], version: int) -> dict[Name, Facts]:
    """The schema after the migrations up to `version`."""
    expected: dict[Name, Facts] = {}
    for step in steps:
        if step.version > version:
            continue
        if step.facts is None:
            expected.pop(step.name, None)
        else:
            expected[step.name] = step.facts
    return expected
