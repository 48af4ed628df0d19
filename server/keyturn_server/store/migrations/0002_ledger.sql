-- The ledger's statements over a group of requests. Functions, because each step must see what the
-- locks of the step before it waited for: inside one plain statement every part would read the
-- snapshot from before the wait. docs/decisions/0002-ledger-functions.md
--
-- The functions below plan with index look-ups alone: on a young database, whose tables have no statistics
-- yet, the cached plan would otherwise read all of credit_holds for every group.
--
-- Locking order, everywhere: credit_accounts by user_id, then their credit_holds; user_api_keys by
-- (user_id, id). Nothing locks an account while it holds a key's row.

-- Locks the accounts of these users, in order; those that were locked come back. Without `wait` the
-- accounts that somebody else has locked are left out.
CREATE FUNCTION keyturn_lock_accounts(users text[], wait boolean) RETURNS text[]
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_locked text[];
BEGIN
    IF wait THEN
        SELECT array_agg(l.user_id) INTO v_locked FROM (
            SELECT a.user_id FROM credit_accounts a
             WHERE a.user_id = ANY (users) ORDER BY a.user_id FOR NO KEY UPDATE) l;
    ELSE
        SELECT array_agg(l.user_id) INTO v_locked FROM (
            SELECT a.user_id FROM credit_accounts a
             WHERE a.user_id = ANY (users) ORDER BY a.user_id FOR NO KEY UPDATE SKIP LOCKED) l;
    END IF;
    RETURN coalesce(v_locked, '{}');
END $$;

CREATE TYPE keyturn_hold_request AS (
    id            uuid,
    user_id       text,
    request_id    text,
    provider      text,
    model         text,
    service_type  text,
    mode          text,
    reason        text,
    amount_micros bigint,
    ttl           interval
);

-- Places the holds that the balances cover, in the order given for each user.
-- With `wait`, waits for accounts that somebody else has locked, up to lock_timeout; without, leaves
-- them out.
-- status: placed | replayed (request_id seen before: its hold as it was; `state` says what became of it) |
--         insufficient | in_flight (the balance would do, but open holds take it up) |
--         again (a twin stands before it in this group: ask again) | busy (account locked by another)
CREATE FUNCTION keyturn_place_holds(requests keyturn_hold_request[], wait boolean)
RETURNS TABLE (ord bigint, status text, hold_id uuid, amount_micros bigint, available_micros bigint,
               created_at timestamptz, expires_at timestamptz, provider text, model text, service_type text,
               state text)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    r          record;
    v_locked   text[];
    v_user     text;
    v_balance  bigint;
    v_held     bigint;
    v_swept    boolean;
    v_freed    bigint;
    v_now      timestamptz;
    v_taken    text[];
    v_placed   bigint[] := '{}';
    v_users    text[] := '{}';
    v_deltas   bigint[] := '{}';
