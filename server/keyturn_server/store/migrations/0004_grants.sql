-- Grants of credits in groups, like holds and settlements: one round trip and one commit for all that has
-- queued, and a locked account fails its own grant alone. docs/decisions/0002-ledger-functions.md
-- Locking order: see 0002_ledger.sql.

CREATE TYPE keyturn_grant AS (
    id            uuid,
    user_id       text,
    amount_micros bigint,
    request_id    text,
    description   text
);

-- Adds credits to balances, once for each request_id of a user. Accounts are made if need be.
-- With `wait`, waits for accounts that somebody else has locked, up to lock_timeout; without, leaves
-- them out.
-- status: granted | replayed (request_id seen before: amount and balance are those of its first grant) |
--         unknown (no such user) | too_much (the balance would not fit) | busy (account locked by another)
CREATE FUNCTION keyturn_add_grants(grants keyturn_grant[], wait boolean)
RETURNS TABLE (ord bigint, status text, transaction_id uuid, amount_micros bigint, balance_micros bigint)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    r         record;
    v_old     record;
    v_locked  text[];
    v_balance bigint;
BEGIN
    INSERT INTO credit_accounts (user_id)
    SELECT u.id FROM users u
     WHERE u.id = ANY (ARRAY(SELECT g.user_id FROM unnest(grants) g))
       AND NOT EXISTS (SELECT FROM credit_accounts a WHERE a.user_id = u.id)
     ORDER BY u.id
        ON CONFLICT DO NOTHING;
    v_locked := keyturn_lock_accounts(ARRAY(SELECT g.user_id FROM unnest(grants) g), wait);

    FOR r IN
        SELECT g.*, u.id AS known, l.user_id AS locked
          FROM unnest(grants) WITH ORDINALITY AS g (id, user_id, amount_micros, request_id, description, ord)
          LEFT JOIN users u ON u.id = g.user_id
          LEFT JOIN unnest(v_locked) l (user_id) ON l.user_id = g.user_id
         ORDER BY g.user_id, g.ord
    LOOP
        ord := r.ord;
        transaction_id := r.id;
        amount_micros := r.amount_micros;
        balance_micros := NULL;

        IF r.known IS NULL THEN
            status := 'unknown';
        ELSIF r.locked IS NULL THEN
            status := 'busy';
        ELSE
            -- By our id, for our own retry of a statement whose reply was lost; then by the caller's.
            SELECT t.id, t.amount_micros, t.balance_after_micros INTO v_old FROM credit_transactions t
             WHERE t.user_id = r.user_id AND t.id = r.id AND t.transaction_type = 'grant';
            IF FOUND THEN
                status := 'granted';
            ELSE
                SELECT t.id, t.amount_micros, t.balance_after_micros INTO v_old FROM credit_transactions t
                 WHERE t.user_id = r.user_id AND t.request_id = r.request_id;
                status := CASE WHEN FOUND THEN 'replayed' END;
            END IF;
            IF status IS NOT NULL THEN
                transaction_id := v_old.id;
                amount_micros := v_old.amount_micros;
                balance_micros := v_old.balance_after_micros;
            ELSE
                SELECT a.balance_micros INTO v_balance FROM credit_accounts a WHERE a.user_id = r.user_id;
                IF v_balance::numeric + r.amount_micros > 9223372036854775807 THEN
                    status := 'too_much';
                ELSE
                    status := 'granted';
                    balance_micros := v_balance + r.amount_micros;
                    UPDATE credit_accounts a SET balance_micros = a.balance_micros + r.amount_micros
                     WHERE a.user_id = r.user_id;
                    INSERT INTO credit_transactions (user_id, id, transaction_type, amount_micros,
                                                     balance_after_micros, request_id, description, created_at)
                    VALUES (r.user_id, r.id, 'grant', r.amount_micros, v_balance + r.amount_micros,
                            r.request_id, r.description, clock_timestamp());
                END IF;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;

-- The same for one grant, as operators call it in plain SQL.
-- A replay gives the first grant's amount and the balance after it; an unknown user gives no row.
CREATE OR REPLACE FUNCTION keyturn_grant_credits(
    p_id uuid, p_user_id text, p_amount_micros bigint, p_request_id text, p_description text
) RETURNS TABLE (transaction_id uuid, amount_micros bigint, balance_micros bigint, replayed boolean)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_granted record;
BEGIN
    SELECT * INTO v_granted FROM keyturn_add_grants(
        ARRAY[ROW (p_id, p_user_id, p_amount_micros, p_request_id, p_description)::keyturn_grant], true);
    IF v_granted.status = 'too_much' THEN
        RAISE numeric_value_out_of_range USING MESSAGE = 'the balance would be over 9223372036854775807 micros';
    ELSIF v_granted.status IN ('granted', 'replayed') THEN
        RETURN QUERY SELECT v_granted.transaction_id, v_granted.amount_micros, v_granted.balance_micros,
                            v_granted.status = 'replayed';
    END IF;
END $$;

-- So that a product's own INSERT of a key needs no id.
ALTER TABLE user_api_keys ALTER COLUMN id SET DEFAULT gen_random_uuid();
