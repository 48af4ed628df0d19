"""A database of a platform that has run for a while, of any size, written by SQL in bulk."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from keyturn.secret import Secret
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import seal
from tests.factories import KEYRING, Connection

_TIMEOUT_SECONDS = 3600.0
_DAYS = 29  # what is closed for 30 days is deleted
_SEALED_AT_ONCE = 20_000

# No triggers: a million rows would announce themselves one by one, and the accounts are written here.
_BEFORE = (
    "SET session_replication_role = replica",
    "SET synchronous_commit = off",
    "SET maintenance_work_mem = '256MB'",
    "SELECT setseed(0.5)",
    "CREATE TEMPORARY TABLE sealed (n int PRIMARY KEY, id uuid, ciphertext text, hint text)",
)
# No rate limits: the same few users are asked about over and over.
_TIER = """
INSERT INTO subscription_tiers (name, rank)
SELECT 'bench', rank FROM subscription_tiers WHERE name = 'premium' ON CONFLICT DO NOTHING
"""
_USERS = """
INSERT INTO users (id, email, subscription_tier)
SELECT 'user-' || lpad(n::text, 9, '0'), 'user-' || n || '@example.com', 'bench'
  FROM generate_series(1, $1::int) n
"""
# Everybody has a key for the provider that is asked about; that of a user who is not opens nothing.
_KEYS = """
INSERT INTO user_api_keys (user_id, id, provider, label, encrypted_key, key_hint, verified_at)
SELECT 'user-' || lpad(n::text, 9, '0'), coalesce(s.id, uuidv7()), 'openai', 'first',
       coalesce(s.ciphertext, $2), coalesce(s.hint, 'none'), now()
  FROM generate_series(1, $1::int) n LEFT JOIN sealed s USING (n)
"""
_MORE_KEYS = """
INSERT INTO user_api_keys (user_id, id, provider, label, encrypted_key, key_hint, verified_at)
SELECT 'user-' || lpad((1 + (n - 1) % $1::int)::text, 9, '0'), uuidv7(), 'anthropic', n::text, $3, 'none',
       now()
  FROM generate_series(1, $2::int) n
"""
# The rows of a user lie all over the table, as they came.
_USES = """
INSERT INTO api_key_usage (
    user_id, id, key_id, provider, model, service_type, mode, reason, endpoint, outcome, input_tokens,
    output_tokens, total_tokens, cost_micros, cost_source, http_status, response_time_ms, key_state,
    is_late, fingerprint, submission_id, created_at)
SELECT 'user-' || lpad((1 + floor(random() * $1))::int::text, 9, '0'), uuidv7(-age), gen_random_uuid(),
       'openai', 'gpt-4o', 'copilot', 'BYOK_FIRST', 'BYOK_FIRST_OWN_KEY', '/v1/chat/completions', 'SUCCESS',
       1180, 412, 1592, n % 1000, 'PRICED', 200, 1800, 'USABLE', false, decode(md5(n::text), 'hex'),
       gen_random_uuid(), now() - age
  FROM (SELECT n, make_interval(secs => n * $3::float8) AS age FROM generate_series($2::int, 1, -1) n) _
"""
# Each settled hold is written with its deduction below; a user in ten has two, and an open one.
_HOLDS = """
INSERT INTO credit_holds (
    user_id, id, request_id, provider, model, service_type, mode, reason, amount_micros, state, created_at,
    expires_at, closed_at, outcome, charged_micros, released_micros, balance_after_micros, cost_source,
    is_late, fingerprint, submission_id)
SELECT 'user-' || lpad((tenth * 10 + 1)::text, 9, '0'), uuidv7(-age), md5(n::text), 'openai', 'gpt-4o',
       'copilot', 'BYOK_FIRST', 'BYOK_FIRST_NO_KEY', 1000, 'settled', now() - age,
       now() - age + interval '10 minutes', now() - age, 'SUCCESS', 700, 300,
       1000000000000 - 700 * (2 - turn), 'PRICED', false, decode(md5(n::text), 'hex'), gen_random_uuid()
  FROM (SELECT turn, tenth, turn::bigint * $1 + tenth * 10 AS n,
               make_interval(secs => (turn * tenths + tenth + 1) * $2::float8) AS age
          FROM (VALUES ((($1::int + 9) / 10))) _ (tenths),
               generate_series(1, 0, -1) turn, generate_series(tenths - 1, 0, -1) tenth) _
