"""The access file: what it takes, and what it says of what it does not take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from keyturn_server.access import Caller, Role
from keyturn_server.access_file import AccessFileError, Callers, digest_of, entry_of, new_token, parse_callers
from keyturn_server.watched import File, UnreadableFile, Watched, read_file
from tests.support import temporary_directory

DIGEST = digest_of("kta_a-token").hex()


def parse(text: str | bytes, *, mode: int = 0o600, owner: int = 0) -> Callers:
    contents = text if isinstance(text, bytes) else text.encode()
    return parse_callers(File(path=Path("/etc/access.toml"), mode=mode, owner=owner, contents=contents))


def entry(**fields: str) -> str:
    """An entry of which some fields are other ones; an empty one is left out."""
    good = {"name": '"web"', "roles": '["gateway"]', "token_sha256": f'"{DIGEST}"'} | fields
    return "[[callers]]\n" + "".join(f"{key} = {value}\n" for key, value in good.items() if value)


def test_a_caller_is_found_by_each_token_and_each_name_of_its_certificates() -> None:
    other = digest_of("kta_other")
    callers = parse(
        entry(
            roles='["gateway", "viewer"]',
            token_sha256=f'["{DIGEST.upper()}", "{other.hex()}"]',
            certificates='["spiffe://example.com/ns/x/sa/web-1", "web.example.com", "localhost"]',
        )
        + entry(name='"ops"', roles='["operator"]', token_sha256="", certificates='"ops.example.com"')
    )
    web = frozenset({Role.GATEWAY, Role.VIEWER})
    assert callers.by_token == dict.fromkeys((bytes.fromhex(DIGEST), other), Caller("token:web", web))
    assert callers.by_spiffe_id == {"spiffe://example.com/ns/x/sa/web-1": Caller("cert:web", web)}
    assert callers.by_dns_name == {
        **dict.fromkeys(("web.example.com", "localhost"), Caller("cert:web", web)),
        "ops.example.com": Caller("cert:ops", frozenset({Role.OPERATOR})),
    }


SECRET = "kta_Zm9vYmFyZm9vYmFyZm9vYmFyZm9vYmFyZm9vYmFyZm8"
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "callers: at least one [[callers]] entry is due"),
    "no entries": ("callers = []", "callers: at least one"),
    "no table": ("callers = [1]", "callers[1]: has to be a table"),
    "no TOML": ("[[callers]\n", "is not TOML"),
    "a number of 5000 digits": (f"x = {'7' * 5000}", "has a value that is too long or too deep"),
    "lists in lists": ("x = " + "[" * 50_000, "has a value that is too long or too deep"),
    "no UTF-8": (b"\xff", "is not UTF-8"),
    "another key above": ("version = 1\n" + entry(), "'version' is not known here"),
    "another key": (entry(role='"gateway"'), "callers[1] (web): 'role' is not known here"),
    "a token as key": (entry(**{f'"{SECRET}"': "1"}), "callers[1] (web): a key is not known here"),
    "no name": (entry(name=""), "callers[1].name: 1 to 64"),
    "an empty name": (entry(name='""'), "callers[1].name: 1 to 64"),
    "a long name": (entry(name=f'"{"x" * 65}"'), "callers[1].name: 1 to 64"),
    "a name with a line": (entry(name='"a\\nb"'), "callers[1].name"),
    "a number as name": (entry(name="7"), "callers[1].name"),
    "no roles": (
        entry(roles=""),
        "callers[1] (web).roles: a list of at least one of gateway, operator, viewer",
    ),
    "an empty list of roles": (entry(roles="[]"), "callers[1] (web).roles"),
    "an unknown role": (entry(roles='["gateway", "admin"]'), "callers[1] (web).roles"),
    "a role in capitals": (entry(roles='["GATEWAY"]'), "callers[1] (web).roles"),
    "a role alone": (entry(roles='"gateway"'), "callers[1] (web).roles"),
    "a list as role": (entry(roles='[["gateway"]]'), "callers[1] (web).roles"),
    "neither": (entry(token_sha256=""), "callers[1] (web): token_sha256 or certificates is due"),
    "empty lists": (entry(token_sha256="[]", certificates="[]"), "token_sha256 or certificates is due"),
    "the token itself": (entry(token_sha256=f'"{SECRET}"'), "not the token itself"),
    "half a hash": (entry(token_sha256=f'"{DIGEST[:32]}"'), "callers[1] (web).token_sha256[1]"),
    "a number as hash": (entry(token_sha256="7"), "callers[1] (web).token_sha256: has to be a string"),
    "a number among hashes": (entry(token_sha256=f'["{DIGEST}", 7]'), "callers[1] (web).token_sha256"),
    "the same name": (entry() + entry(token_sha256=f'"{"a" * 64}"'), "callers[2] (web).name: another entry"),
    "the same token": (
        entry() + entry(name='"b"'),
        "callers[2] (b).token_sha256[1]: stands in the file before",
    ),
    "the same token in other letters": (
        entry(token_sha256=f'["{DIGEST}", "{DIGEST.upper()}"]'),
        "callers[1] (web).token_sha256[2]: stands in the file before",
    ),
    "the same certificate": (
        entry(certificates='"x.example.com"')
        + entry(name='"b"', token_sha256="", certificates='"x.example.com"'),
        "callers[2] (b).certificates[1]: stands in the file before",
    ),
    **{
        f"certificate {name}": (
            entry(certificates=f'"{name}"'),
            "callers[1] (web).certificates[1]: has to be a SPIFFE ID",
        )
        for name in (
            "",
            "*.example.com",
            "Web.example.com",
            "web.example.com.",
            "-web.example.com",
            "web..example.com",
            "CN=web",
            "spiffe://example.com",
            "spiffe://example.com/",
            "spiffe://example.com/a/",
            "spiffe://example.com//a",
            "spiffe://example.com/a/../b",
            "spiffe://Example.com/a",
            "spiffe://user@example.com/a",
            "spiffe://example.com/a?b",
            "spiffe:example.com/a",
            "https://example.com/a",
            "x" * 300,
        )
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_by_its_entry_and_field(case: str) -> None:
    text, reason = REFUSED[case]
    with pytest.raises(AccessFileError) as caught:
        parse(text)
    said = str(caught.value)
    assert said.startswith("/etc/access.toml: ")
    assert reason in said
    assert "Zm9v" not in said, "no value is quoted: it may be a secret"
    assert "\n" not in said


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(AccessFileError) as caught:
        parse(entry(name="7", roles="[]", token_sha256="7") + entry(extra="1"))
    for place in ("callers[1].name", "callers[1].roles", "callers[1].token_sha256", "'extra'"):
        assert place in str(caught.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
def test_a_file_that_others_can_write_is_refused(mode: int) -> None:
    with pytest.raises(AccessFileError, match=r"others can write it\. Run: chmod go-w /etc/access\.toml"):
        parse(entry(), mode=mode)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o644, 0o444])
def test_a_file_that_others_can_only_read_is_fine(mode: int) -> None:
    assert parse(entry(), mode=mode).by_token


def test_a_file_is_taken_from_root_and_the_sidecars_own_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    assert parse(entry(), owner=0).by_token
    assert parse(entry(), owner=10001).by_token
    reason = r"is owned by another user, .*\. Run: chown 10001 /etc/access\.toml"
    with pytest.raises(AccessFileError, match=reason):
        parse(entry(), owner=10002)


async def test_the_owner_of_a_file_is_seen() -> None:
    async with temporary_directory() as directory:
        (directory / "file").touch()
        assert read_file(directory / "file").owner == (directory / "file").stat().st_uid


def test_a_new_token_is_taken_with_its_entry_which_does_not_show_it() -> None:
    tokens = [new_token().reveal() for _ in range(50)]
    assert len(set(tokens)) == 50
    made = new_token()
    entry = entry_of("web", [Role.VIEWER, Role.GATEWAY, Role.VIEWER], made)
    assert made.reveal() not in entry
    assert made.reveal().startswith("kta_")
    assert len(made.reveal()) == len("kta_") + 43
    caller = Caller("token:web", frozenset({Role.GATEWAY, Role.VIEWER}))
    assert parse(entry).by_token == {digest_of(made.reveal()): caller}
    for name in ("", "we b", 'x"\nroles = []', "x" * 65):
        with pytest.raises(AccessFileError, match="name: 1 to 64"):
            entry_of(name, [Role.VIEWER], made)


async def test_files_that_are_none_are_refused() -> None:
    async with temporary_directory() as directory:
        (directory / "folder").mkdir()
        (directory / "large").write_bytes(bytes(1024 * 1024 + 1))
        (directory / "loop").symlink_to("loop")
        for name, reason in {
            "none": "cannot be read: No such file",
            "folder": "cannot be read|is no file",
            "large": "is over 1048576 bytes",
            "loop": "cannot be read",
        }.items():
            with pytest.raises(UnreadableFile, match=reason):
                read_file(directory / name)


async def test_a_change_of_size_and_time_zero_is_seen() -> None:
    """What is looked at is what is in the file: times and sizes may stay the same."""
    async with temporary_directory() as directory:
        path = directory / "file"
        path.write_text("one")
        watched = Watched([path], lambda files: files[0].contents)
        facts = path.stat()
        assert not watched.refresh()
        path.write_text("two")
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert watched.refresh()
        assert watched.value == b"two"
        assert not watched.refresh()


async def test_files_that_were_refused_are_taken_once_they_become_good() -> None:
    def parsed(_: object) -> str:
        if refusing:
            raise AccessFileError("not yet")
        return "taken"

    refusing = False
    async with temporary_directory() as directory:
        path = directory / "file"
        path.write_text("one")
        watched = Watched([path], parsed)
        refusing = True
        path.write_text("two")
        with pytest.raises(AccessFileError):
            watched.refresh()
        assert not watched.refresh()
        refusing = False
        assert watched.refresh()
        assert not watched.refresh()


async def test_a_fault_is_raised_once_and_the_value_stays() -> None:
    def parsed(files: object) -> bytes:
        contents = path.read_bytes()
        if contents == b"bad":
            raise AccessFileError("bad")
        return contents

    async with temporary_directory() as directory:
        path = directory / "file"
        path.write_text("good")
        watched = Watched([path], parsed)
        path.write_text("bad")
        with pytest.raises(AccessFileError):
            watched.refresh()
        assert not watched.refresh()
        path.unlink()
        with pytest.raises(UnreadableFile):
            watched.refresh()
        assert not watched.refresh()
        assert watched.value == b"good"
        path.write_text("good")
        assert watched.refresh(), "it is the same again, and in force: that is news"
