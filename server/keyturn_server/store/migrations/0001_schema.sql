-- The tables that operators query and products write to.
-- Money is bigint micro-USD; the *_cents columns that people query are generated from it, so that no
-- NUMERIC is ever written from outside (NUMERIC takes NaN, and NaN is infinite money).
-- Every hot table's primary key leads with user_id.

CREATE TABLE subscription_tiers (
    name                text PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 64),
    rank                integer NOT NULL,
    requests_per_minute integer CHECK (requests_per_minute > 0),
    requests_per_day    integer CHECK (requests_per_day > 0),
    created_at          timestamptz NOT NULL DEFAULT now(),
    updated_at          timestamptz NOT NULL DEFAULT now()
);
COMMENT ON COLUMN subscription_tiers.requests_per_minute IS 'On the credits path; NULL: no limit';

INSERT INTO subscription_tiers (name, rank, requests_per_minute, requests_per_day) VALUES
    ('community',  0,  120,   5000),
    ('free',      10,  300,  10000),
    ('subscriber', 20, 1200, 100000),
    ('premium',   30, 6000,   NULL),
    ('lifetime',  40, 6000,   NULL);

CREATE TABLE users (
    id                text PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 128),
    email             text,
    -- No foreign key: a tier that nobody has described yet is not eligible, and no error.
    subscription_tier text NOT NULL DEFAULT 'free',
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE feature_flags (
    key         text PRIMARY KEY CHECK (length(key) BETWEEN 1 AND 128),
    name        text NOT NULL,
    description text NOT NULL DEFAULT '',
    category    text NOT NULL DEFAULT 'byok',
    is_enabled  boolean NOT NULL,
    is_premium  boolean NOT NULL DEFAULT false,
    min_tier    text,
    sort_order  integer NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);

INSERT INTO feature_flags (key, name, description, is_enabled, is_premium, min_tier, sort_order) VALUES
    ('byok_enabled', 'Own keys', 'Users at or above min_tier may use their own provider keys.',
     true, true, 'premium', 10),
    ('byok_uses_internal_credits', 'Credits first', 'Credits pay first, own keys when they run out.',
     false, false, NULL, 20),
    ('byok_only_mode', 'Own keys only', 'Internal credits are never used.',
     false, false, NULL, 30);

CREATE TABLE feature_flag_changes (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key        text NOT NULL,
    old_value  jsonb,
    new_value  jsonb,
    changed_by text NOT NULL,
    reason     text NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX feature_flag_changes_by_key ON feature_flag_changes (key, id);

CREATE TABLE api_providers (
    id          text PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 64),
    name        text NOT NULL,
    is_enabled  boolean NOT NULL DEFAULT true,
    base_url    text NOT NULL,
    auth_header text NOT NULL DEFAULT 'Authorization',
    auth_prefix text NOT NULL DEFAULT 'Bearer ',
    key_pattern text NOT NULL DEFAULT '^\S{8,512}$',
    sort_order  integer NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON COLUMN api_providers.key_pattern IS 'A key that does not match is refused before it is tried';

INSERT INTO api_providers (id, name, base_url, auth_header, auth_prefix, key_pattern, sort_order) VALUES
    ('openai',     'OpenAI',       'https://api.openai.com/v1',              'Authorization',  'Bearer ', '^sk-[A-Za-z0-9_-]{16,255}$', 10),
    ('anthropic',  'Anthropic',    'https://api.anthropic.com/v1',           'x-api-key',      '',        '^sk-ant-[A-Za-z0-9_-]{16,255}$', 20),
    ('google',     'Google Gemini','https://generativelanguage.googleapis.com/v1beta', 'x-goog-api-key', '', '^[A-Za-z0-9_.-]{20,255}$', 30),
    ('mistral',    'Mistral',      'https://api.mistral.ai/v1',              'Authorization',  'Bearer ', '^[A-Za-z0-9]{16,255}$', 40),
    ('groq',       'Groq',         'https://api.groq.com/openai/v1',         'Authorization',  'Bearer ', '^gsk_[A-Za-z0-9]{16,255}$', 50),
    ('xai',        'xAI',          'https://api.x.ai/v1',                    'Authorization',  'Bearer ', '^xai-[A-Za-z0-9]{16,255}$', 60),
    ('deepseek',   'DeepSeek',     'https://api.deepseek.com',               'Authorization',  'Bearer ', '^sk-[A-Za-z0-9]{16,255}$', 70),
    ('openrouter', 'OpenRouter',   'https://openrouter.ai/api/v1',           'Authorization',  'Bearer ', '^sk-or-[A-Za-z0-9-]{16,255}$', 80),
    ('together',   'Together AI',  'https://api.together.xyz/v1',            'Authorization',  'Bearer ', '^[A-Za-z0-9_-]{16,255}$', 90),
    ('fireworks',  'Fireworks AI', 'https://api.fireworks.ai/inference/v1',  'Authorization',  'Bearer ', '^[A-Za-z0-9_-]{16,255}$', 100),
    ('cohere',     'Cohere',       'https://api.cohere.com/v2',              'Authorization',  'Bearer ', '^[A-Za-z0-9_-]{16,255}$', 110),
    ('perplexity', 'Perplexity',   'https://api.perplexity.ai',              'Authorization',  'Bearer ', '^pplx-[A-Za-z0-9]{16,255}$', 120);

CREATE TABLE user_api_keys (
    user_id        text NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    id             uuid NOT NULL,
    provider       text NOT NULL REFERENCES api_providers (id),
    label          text NOT NULL DEFAULT '' CHECK (length(label) <= 128),
    priority       integer NOT NULL DEFAULT 0,
    encrypted_key  text NOT NULL,
    key_hint       text NOT NULL DEFAULT '' CHECK (length(key_hint) <= 4),
    -- Counts the secrets this row has held: the outcome of a request made with an earlier one
    -- says nothing about the present one.
    revision       integer NOT NULL DEFAULT 1,
    is_active      boolean NOT NULL DEFAULT true,
    is_valid       boolean NOT NULL DEFAULT true,
    verified_at    timestamptz,
    last_error     text,
    last_error_at  timestamptz,
    cooldown_until timestamptz,
    total_requests bigint NOT NULL DEFAULT 0,
    total_tokens   bigint NOT NULL DEFAULT 0,
    last_used_at   timestamptz,
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id),
    UNIQUE (user_id, provider, label)
) WITH (fillfactor = 80);
COMMENT ON COLUMN user_api_keys.priority IS 'Lower comes first';