"""
_OPEN_HOLDS = """
INSERT INTO credit_holds (
    user_id, id, request_id, provider, model, service_type, mode, reason, amount_micros, state, created_at,
    expires_at)
SELECT 'user-' || lpad((n + 1)::text, 9, '0'), uuidv7(), md5('open' || n), 'openai', 'gpt-4o', 'copilot',
       'BYOK_FIRST', 'BYOK_FIRST_NO_KEY', 1000, 'open', now(), now() + interval '1 day'
  FROM generate_series(0, $1::int - 1, 10) n
"""
_GRANTS = """
INSERT INTO credit_transactions (
    user_id, id, transaction_type, amount_micros, balance_after_micros, created_at)
SELECT id, uuidv7(interval '-30 days'), 'grant', 1000000000000, 1000000000000, now() - interval '30 days'
  FROM users
"""
_DEDUCTIONS = """
INSERT INTO credit_transactions (
    user_id, id, transaction_type, amount_micros, balance_after_micros, service_type, mode, reason, provider,
    model, endpoint, outcome, cost_source, input_tokens, output_tokens, total_tokens, http_status,
    response_time_ms, created_at)
SELECT user_id, id, 'deduction', -charged_micros, balance_after_micros, service_type, mode, reason, provider,
       model, '/v1/chat/completions', outcome, cost_source, 1180, 412, 1592, 200, 1800, created_at
  FROM credit_holds WHERE state = 'settled' ORDER BY created_at
"""
_ACCOUNTS = """
INSERT INTO credit_accounts (user_id, balance_micros, held_micros)
SELECT t.user_id, t.balance, coalesce(h.held, 0)
  FROM (SELECT user_id, sum(amount_micros) AS balance FROM credit_transactions GROUP BY user_id) t
  LEFT JOIN (SELECT user_id, sum(amount_micros) AS held
               FROM credit_holds WHERE state = 'open' GROUP BY user_id) h USING (user_id)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """How much there is of everything."""

    users: int
    keys: int
    """Each user has one at the least."""
    usage_rows: int

    def some_users(self, count: int) -> list[int]:
        """The numbers of so many users, or of all where there are fewer, from all over the table; always
        the same ones."""
        return random.Random(5).sample(range(1, self.users + 1), min(count, self.users))

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.keys:,} keys, {self.usage_rows:,} usage rows"


def id_of(user: int) -> str:
    """The id of the user with this number."""
    return f"user-{user:09}"


async def fill(connection: Connection, population: Population, *, opened: Sequence[int]) -> None:
    """Writes the population into an empty database, with keys that open for the users `opened` alone, and
    leaves it as if it had been vacuumed and analyzed last night."""
    users = population.users
    for sql in _BEFORE:
        await connection.execute(sql)
    await connection.execute(_TIER)
    filler = _sealed(0)[2]
    for start in range(0, len(opened), _SEALED_AT_ONCE):
        rows = [_sealed(user) for user in opened[start : start + _SEALED_AT_ONCE]]
        await connection.copy_records_to_table("sealed", records=rows)
    await connection.execute("ANALYZE sealed")
    # A primary key over rows in no order is made faster after them than with them.
    await connection.execute("ALTER TABLE api_key_usage DROP CONSTRAINT api_key_usage_pkey")
    statements: tuple[tuple[str, tuple[object, ...]], ...] = (
        (_USERS, (users,)),
        (_KEYS, (users, filler)),
        (_MORE_KEYS, (users, population.keys - users, filler)),
        (_USES, (users, population.usage_rows, _DAYS * 86_400 / max(population.usage_rows, 1))),
        ("ALTER TABLE api_key_usage ADD PRIMARY KEY (user_id, id)", ()),
        (_HOLDS, (users, _DAYS * 86_400 / (users / 5 + 4))),
        (_OPEN_HOLDS, (users,)),
        (_GRANTS, ()),
        (_DEDUCTIONS, ()),
        (_ACCOUNTS, ()),
        ("VACUUM (ANALYZE)", ()),
        ("CHECKPOINT", ()),
    )
    for sql, arguments in statements:
        await connection.execute(sql, *arguments, timeout=_TIMEOUT_SECONDS)


def _sealed(user: int) -> tuple[int, object, str, str]:
    """A row of `sealed`: a key of the user, as it rests."""
    key_id = new_id()
    text = f"sk-proj-{secrets.token_urlsafe(48)}"
    ciphertext = seal(KEYRING, Secret(text), user_id=id_of(user), provider="openai", row_id=key_id)
    return user, key_id, ciphertext, text[-4:]
