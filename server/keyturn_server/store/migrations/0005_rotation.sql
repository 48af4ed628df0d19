-- Rotation reads the keys that rest under one master key page by page, in the order of (user_id, id): so what
-- it has passed, the keys that do not open among it, lies behind it. The ids alone are found by the leading
-- column, as with the index that this one replaces.
CREATE INDEX user_api_keys_to_rotate ON user_api_keys (keyturn_master_key_id(encrypted_key), user_id, id);
DROP INDEX user_api_keys_by_master_key;

-- updated_at tells when the key changed for its owner. What its provider says of it is no such change, and
-- neither is the same secret (the same revision) under another master key.
DROP TRIGGER touch ON user_api_keys;
CREATE TRIGGER touch BEFORE UPDATE OF provider, label, priority, encrypted_key, revision, is_active
    ON user_api_keys FOR EACH ROW
    WHEN ((OLD.provider, OLD.label, OLD.priority, OLD.revision, OLD.is_active)
          IS DISTINCT FROM
          (NEW.provider, NEW.label, NEW.priority, NEW.revision, NEW.is_active)
          OR (OLD.encrypted_key IS DISTINCT FROM NEW.encrypted_key
              AND keyturn_master_key_id(OLD.encrypted_key) = keyturn_master_key_id(NEW.encrypted_key)))
    EXECUTE FUNCTION keyturn_touch();