BEGIN
    v_locked := keyturn_lock_accounts(ARRAY(SELECT q.user_id FROM unnest(requests) q), wait);
    v_now := clock_timestamp();

    -- Two joins to the holds, each with an index of its own: by our id, for our own retry of a
    -- statement whose reply was lost, and by the caller's request_id.
    FOR r IN
        SELECT q.*, a.balance_micros, a.held_micros, a.user_id AS account, l.user_id AS locked,
               own.id AS own_id, coalesce(own.id, h.id) AS old_id,
               coalesce(own.amount_micros, h.amount_micros) AS old_amount,
               coalesce(own.created_at, h.created_at) AS old_created,
               coalesce(own.expires_at, h.expires_at) AS old_expires,
               coalesce(own.provider, h.provider) AS old_provider,
               coalesce(own.model, h.model) AS old_model,
               coalesce(own.service_type, h.service_type) AS old_service_type,
               coalesce(own.state, h.state) AS old_state
          FROM unnest(requests) WITH ORDINALITY
               AS q (id, user_id, request_id, provider, model, service_type, mode, reason, amount_micros, ttl, ord)
          LEFT JOIN credit_accounts a ON a.user_id = q.user_id
          LEFT JOIN unnest(v_locked) l (user_id) ON l.user_id = q.user_id
          LEFT JOIN credit_holds own ON own.user_id = q.user_id AND own.id = q.id
          LEFT JOIN credit_holds h ON h.user_id = q.user_id AND h.request_id = q.request_id
         ORDER BY q.user_id, q.ord
    LOOP
        IF r.user_id IS DISTINCT FROM v_user THEN
            v_user := r.user_id;
            v_balance := coalesce(r.balance_micros, 0);
            v_held := coalesce(r.held_micros, 0);
            v_swept := r.account IS NULL;
            v_taken := '{}';
        END IF;
        ord := r.ord;
        hold_id := r.id;
        amount_micros := r.amount_micros;
        created_at := v_now;
        expires_at := v_now + r.ttl;
        provider := r.provider;
        model := r.model;
        service_type := r.service_type;
        state := 'open';

        IF r.old_id IS NOT NULL THEN
            status := CASE WHEN r.own_id IS NOT NULL THEN 'placed' ELSE 'replayed' END;
            hold_id := r.old_id;
            amount_micros := r.old_amount;
            created_at := r.old_created;
            expires_at := r.old_expires;
            provider := r.old_provider;
            model := r.old_model;
            service_type := r.old_service_type;
            state := CASE WHEN r.old_state = 'open' AND r.old_expires <= v_now THEN 'expired' ELSE r.old_state END;
        ELSIF r.account IS NOT NULL AND r.locked IS NULL THEN
            status := 'busy';
        ELSIF r.request_id = ANY (v_taken) THEN
            status := 'again';
        ELSE
            IF v_balance - v_held < r.amount_micros AND NOT v_swept THEN
                -- Holds that have run out stand in nobody's way, swept or not.
                v_swept := true;
                WITH gone AS (
                    UPDATE credit_holds h SET state = 'expired', closed_at = v_now
                     WHERE h.user_id = v_user AND h.state = 'open' AND h.expires_at <= v_now
                    RETURNING h.amount_micros AS freed)
                SELECT coalesce(sum(freed), 0) INTO v_freed FROM gone;
                IF v_freed > 0 THEN
                    v_held := v_held - v_freed;
                    v_users := v_users || v_user;
                    v_deltas := v_deltas || -v_freed;
                END IF;
            END IF;
            IF r.account IS NOT NULL AND v_balance - v_held >= r.amount_micros THEN
                status := 'placed';
                v_held := v_held + r.amount_micros;
                v_placed := v_placed || r.ord;
                v_users := v_users || v_user;
                v_deltas := v_deltas || r.amount_micros;
                IF r.request_id IS NOT NULL THEN
                    v_taken := v_taken || r.request_id;
                END IF;
            ELSIF r.account IS NOT NULL AND v_balance >= r.amount_micros THEN
                status := 'in_flight';
            ELSE
                status := 'insufficient';
            END IF;
        END IF;
        available_micros := v_balance - v_held;
        RETURN NEXT;
    END LOOP;

    IF cardinality(v_placed) > 0 THEN
        INSERT INTO credit_holds (user_id, id, request_id, provider, model, service_type, mode, reason,
                                  amount_micros, state, created_at, expires_at)
        SELECT q.user_id, q.id, q.request_id, q.provider, q.model, q.service_type, q.mode, q.reason,
               q.amount_micros, 'open', v_now, v_now + q.ttl
          FROM unnest(v_placed) p
          JOIN unnest(requests) WITH ORDINALITY
               AS q (id, user_id, request_id, provider, model, service_type, mode, reason, amount_micros, ttl, ord) ON q.ord = p;
    END IF;
    IF cardinality(v_users) > 0 THEN
        UPDATE credit_accounts a SET held_micros = a.held_micros + d.delta
          FROM (SELECT u.user_id, sum(u.delta)::bigint AS delta
                  FROM unnest(v_users, v_deltas) u (user_id, delta) GROUP BY u.user_id) d
         WHERE a.user_id = d.user_id;
    END IF;
