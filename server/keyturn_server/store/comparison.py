"""A schema beside what the migrations make of it: what is missing, what differs, what is in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from keyturn_server.store.schema import Facts, Name


class Severity(StrEnum):
    """What a finding means for a sidecar on this database."""

    PROBLEM = "problem"
    """It does not work, or works wrongly."""
    WARNING = "warning"
    """It works; somebody should look at it."""
    OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    severity: Severity
    subject: str
    """What it is about: a column, a setting, a migration."""
    message: str
    remedy: str = ""
    """What to do about it, where that can be said."""


def problem(subject: str, message: str, remedy: str = "") -> Finding:
    return Finding(severity=Severity.PROBLEM, subject=subject, message=message, remedy=remedy)


def warning(subject: str, message: str, remedy: str = "") -> Finding:
    return Finding(severity=Severity.WARNING, subject=subject, message=message, remedy=remedy)


def fine(subject: str, message: str) -> Finding:
    return Finding(severity=Severity.OK, subject=subject, message=message)


OWN_SCHEMA = (
    "Give Keyturn a schema of its own: CREATE SCHEMA keyturn, and ?options=-csearch_path%3Dkeyturn at the "
    "end of KEYTURN_DATABASE_URL."
)

# What we need, and what does as well.
_DOES_AS_WELL = {("text", "character varying"), ("text", "citext"), ("integer", "bigint")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a schema holds, beside what the migrations that were applied to it made, and what those that
    were not are going to make."""

    now: Mapping[Name, Facts]
    """What it should hold."""
    then: Mapping[Name, Facts]
    """What it should hold after all migrations."""
    found: Mapping[Name, Facts]
    """What it holds of these tables, functions and types."""
    occupied: Mapping[str, str]
    """What has the names that coming tables and indexes are to have."""
    made_by: Mapping[Name, str]
    """The migration that makes each object, for people."""

    def findings(self) -> Iterator[Finding]:
        """Everything worth telling, table by table."""
        for name in sorted(self.now.keys() | self.then.keys()):
            if name.kind == "table":
                yield from self._table(name)
            elif not name.table:
                yield from self._apart(name)

    def _apart(self, name: Name) -> Iterator[Finding]:
        """A function or a type."""
        have = self.found.get(name)
        if name not in self.now:
            if have is not None:
                yield self._in_the_way(name, f"a {name.kind}")
        elif have is None:
            yield problem(str(name), f"The {name.kind} is missing{self._made(name)}.", self._again(name))
        elif have != self.now[name]:
            yield problem(
                str(name), f"The {name.kind} is not what {self.made_by[name]} made.", self._again(name)
            )

    def _table(self, table: Name) -> Iterator[Finding]:
        have = self.found.get(table)
        if table not in self.now:
            if (what := self.occupied.get(table.name)) is not None:
                yield self._in_the_way(table, what)
                yield from self._columns(table, self.then)
            for name in self._of(table, "index"):
                if name in self.then and name.name in self.occupied:
                    yield self._in_the_way(name, self.occupied[name.name])
            return
        if have is None:
            yield problem(
                table.name, f"The table is missing{self._made(table)}.", "Restore it from a backup."
            )
            return
        if have != self.now[table]:
            yield problem(table.name, f"It is a {have['of']}; Keyturn needs a table.")
            return
        yield from self._columns(table, self.now)
        for kind, compare in (
            ("constraint", self._constraint),
            ("index", self._index),
            ("trigger", self._trigger),
        ):
            for name in self._of(table, kind):
                if name not in self.now and name in self.then:
                    if name in self.found or (kind == "index" and name.name in self.occupied):
                        yield self._in_the_way(name, self.occupied.get(name.name, f"a {kind}"))
                elif name in self.now and name not in self.then and name not in self.found:
                    yield problem(
                        str(name),
                        f"The {kind} is missing{self._made(name)}, and a coming migration drops it.",
                        _statement(name, self.now[name]),
                    )
                else:
                    yield from compare(name, self.now.get(name), self.found.get(name))

    def _of(self, table: Name, kind: str) -> list[Name]:
        everything = self.now.keys() | self.then.keys() | self.found.keys()
        return sorted(one for one in everything if (one.kind, one.table) == (kind, table.name))

    def _columns(self, table: Name, needed: Mapping[Name, Facts]) -> Iterator[Finding]:
        for name in self._of(table, "column"):
            want, have = needed.get(name), self.found.get(name)
            if want is not None and have is not None:
                yield from _column(name, want, have)
            elif want is not None:
                yield problem(
                    str(name),
                    f"The column is missing; Keyturn needs it as {want['type']}.",
                    _statement(name, want) if table in self.now else "",
                )
            elif have is not None and name in self.then:
                yield self._in_the_way(name, "a column")
            elif have is not None:
                yield from _extra_column(name, have)

    def _constraint(self, name: Name, want: Facts | None, have: Facts | None) -> Iterator[Finding]:
        if want is None and have is not None:
            yield warning(
                str(name), f"An extra constraint may refuse what Keyturn writes: {have['definition']}."
            )
        elif want is not None and have is None:
            yield problem(
                str(name), f"The constraint is missing: {want['definition']}.", _statement(name, want)
            )
        elif want is not None and have is not None:
            if have.get("definition") != want.get("definition"):
                yield problem(
                    str(name), f"The constraint is {have['definition']}; Keyturn needs {want['definition']}."
                )
            elif not have.get("is_valid"):
                yield warning(
                    str(name),
                    "Older rows were never held against the constraint.",
                    f"ALTER TABLE {name.table} VALIDATE CONSTRAINT {name.name}",
                )

    def _index(self, name: Name, want: Facts | None, have: Facts | None) -> Iterator[Finding]:
        if want is None and have is not None:
            if have.get("is_unique"):
                yield warning(
                    str(name), f"An extra unique index may refuse what Keyturn writes: {have['definition']}."
                )
            else:
                yield fine(str(name), "An extra index; harmless.")
        elif want is not None and have is None:
            kind = problem if want.get("is_unique") else warning
            yield kind(
                str(name),
                "The index is missing: "
                + (
                    "twins are not refused."
                    if want.get("is_unique")
                    else "what it is for gets slower with every row."
                ),
                _statement(name, want),
            )
        elif want is not None and have is not None:
            if have.get("definition") != want.get("definition"):
                kind = problem if want.get("is_unique") else warning
                yield kind(
                    str(name), f"The index is {have['definition']}; Keyturn needs {want['definition']}."
                )
            elif not have.get("is_valid"):
                yield problem(
                    str(name),
                    "The index is not valid: making it was interrupted.",
                    f"REINDEX INDEX {name.name}",
                )

    def _trigger(self, name: Name, want: Facts | None, have: Facts | None) -> Iterator[Finding]:
        if want is None and have is not None:
            yield warning(
                str(name), f"An extra trigger runs with Keyturn's statements: {have['definition']}."
            )
        elif want is not None and have is None:
            yield problem(str(name), f"The trigger is missing{self._made(name)}.", _statement(name, want))
        elif want is not None and have is not None:
            if have.get("definition") != want.get("definition"):
                yield problem(
                    str(name), f"The trigger is {have['definition']}; Keyturn needs {want['definition']}."
                )
            elif have.get("enabled") not in {"O", "A"}:
                yield problem(
                    str(name),
                    "The trigger is disabled.",
                    f"ALTER TABLE {name.table} ENABLE TRIGGER {name.name}",
                )

    def _in_the_way(self, name: Name, what: str) -> Finding:
        return problem(
            str(name),
            f"There is {what} of this name, and {self.made_by[name]} makes its own: it would fail.",
            OWN_SCHEMA if not name.table else "",
        )

    def _made(self, name: Name) -> str:
        return f", which {self.made_by[name]} made"

    def _again(self, name: Name) -> str:
        file = self.made_by[name].removeprefix("migration ").replace(" (", "_").replace(")", ".sql")
        return f"Run its CREATE statement of store/migrations/{file} again."


