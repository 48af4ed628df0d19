-- How a key is checked against its provider: a GET that costs nothing, and that only a good key may make.

ALTER TABLE api_providers
    ADD COLUMN check_path    text,
    ADD COLUMN check_headers jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN check_refusal text,
    -- Of this provider, so that a key goes nowhere but below its base_url's host.
    ADD CONSTRAINT api_providers_check_path CHECK (check_path !~ '^([A-Za-z][A-Za-z0-9+.-]*:|[/\\]{2})'),
    ADD CONSTRAINT api_providers_check_headers CHECK (
        jsonb_typeof(check_headers) = 'object' AND NOT check_headers @? '$.* ? (@.type() != "string")'),
    ADD CONSTRAINT api_providers_check_refusal CHECK (check_refusal <> '');
COMMENT ON COLUMN api_providers.check_path IS
    'GET this with the key to check it, relative to base_url and a slash; NULL: keys cannot be checked';
COMMENT ON COLUMN api_providers.check_headers IS 'Headers that the check needs besides the key: {"name": "value"}';
COMMENT ON COLUMN api_providers.check_refusal IS
    'What a 4xx answer says where it refuses the key with another status than 401 or 403';

-- Only rows that are where they were shipped: another base_url may lead to something else.
-- Lists are asked for with one entry, where the provider can do that: only the status is read.
UPDATE api_providers p
   SET check_path = v.check_path, check_headers = v.check_headers::jsonb, check_refusal = v.check_refusal
  FROM (VALUES
    ('openai',     'https://api.openai.com/v1',             'models', '{}', NULL),
    ('anthropic',  'https://api.anthropic.com/v1',          'models?limit=1', '{"anthropic-version": "2023-06-01"}', NULL),
    -- 400 INVALID_ARGUMENT, with this as the reason in its details.
    ('google',     'https://generativelanguage.googleapis.com/v1beta', 'models?pageSize=1', '{}', 'API_KEY_INVALID'),
    ('mistral',    'https://api.mistral.ai/v1',             'models', '{}', NULL),
    ('groq',       'https://api.groq.com/openai/v1',        'models', '{}', NULL),
    -- 400 too: "Incorrect API key provided: xa***yz. …"
    ('xai',        'https://api.x.ai/v1',                   'models', '{}', 'Incorrect API key'),
    ('deepseek',   'https://api.deepseek.com',              'models', '{}', NULL),
    -- Its list of models is public.
    ('openrouter', 'https://openrouter.ai/api/v1',          'key', '{}', NULL),
    ('together',   'https://api.together.xyz/v1',           'models', '{}', NULL),
    -- The list below base_url ends in a 500 for good keys of accounts without a deployment.
    ('fireworks',  'https://api.fireworks.ai/inference/v1', '../../v1/accounts/fireworks/models?pageSize=1', '{}', NULL),
    -- There is no list in v2. Some methods say 498.
    ('cohere',     'https://api.cohere.com/v2',             '../v1/models?page_size=1', '{}', 'invalid api token'),
    -- Its list of models is public; that of the account's own asynchronous requests is not.
    ('perplexity', 'https://api.perplexity.ai',             'v1/async/sonar', '{}', NULL)
  ) AS v (id, base_url, check_path, check_headers, check_refusal)
 WHERE p.id = v.id AND p.base_url = v.base_url;