END $$;

CREATE TYPE keyturn_settlement AS (
    hold_id            uuid,
    user_id            text,
    charge_micros      bigint,
    cost_source        text,
    outcome            text,
    model              text,
    endpoint           text,
    input_tokens       bigint,
    output_tokens      bigint,
    cache_read_tokens  bigint,
    cache_write_tokens bigint,
    total_tokens       bigint,
    http_status        integer,
    response_time_ms   bigint,
    error_message      text,
    fingerprint        bytea,
    submission_id      uuid,
    is_too_late        boolean
);

-- Settles tickets: charges, releases the rest of the hold, keeps the answer for a replay.
-- A deduction is written for a success and for whatever is charged; a hold that came to nothing
-- leaves its outcome on its own row. `wait` as above.
-- status: settled | replayed | conflict (settled before with other contents) | unknown (no such hold) |
--         too_late (and not settled before) |
--         again (a twin stands before it in this group: ask again) | busy (account locked by another)
CREATE FUNCTION keyturn_settle_tickets(settlements keyturn_settlement[], wait boolean)
RETURNS TABLE (ord bigint, status text, charged_micros bigint, released_micros bigint,
               balance_micros bigint, cost_source text)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    r           record;
    v_locked    text[];
    v_user      text;
    v_balance   bigint;
    v_now       timestamptz;
    v_settled   bigint[] := '{}';
    v_released  bigint[] := '{}';
    v_balances  bigint[] := '{}';
    v_late      boolean[] := '{}';
    v_users     text[] := '{}';
    v_charges   bigint[] := '{}';
    v_unheld    bigint[] := '{}';