def _column(name: Name, want: Facts, have: Facts) -> Iterator[Finding]:
    if have["type"] != want["type"]:
        base = str(have["type"]).partition("(")[0]
        if (want["type"], base) in _DOES_AS_WELL:
            yield warning(str(name), f"It is {have['type']}; Keyturn makes it {want['type']}.")
        else:
            yield problem(str(name), f"It is {have['type']}; Keyturn needs {want['type']}.")
    if want.get("generated") != have.get("generated"):
        is_generated = want.get("generated")
        yield problem(
            str(name),
            f"It must be generated, as {_in_one_line(is_generated)}."
            if is_generated
            else "It is generated; Keyturn writes to it.",
        )
    elif want.get("is_identity") and not have.get("is_identity"):
        yield problem(str(name), "It must be an identity column: nobody fills it in.")
    elif have.get("is_required") and not want.get("is_required") and "default" not in have:
        yield problem(str(name), "It is NOT NULL; Keyturn may leave it empty.")
    elif want.get("is_required") and not have.get("is_required"):
        yield warning(
            str(name),
            "It may be NULL; Keyturn relies on a value.",
            f"ALTER TABLE {name.table} ALTER COLUMN {name.name} SET NOT NULL",
        )
    if want.get("default") != have.get("default") and not want.get("generated"):
        if "default" not in want:
            yield fine(str(name), f"An extra default; harmless: {have['default']}.")
        else:
            kind = warning if "default" in have or not have.get("is_required") else problem
            yield kind(
                str(name),
                f"Its default is {have.get('default', 'missing')}; Keyturn relies on {want['default']}.",
                f"ALTER TABLE {name.table} ALTER COLUMN {name.name} SET DEFAULT {want['default']}",
            )


def _extra_column(name: Name, have: Facts) -> Iterator[Finding]:
    if have.get("is_required") and not {"default", "generated", "is_identity"} & have.keys():
        yield problem(
            str(name), "An extra column that is NOT NULL and has no default: Keyturn's inserts would fail."
        )
    else:
        yield fine(str(name), "An extra column; harmless.")


def _statement(name: Name, want: Facts) -> str:
    """SQL that makes what is missing."""
    match name.kind:
        case "index" | "trigger":
            return str(want["definition"])
        case "constraint":
            return f"ALTER TABLE {name.table} ADD CONSTRAINT {name.name} {want['definition']}"
        case _:
            rest = (
                f" GENERATED ALWAYS AS ({_in_one_line(want['generated'])}) STORED"
                if "generated" in want
                else ""
            )
            rest += f" DEFAULT {want['default']}" if "default" in want else ""
            rest += " NOT NULL" if want.get("is_required") else ""
            return f"ALTER TABLE {name.table} ADD COLUMN {name.name} {want['type']}{rest}"


def _in_one_line(text: object) -> str:
    return " ".join(str(text).split())
