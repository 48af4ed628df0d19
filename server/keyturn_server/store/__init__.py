"""PostgreSQL: the one place with SQL and asyncpg."""