BEGIN
    v_locked := keyturn_lock_accounts(ARRAY(SELECT s.user_id FROM unnest(settlements) s), wait);
    v_now := clock_timestamp();

    FOR r IN
        SELECT s.ord, s.user_id, s.charge_micros, s.cost_source, s.fingerprint, s.submission_id, s.is_too_late, s.twin,
               a.balance_micros AS balance, l.user_id AS locked, h.id AS held, h.submission_id AS old_submission, h.state, h.amount_micros AS amount, h.expires_at,
               h.fingerprint AS old_fingerprint, h.charged_micros AS old_charged,
               h.released_micros AS old_released, h.balance_after_micros AS old_balance,
               h.cost_source AS old_source
          FROM (SELECT u.*, row_number() OVER (PARTITION BY u.user_id, u.hold_id ORDER BY u.ord) AS twin
                  FROM unnest(settlements) WITH ORDINALITY
                       AS u (hold_id, user_id, charge_micros, cost_source, outcome, model, endpoint, input_tokens,
                             output_tokens, cache_read_tokens, cache_write_tokens, total_tokens, http_status,
                             response_time_ms, error_message, fingerprint, submission_id, is_too_late, ord)) s
          LEFT JOIN credit_accounts a ON a.user_id = s.user_id
          LEFT JOIN unnest(v_locked) l (user_id) ON l.user_id = s.user_id
          LEFT JOIN credit_holds h ON h.user_id = s.user_id AND h.id = s.hold_id
         ORDER BY s.user_id, s.ord
    LOOP
        IF r.user_id IS DISTINCT FROM v_user THEN
            v_user := r.user_id;
            v_balance := r.balance;
        END IF;
        ord := r.ord;
        charged_micros := NULL;
        released_micros := NULL;
        balance_micros := NULL;
        cost_source := NULL;

        IF r.held IS NULL OR r.balance IS NULL THEN
            status := 'unknown';
        ELSIF r.state = 'settled' THEN
            -- The same submission is our own retry of a statement whose reply was lost.
            status := CASE WHEN r.old_submission = r.submission_id THEN 'settled'
                           WHEN r.old_fingerprint = r.fingerprint THEN 'replayed'
                           ELSE 'conflict' END;
            charged_micros := r.old_charged;
            released_micros := r.old_released;
            balance_micros := r.old_balance;
            cost_source := r.old_source;
        ELSIF r.is_too_late THEN
            status := 'too_late';
        ELSIF r.locked IS NULL THEN
            status := 'busy';
        ELSIF r.twin > 1 THEN
            status := 'again';
        ELSE
            status := 'settled';
            v_balance := v_balance - r.charge_micros;
            charged_micros := r.charge_micros;
            -- A hold that was swept has been released already.
            released_micros := CASE WHEN r.state = 'open' THEN greatest(r.amount - r.charge_micros, 0) ELSE 0 END;
            balance_micros := v_balance;
            cost_source := r.cost_source;
            v_settled := v_settled || r.ord;
            v_released := v_released || released_micros;
            v_balances := v_balances || v_balance;
            v_late := v_late || (r.expires_at <= v_now);
            v_users := v_users || r.user_id;
            v_charges := v_charges || r.charge_micros;
            v_unheld := v_unheld || CASE WHEN r.state = 'open' THEN r.amount ELSE 0 END;
        END IF;
        RETURN NEXT;
    END LOOP;

    IF cardinality(v_settled) = 0 THEN
        RETURN;
    END IF;

    WITH done AS (
        SELECT s.*, d.released, d.balance, d.late
          FROM unnest(v_settled, v_released, v_balances, v_late) d (ord, released, balance, late)
          JOIN unnest(settlements) WITH ORDINALITY
               AS s (hold_id, user_id, charge_micros, cost_source, outcome, model, endpoint, input_tokens,
                     output_tokens, cache_read_tokens, cache_write_tokens, total_tokens, http_status,
                     response_time_ms, error_message, fingerprint, submission_id, is_too_late, ord) ON s.ord = d.ord
    ), holds AS (
        UPDATE credit_holds h
           SET state = 'settled', closed_at = v_now, outcome = done.outcome,
               charged_micros = done.charge_micros, released_micros = done.released,
               balance_after_micros = done.balance, cost_source = done.cost_source,
               is_late = done.late, fingerprint = done.fingerprint, submission_id = done.submission_id
          FROM done
         WHERE h.user_id = done.user_id AND h.id = done.hold_id
        RETURNING h.user_id, h.id, h.service_type, h.provider, h.model, h.mode, h.reason
    )
    INSERT INTO credit_transactions (
        user_id, id, transaction_type, amount_micros, balance_after_micros, service_type,
        mode, reason, provider, model, endpoint, outcome, cost_source, input_tokens, output_tokens, cache_read_tokens,
        cache_write_tokens, total_tokens, http_status, response_time_ms, error_message, is_late, created_at)
    SELECT done.user_id, done.hold_id, 'deduction', -done.charge_micros, done.balance,
           holds.service_type, holds.mode, holds.reason, holds.provider, coalesce(nullif(done.model, ''), holds.model), done.endpoint,
           done.outcome, done.cost_source, done.input_tokens, done.output_tokens, done.cache_read_tokens,
           done.cache_write_tokens, done.total_tokens, done.http_status, done.response_time_ms,
           done.error_message, done.late, v_now
      FROM done JOIN holds ON holds.user_id = done.user_id AND holds.id = done.hold_id
     WHERE done.charge_micros > 0 OR done.outcome = 'SUCCESS';

    UPDATE credit_accounts a
       SET balance_micros = a.balance_micros - d.charge, held_micros = a.held_micros - d.unheld
      FROM (SELECT u.user_id, sum(u.charge)::bigint AS charge, sum(u.unheld)::bigint AS unheld
              FROM unnest(v_users, v_charges, v_unheld) u (user_id, charge, unheld) GROUP BY u.user_id) d
     WHERE a.user_id = d.user_id;