-- Under which master key a ciphertext rests: its fingerprint, or 'legacy' for the format without one.
CREATE FUNCTION keyturn_master_key_id(ciphertext text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE WHEN ciphertext LIKE 'v1.%' THEN split_part(ciphertext, '.', 2) ELSE 'legacy' END;

CREATE INDEX user_api_keys_by_master_key ON user_api_keys (keyturn_master_key_id(encrypted_key));

CREATE TABLE api_key_usage (
    user_id              text NOT NULL,
    -- The id of the decision: one decision settles at most once.
    id                   uuid NOT NULL,
    key_id               uuid NOT NULL,
    provider             text NOT NULL,
    model                text NOT NULL,
    service_type         text NOT NULL,
    -- Why the own key paid: the policy's mode and reason at the decision.
    mode                 text NOT NULL,
    reason               text NOT NULL,
    endpoint             text NOT NULL,
    outcome              text NOT NULL,
    input_tokens         bigint,
    output_tokens        bigint,
    cache_read_tokens    bigint,
    cache_write_tokens   bigint,
    total_tokens         bigint,
    cost_micros          bigint CHECK (cost_micros >= 0),
    estimated_cost_cents numeric GENERATED ALWAYS AS (cost_micros::numeric / 10000) STORED,
    cost_source          text NOT NULL,
    http_status          integer,
    response_time_ms     bigint,
    error_message        text,
    key_state            text NOT NULL,
    is_late              boolean NOT NULL,
    fingerprint          bytea NOT NULL,
    submission_id        uuid NOT NULL,
    created_at           timestamptz NOT NULL,
    PRIMARY KEY (user_id, id)
);
COMMENT ON COLUMN api_key_usage.total_tokens IS 'NULL: not reported, which is not zero';
CREATE INDEX api_key_usage_by_time ON api_key_usage USING brin (created_at);

-- No foreign key: the books of a user who was deleted stay.
CREATE TABLE credit_accounts (
    user_id        text PRIMARY KEY,
    balance_micros bigint NOT NULL DEFAULT 0,
    held_micros    bigint NOT NULL DEFAULT 0 CHECK (held_micros >= 0),
    created_at     timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

CREATE TABLE credit_holds (
    user_id              text NOT NULL,
    -- The id of the decision.
    id                   uuid NOT NULL,
    request_id           text CHECK (length(request_id) BETWEEN 1 AND 128),
    provider             text NOT NULL,
    model                text NOT NULL,
    service_type         text NOT NULL,
    -- Why credits paid: the policy's mode and reason at the decision.
    mode                 text NOT NULL,
    reason               text NOT NULL,
    amount_micros        bigint NOT NULL CHECK (amount_micros >= 0),
    state                text NOT NULL CHECK (state IN ('open', 'settled', 'expired')),
    created_at           timestamptz NOT NULL,
    expires_at           timestamptz NOT NULL,
    closed_at            timestamptz,
    -- The answer to its Record, for a replay.
    outcome              text,
    charged_micros       bigint CHECK (charged_micros >= 0),
    released_micros      bigint,
    balance_after_micros bigint,
    cost_source          text,
    is_late              boolean,
    fingerprint          bytea,
    submission_id        uuid,
    PRIMARY KEY (user_id, id),
    CHECK ((state = 'settled') = (fingerprint IS NOT NULL))
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX credit_holds_by_request ON credit_holds (user_id, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX credit_holds_open ON credit_holds (user_id, expires_at) WHERE state = 'open';
CREATE INDEX credit_holds_by_expiry ON credit_holds (expires_at) WHERE state = 'open';
CREATE INDEX credit_holds_closed ON credit_holds (closed_at) WHERE state <> 'open';

CREATE TABLE credit_transactions (
    user_id              text NOT NULL,
    id                   uuid NOT NULL,
    transaction_type     text NOT NULL CHECK (transaction_type IN ('grant', 'deduction')),
    -- What it adds to the balance: below zero for a deduction.
    amount_micros        bigint NOT NULL,
    balance_after_micros bigint NOT NULL,
    cost_cents           numeric GENERATED ALWAYS AS
                         (CASE WHEN transaction_type = 'deduction' THEN -amount_micros::numeric / 10000 ELSE 0 END) STORED,
    balance_after        numeric GENERATED ALWAYS AS (balance_after_micros::numeric / 10000) STORED,
    request_id           text CHECK (length(request_id) BETWEEN 1 AND 128),
    description          text NOT NULL DEFAULT '',
    service_type         text NOT NULL DEFAULT '',
    mode                 text,
    reason               text,
    provider             text NOT NULL DEFAULT '',
    model                text NOT NULL DEFAULT '',
    endpoint             text NOT NULL DEFAULT '',
    outcome              text,
    cost_source          text,
    input_tokens         bigint,
    output_tokens        bigint,
    cache_read_tokens    bigint,
    cache_write_tokens   bigint,
    total_tokens         bigint,
    http_status          integer,
    response_time_ms     bigint,
    error_message        text,
    is_late              boolean NOT NULL DEFAULT false,
    created_at           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id)
);
COMMENT ON COLUMN credit_transactions.balance_after IS 'Cents, like cost_cents';
CREATE UNIQUE INDEX credit_transactions_by_request ON credit_transactions (user_id, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX credit_transactions_by_time ON credit_transactions USING brin (created_at);

CREATE TABLE handle_redemptions (
    user_id     text NOT NULL,
    decision_id uuid NOT NULL,
    expires_at  timestamptz NOT NULL,
    redeemed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, decision_id)
);
CREATE INDEX handle_redemptions_by_expiry ON handle_redemptions (expires_at);

-- An operator's own price of a model; it wins over the built-in price list.
CREATE TABLE model_prices (
    provider                    text NOT NULL REFERENCES api_providers (id),
    model                       text NOT NULL CHECK (length(model) BETWEEN 1 AND 256),
    input_micros_per_mtok       bigint NOT NULL CHECK (input_micros_per_mtok BETWEEN 0 AND 1000000000000),
    output_micros_per_mtok      bigint NOT NULL CHECK (output_micros_per_mtok BETWEEN 0 AND 1000000000000),
    cache_read_micros_per_mtok  bigint CHECK (cache_read_micros_per_mtok BETWEEN 0 AND 1000000000000),
    cache_write_micros_per_mtok bigint CHECK (cache_write_micros_per_mtok BETWEEN 0 AND 1000000000000),
    created_at                  timestamptz NOT NULL DEFAULT now(),
    updated_at                  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, model)
);
COMMENT ON TABLE model_prices IS 'Micro-USD per million tokens: 2500000 is $2.50 a million. NULL cache rates: the input rate';

-- What handles and tickets are sealed under, the same for every sidecar on this database.
CREATE TABLE token_roots (
    id         bytea PRIMARY KEY CHECK (length(id) = 4),
    secret     bytea NOT NULL CHECK (length(secret) = 32),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- updated_at ------------------------------------------------------------------------------------

CREATE FUNCTION keyturn_touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END $$;

CREATE TRIGGER touch BEFORE UPDATE ON subscription_tiers FOR EACH ROW EXECUTE FUNCTION keyturn_touch();
CREATE TRIGGER touch BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION keyturn_touch();
CREATE TRIGGER touch BEFORE UPDATE ON feature_flags FOR EACH ROW EXECUTE FUNCTION keyturn_touch();
CREATE TRIGGER touch BEFORE UPDATE ON api_providers FOR EACH ROW EXECUTE FUNCTION keyturn_touch();
CREATE TRIGGER touch BEFORE UPDATE ON model_prices FOR EACH ROW EXECUTE FUNCTION keyturn_touch();
-- Not for the counters that every Record moves.
CREATE TRIGGER touch BEFORE UPDATE OF provider, label, priority, encrypted_key, is_active, is_valid
    ON user_api_keys FOR EACH ROW EXECUTE FUNCTION keyturn_touch();

-- The audit of the flags: every change, by RPC or by plain SQL ------------------------------------

CREATE FUNCTION keyturn_audit_flag() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before jsonb := CASE WHEN TG_OP = 'INSERT' THEN NULL ELSE to_jsonb(OLD) - 'updated_at' END;
    after  jsonb := CASE WHEN TG_OP = 'DELETE' THEN NULL ELSE to_jsonb(NEW) - 'updated_at' END;
BEGIN
    IF before IS DISTINCT FROM after THEN
        INSERT INTO feature_flag_changes (key, old_value, new_value, changed_by, reason)
        VALUES (coalesce(after ->> 'key', before ->> 'key'), before, after,
                coalesce(nullif(current_setting('keyturn.actor', true), ''), 'sql:' || session_user),
                coalesce(current_setting('keyturn.reason', true), ''));
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON feature_flags
    FOR EACH ROW EXECUTE FUNCTION keyturn_audit_flag();

-- The push: what changed, to every sidecar, however it was changed -----------------------------------
-- Payloads: 'configuration'; 'user <id>'; 'users' (everything about every user).

CREATE FUNCTION keyturn_push_configuration() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('keyturn', 'configuration');
    RETURN NULL;
END $$;

CREATE TRIGGER push AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON feature_flags
    FOR EACH STATEMENT EXECUTE FUNCTION keyturn_push_configuration();
CREATE TRIGGER push AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON subscription_tiers
    FOR EACH STATEMENT EXECUTE FUNCTION keyturn_push_configuration();
CREATE TRIGGER push AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON api_providers
    FOR EACH STATEMENT EXECUTE FUNCTION keyturn_push_configuration();
CREATE TRIGGER push AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON model_prices
    FOR EACH STATEMENT EXECUTE FUNCTION keyturn_push_configuration();

CREATE FUNCTION keyturn_push_user() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_notify('keyturn', 'user ' || (to_jsonb(OLD) ->> TG_ARGV[0]));
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM pg_notify('keyturn', 'user ' || (to_jsonb(NEW) ->> TG_ARGV[0]));
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION keyturn_push_users() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('keyturn', 'users');
    RETURN NULL;
END $$;

-- A new user is in no cache; a new key's owner may be.
CREATE TRIGGER push_update AFTER UPDATE ON users FOR EACH ROW
    WHEN ((OLD.id, OLD.subscription_tier) IS DISTINCT FROM (NEW.id, NEW.subscription_tier))
    EXECUTE FUNCTION keyturn_push_user('id');
CREATE TRIGGER push_delete AFTER DELETE ON users FOR EACH ROW EXECUTE FUNCTION keyturn_push_user('id');
CREATE TRIGGER push_truncate AFTER TRUNCATE ON users FOR EACH STATEMENT EXECUTE FUNCTION keyturn_push_users();

-- Not for the counters that every Record moves.
CREATE TRIGGER push_update AFTER UPDATE ON user_api_keys FOR EACH ROW
    WHEN ((OLD.user_id, OLD.id, OLD.provider, OLD.priority, OLD.encrypted_key, OLD.key_hint, OLD.revision,
           OLD.is_active, OLD.is_valid, OLD.verified_at, OLD.cooldown_until)
          IS DISTINCT FROM
          (NEW.user_id, NEW.id, NEW.provider, NEW.priority, NEW.encrypted_key, NEW.key_hint, NEW.revision,
           NEW.is_active, NEW.is_valid, NEW.verified_at, NEW.cooldown_until))
    EXECUTE FUNCTION keyturn_push_user('user_id');
CREATE TRIGGER push_change AFTER INSERT OR DELETE ON user_api_keys FOR EACH ROW
    EXECUTE FUNCTION keyturn_push_user('user_id');
CREATE TRIGGER push_truncate AFTER TRUNCATE ON user_api_keys FOR EACH STATEMENT
    EXECUTE FUNCTION keyturn_push_users();

-- Every user has an account, however the user was made ---------------------------------------------

CREATE FUNCTION keyturn_open_account() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO credit_accounts (user_id) VALUES (NEW.id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;

CREATE TRIGGER open_account AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION keyturn_open_account();
