-- Records that waited in a spool count from when they were acknowledged: late or not by that time, and in the
-- books at that time. `waited` says for each how long that is; NULL, of one or of all: not at all. How long it
-- waited one clock has measured, where a time of day would be another clock's than the database's.
-- docs/decisions/0014-spool.md
--
-- Apart from that the functions are those of 0002_ledger.sql, where what they do is written down.

DROP FUNCTION keyturn_settle_tickets(keyturn_settlement[], boolean);
DROP FUNCTION keyturn_record_key_usage(keyturn_key_record[], boolean);

CREATE FUNCTION keyturn_settle_tickets(settlements keyturn_settlement[], wait boolean, waited interval[])
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
    v_at        timestamptz;
    v_settled   bigint[] := '{}';
    v_released  bigint[] := '{}';
    v_balances  bigint[] := '{}';
    v_late      boolean[] := '{}';
    v_times     timestamptz[] := '{}';
    v_users     text[] := '{}';
    v_charges   bigint[] := '{}';
    v_unheld    bigint[] := '{}';
BEGIN
    v_locked := keyturn_lock_accounts(ARRAY(SELECT s.user_id FROM unnest(settlements) s), wait);
    v_now := clock_timestamp();

    FOR r IN
        SELECT s.ord, s.user_id, s.charge_micros, s.cost_source, s.fingerprint, s.submission_id, s.is_too_late, s.twin,
               a.balance_micros AS balance, l.user_id AS locked, h.id AS held, h.submission_id AS old_submission, h.state, h.amount_micros AS amount, h.expires_at,
               h.created_at AS held_at,
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
            v_at := greatest(v_now - coalesce(waited[r.ord], '0'), r.held_at);
            v_times := v_times || v_at;
            v_late := v_late || (r.expires_at <= v_at);
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
        SELECT s.*, d.released, d.balance, d.late, d.at
          FROM unnest(v_settled, v_released, v_balances, v_late, v_times) d (ord, released, balance, late, at)
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
           done.error_message, done.late, done.at
      FROM done JOIN holds ON holds.user_id = done.user_id AND holds.id = done.hold_id
     WHERE done.charge_micros > 0 OR done.outcome = 'SUCCESS';

    UPDATE credit_accounts a
       SET balance_micros = a.balance_micros - d.charge, held_micros = a.held_micros - d.unheld
      FROM (SELECT u.user_id, sum(u.charge)::bigint AS charge, sum(u.unheld)::bigint AS unheld
              FROM unnest(v_users, v_charges, v_unheld) u (user_id, charge, unheld) GROUP BY u.user_id) d
     WHERE a.user_id = d.user_id;
END $$;

CREATE FUNCTION keyturn_record_key_usage(records keyturn_key_record[], wait boolean, waited interval[])
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
    v_at    timestamptz;
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

        v_at := v_now - coalesce(waited[r.ord], '0');
        UPDATE user_api_keys t
           SET total_requests = t.total_requests + CASE WHEN r.outcome = 'NEVER_SENT' THEN 0 ELSE 1 END,
               total_tokens = t.total_tokens + coalesce(r.total_tokens, 0),
               last_used_at = CASE WHEN r.outcome = 'NEVER_SENT' THEN t.last_used_at
                                   ELSE greatest(t.last_used_at, v_at) END
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
                  AND (k.cooldown_until IS NOT NULL OR k.verified_at IS NULL)
                  -- What went wrong since, it knows nothing of.
                  AND (k.last_error_at IS NULL OR k.last_error_at <= v_at) THEN
                UPDATE user_api_keys t
                   SET cooldown_until = NULL, verified_at = coalesce(t.verified_at, v_at)
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
            r.is_late, r.fingerprint, r.submission_id, v_at)
        ON CONFLICT (user_id, id) DO NOTHING;
        -- A twin from another sidecar came first (its key is gone, so no lock stood between): ask again.
        status := CASE WHEN FOUND THEN 'recorded' ELSE 'again' END;
        key_state := v_state;
        RETURN NEXT;
    END LOOP;
END $$;