END $$;

-- Releases holds that have run out, by the database's clock. `expired` is how many; `broken` are users
-- whose account does not agree with their holds, and is left as it is for somebody to look at.
CREATE FUNCTION keyturn_expire_holds(at_most integer) RETURNS TABLE (expired bigint, broken text[])
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_user  text;
    v_count bigint;
BEGIN
    expired := 0;
    broken := '{}';
    -- An account that somebody works on right now is left for the next sweep.
    FOREACH v_user IN ARRAY keyturn_lock_accounts(
        ARRAY(SELECT h.user_id FROM credit_holds h
               WHERE h.state = 'open' AND h.expires_at <= clock_timestamp()
               ORDER BY h.expires_at LIMIT at_most), false)
    LOOP
        BEGIN
            WITH gone AS (
                UPDATE credit_holds h SET state = 'expired', closed_at = clock_timestamp()
                 WHERE h.user_id = v_user AND h.state = 'open' AND h.expires_at <= clock_timestamp()
                RETURNING h.amount_micros
            ), freed AS (
                UPDATE credit_accounts a
                   SET held_micros = a.held_micros - (SELECT coalesce(sum(amount_micros), 0) FROM gone)
                 WHERE a.user_id = v_user
            )
            SELECT count(*) INTO v_count FROM gone;
            expired := expired + v_count;
        EXCEPTION WHEN check_violation THEN
            broken := broken || v_user;
        END;
    END LOOP;
    RETURN NEXT;
END $$;

CREATE TYPE keyturn_key_record AS (
    id                 uuid,
    user_id            text,
    key_id             uuid,
    key_revision       integer,
    provider           text,
    model              text,
    service_type       text,
    mode               text,
    reason             text,
    endpoint           text,
    outcome            text,
    input_tokens       bigint,
    output_tokens      bigint,
    cache_read_tokens  bigint,
    cache_write_tokens bigint,
    total_tokens       bigint,
    cost_micros        bigint,
    cost_source        text,
    http_status        integer,
    response_time_ms   bigint,
    error_message      text,
    cooldown           interval,
    is_late            boolean,
    fingerprint        bytea,
    submission_id      uuid,
    is_too_late        boolean
);

-- Records the use of own keys, once each, and lets the outcome steer the key:
-- AUTH_REJECTED makes it invalid, a row with a cooldown cools it down, SUCCESS ends a cooldown.
-- `wait` as above, for the keys' rows.
-- status: recorded | replayed | conflict (recorded before with other contents) | too_late | again |
--         busy (see above)
CREATE FUNCTION keyturn_record_key_usage(records keyturn_key_record[], wait boolean)
RETURNS TABLE (ord bigint, status text, cost_source text, key_state text)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    r       record;
    k       user_api_keys%ROWTYPE;
    v_locked uuid[];
    v_now   timestamptz;
    v_state text;
BEGIN
    IF wait THEN
        SELECT array_agg(l.id) INTO v_locked FROM (
            SELECT k.id FROM user_api_keys k
             WHERE (k.user_id, k.id) IN (SELECT q.user_id, q.key_id FROM unnest(records) q)
             ORDER BY k.user_id, k.id FOR NO KEY UPDATE) l;
    ELSE
        SELECT array_agg(l.id) INTO v_locked FROM (
            SELECT k.id FROM user_api_keys k
             WHERE (k.user_id, k.id) IN (SELECT q.user_id, q.key_id FROM unnest(records) q)
             ORDER BY k.user_id, k.id FOR NO KEY UPDATE SKIP LOCKED) l;
    END IF;
    v_now := clock_timestamp();

    FOR r IN
        SELECT q.*, u.fingerprint AS old_fingerprint, u.submission_id AS old_submission,
               u.cost_source AS old_source, u.key_state AS old_state,
               stored.id IS NOT NULL AND l.id IS NULL AS is_busy
          FROM (SELECT n.*, row_number() OVER (PARTITION BY n.user_id, n.id ORDER BY n.ord) AS twin
                  FROM unnest(records) WITH ORDINALITY
                       AS n (id, user_id, key_id, key_revision, provider, model, service_type, mode, reason, endpoint,
                             outcome, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, total_tokens,
                             cost_micros, cost_source, http_status, response_time_ms, error_message, cooldown,
                             is_late, fingerprint, submission_id, is_too_late, ord)) q
          LEFT JOIN api_key_usage u ON u.user_id = q.user_id AND u.id = q.id
          LEFT JOIN user_api_keys stored ON stored.user_id = q.user_id AND stored.id = q.key_id
          LEFT JOIN unnest(v_locked) l (id) ON l.id = q.key_id
         ORDER BY q.user_id, q.key_id, q.ord
    LOOP
        ord := r.ord;
        cost_source := r.cost_source;
        key_state := NULL;
        IF r.old_fingerprint IS NOT NULL THEN
            status := CASE WHEN r.old_submission = r.submission_id THEN 'recorded'
                           WHEN r.old_fingerprint = r.fingerprint THEN 'replayed'
                           ELSE 'conflict' END;
            cost_source := r.old_source;
            key_state := r.old_state;
            RETURN NEXT;
            CONTINUE;
        ELSIF r.is_too_late OR r.is_busy OR r.twin > 1 THEN
            status := CASE WHEN r.is_too_late THEN 'too_late' WHEN r.is_busy THEN 'busy' ELSE 'again' END;
            RETURN NEXT;
            CONTINUE;
        END IF;

        UPDATE user_api_keys t
           SET total_requests = t.total_requests + CASE WHEN r.outcome = 'NEVER_SENT' THEN 0 ELSE 1 END,
               total_tokens = t.total_tokens + coalesce(r.total_tokens, 0),
               last_used_at = CASE WHEN r.outcome = 'NEVER_SENT' THEN t.last_used_at ELSE v_now END
         WHERE t.user_id = r.user_id AND t.id = r.key_id
        RETURNING t.* INTO k;
        IF NOT FOUND THEN
            v_state := 'DELETED';
        ELSE
            -- The outcome of an earlier secret says nothing about the present one.
            IF k.revision = r.key_revision AND r.outcome = 'AUTH_REJECTED' THEN
                UPDATE user_api_keys t
                   SET is_valid = false, last_error_at = v_now,
                       last_error = coalesce(nullif(r.error_message, ''), 'The provider refused the key.')
                 WHERE t.user_id = r.user_id AND t.id = r.key_id RETURNING t.* INTO k;
            ELSIF k.revision = r.key_revision AND r.cooldown IS NOT NULL THEN
                UPDATE user_api_keys t
                   SET cooldown_until = greatest(t.cooldown_until, v_now + r.cooldown), last_error_at = v_now,
                       last_error = coalesce(nullif(r.error_message, ''), r.outcome)
                 WHERE t.user_id = r.user_id AND t.id = r.key_id RETURNING t.* INTO k;
            ELSIF k.revision = r.key_revision AND r.outcome = 'SUCCESS'
                  AND (k.cooldown_until IS NOT NULL OR k.verified_at IS NULL) THEN
                UPDATE user_api_keys t
                   SET cooldown_until = NULL, verified_at = coalesce(t.verified_at, v_now)
                 WHERE t.user_id = r.user_id AND t.id = r.key_id RETURNING t.* INTO k;
            END IF;
            v_state := CASE WHEN NOT k.is_active THEN 'INACTIVE'
                            WHEN NOT k.is_valid THEN 'INVALID'
                            WHEN k.cooldown_until > v_now THEN 'COOLING_DOWN'
                            WHEN k.verified_at IS NULL THEN 'UNVERIFIED'
                            ELSE 'USABLE' END;
        END IF;

        INSERT INTO api_key_usage (
            user_id, id, key_id, provider, model, service_type, mode, reason, endpoint, outcome, input_tokens, output_tokens,
            cache_read_tokens, cache_write_tokens, total_tokens, cost_micros, cost_source, http_status,
            response_time_ms, error_message, key_state, is_late, fingerprint, submission_id, created_at)
        VALUES (
            r.user_id, r.id, r.key_id, r.provider, r.model, r.service_type, r.mode, r.reason, r.endpoint,
            r.outcome,
            r.input_tokens, r.output_tokens, r.cache_read_tokens, r.cache_write_tokens, r.total_tokens,
            r.cost_micros, r.cost_source, r.http_status, r.response_time_ms, r.error_message, v_state,
            r.is_late, r.fingerprint, r.submission_id, v_now)
        ON CONFLICT (user_id, id) DO NOTHING;
        -- A twin from another sidecar came first (its key is gone, so no lock stood between): ask again.
        status := CASE WHEN FOUND THEN 'recorded' ELSE 'again' END;
        key_state := v_state;
        RETURN NEXT;
    END LOOP;
END $$;

-- Forgets what has served its time: closed holds after 30 days, spent redemptions. Returns how many.
CREATE FUNCTION keyturn_forget(at_most integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_holds bigint;
    v_redemptions bigint;
BEGIN
    WITH old AS (
        SELECT h.user_id, h.id FROM credit_holds h
         WHERE h.state <> 'open' AND h.closed_at < clock_timestamp() - interval '30 days'
         ORDER BY h.closed_at LIMIT at_most
           FOR UPDATE SKIP LOCKED)
    DELETE FROM credit_holds h USING old WHERE h.user_id = old.user_id AND h.id = old.id;
    GET DIAGNOSTICS v_holds = ROW_COUNT;
    WITH old AS (
        SELECT r.user_id, r.decision_id FROM handle_redemptions r
         WHERE r.expires_at < clock_timestamp() - interval '1 day'
         ORDER BY r.expires_at LIMIT at_most
           FOR UPDATE SKIP LOCKED)
    DELETE FROM handle_redemptions r USING old
     WHERE r.user_id = old.user_id AND r.decision_id = old.decision_id;
    GET DIAGNOSTICS v_redemptions = ROW_COUNT;
    RETURN v_holds + v_redemptions;
END $$;

-- Adds credits to a balance, once for each request_id of a user. The account is made if need be.
-- A replay gives the first grant's amount and the balance after it; an unknown user gives no row.
CREATE FUNCTION keyturn_grant_credits(
    p_id uuid, p_user_id text, p_amount_micros bigint, p_request_id text, p_description text
) RETURNS TABLE (transaction_id uuid, amount_micros bigint, balance_micros bigint, replayed boolean)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO credit_accounts (user_id) SELECT u.id FROM users u WHERE u.id = p_user_id
        ON CONFLICT DO NOTHING;
    PERFORM 1 FROM credit_accounts a WHERE a.user_id = p_user_id FOR NO KEY UPDATE;
    IF NOT EXISTS (SELECT FROM users u WHERE u.id = p_user_id) THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT t.id, t.amount_micros, t.balance_after_micros, true FROM credit_transactions t
         WHERE t.user_id = p_user_id AND t.request_id = p_request_id;
    IF FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
        WITH account AS (
            UPDATE credit_accounts a SET balance_micros = a.balance_micros + p_amount_micros
             WHERE a.user_id = p_user_id RETURNING a.balance_micros)
        INSERT INTO credit_transactions (user_id, id, transaction_type, amount_micros, balance_after_micros,
                                         request_id, description, created_at)
        SELECT p_user_id, p_id, 'grant', p_amount_micros, account.balance_micros,
               p_request_id, p_description, clock_timestamp()
          FROM account
        RETURNING id, amount_micros, balance_after_micros, false;
END $$;
