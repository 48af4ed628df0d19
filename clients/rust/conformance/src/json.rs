//! The protocol's JSON to the client's values and back.

use std::fmt::{self, Write as _};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use http::{HeaderName, HeaderValue};
use keyturn::{
    Code, CreditTicket, DecideRequest, Decision, Denial, Error, Explanation, Failure, HeaderMap, KeyHandle,
    Note, Options, Outcome, RecordRequest, Recorded, Retries, SealedHandle, SealedTicket, Settles, Unsent,
    Usage,
};
use serde_json::{Map, Value, json};

type Defect = String;

pub fn text(of: &Value, field: &str) -> Result<String, Defect> {
    of[field].as_str().map(String::from).ok_or_else(|| format!("{field} is a text"))
}

fn text_or_nothing(of: &Value, field: &str) -> Option<String> {
    of[field].as_str().map(String::from)
}

pub fn list<'a>(of: &'a Value, field: &str) -> Result<&'a Vec<Value>, Defect> {
    of[field].as_array().ok_or_else(|| format!("{field} is a list"))
}

pub fn millis(of: &Value, field: &str) -> Option<Duration> {
    of[field].as_u64().map(Duration::from_millis)
}

fn status(of: &Value) -> Result<Option<u16>, Defect> {
    match of["http_status"].as_i64() {
        None => Ok(None),
        Some(status) => status.try_into().map(Some).map_err(|_| "http_status is of 16 bits".into()),
    }
}

fn word<T: FromStr>(of: &Value, field: &str) -> Result<Option<T>, Defect> {
    match of[field].as_str() {
        None => Ok(None),
        Some(word) => word.parse().map(Some).map_err(|_| format!("{word} is no {field}")),
    }
}

pub fn options(given: &Value) -> Result<Options, Defect> {
    let defaults = Options::default();
    let retries = &given["retries"];
    Ok(Options {
        target: text_or_nothing(given, "target"),
        token: text_or_nothing(given, "token").map(Into::into),
        root_certificates: text_or_nothing(given, "root_certificates"),
        certificate_chain: text_or_nothing(given, "certificate_chain"),
        private_key: text_or_nothing(given, "private_key").map(Into::into),
        tls: given["tls"].as_bool().unwrap_or_default(),
        timeout: millis(given, "timeout_ms").unwrap_or(defaults.timeout),
        retries: Retries {
            attempts: match retries["attempts"].as_u64() {
                None => defaults.retries.attempts,
                Some(attempts) => attempts.try_into().map_err(|_| "attempts is of 32 bits")?,
            },
            first_delay: millis(retries, "first_delay_ms").unwrap_or(defaults.retries.first_delay),
            max_delay: millis(retries, "max_delay_ms").unwrap_or(defaults.retries.max_delay),
        },
        queue_size: match given["queue_size"].as_u64() {
            None => defaults.queue_size,
            Some(size) => size.try_into().map_err(|_| "queue_size is too large")?,
        },
        close_timeout: millis(given, "close_timeout_ms").unwrap_or(defaults.close_timeout),
        ..defaults
    })
}

pub fn request(given: &Value) -> Result<DecideRequest, Defect> {
    let failed_keys = given["failed_keys"].as_array().into_iter().flatten();
    Ok(DecideRequest {
        model: text_or_nothing(given, "model").unwrap_or_default(),
        service_type: text_or_nothing(given, "service_type").unwrap_or_default(),
        request_id: text_or_nothing(given, "request_id"),
        cost_micros: given["cost_micros"].as_i64(),
        input_tokens: given["input_tokens"].as_i64(),
        max_output_tokens: given["max_output_tokens"].as_i64(),
        constraint: word(given, "constraint")?.unwrap_or(keyturn::Constraint::Any),
        failed_keys: failed_keys.filter_map(Value::as_str).map(SealedHandle::new).collect(),
        redeem: given["redeem"].as_bool().unwrap_or_default(),
        hold_ttl: millis(given, "hold_ttl_ms"),
        ..DecideRequest::new(
            text_or_nothing(given, "user_id").unwrap_or_default(),
            text_or_nothing(given, "provider").unwrap_or_default(),
        )
    })
}

pub fn outcome(given: &Value) -> Result<Outcome, Defect> {
    match (given.as_str(), given.as_i64()) {
        (Some(word), _) => word.parse().map_err(|_| format!("{word} is no outcome")),
        (_, Some(number)) => {
            number.try_into().map(Outcome::Unrecognized).map_err(|_| "outcome is of 32 bits".into())
        }
        _ => Err("outcome is a word or a number".into()),
    }
}

pub fn usage(given: &Value) -> Usage {
    Usage {
        input_tokens: given["input_tokens"].as_i64(),
        output_tokens: given["output_tokens"].as_i64(),
        cache_read_tokens: given["cache_read_tokens"].as_i64(),
        cache_write_tokens: given["cache_write_tokens"].as_i64(),
        total_tokens: given["total_tokens"].as_i64(),
    }
}

pub fn record(given: &Value, decision: Option<&Decision>) -> Result<Result<RecordRequest, Error>, Defect> {
    let settles = match (decision, text_or_nothing(given, "handle"), text_or_nothing(given, "ticket")) {
        (Some(decision), ..) => match decision.settles() {
            Ok(settles) => settles,
            Err(error) => return Ok(Err(error)),
        },
        (_, Some(handle), _) => SealedHandle::new(handle).into(),
        (.., Some(ticket)) => SealedTicket::new(ticket).into(),
        _ => return Err("a record has a decision, a handle or a ticket".into()),
    };
    Ok(Ok(RecordRequest {
        usage: given["usage"].is_object().then(|| usage(&given["usage"])),
        cost_micros: given["cost_micros"].as_i64(),
        model: text_or_nothing(given, "model").unwrap_or_default(),
        endpoint: text_or_nothing(given, "endpoint").unwrap_or_default(),
        response_time: millis(given, "response_time_ms"),
        http_status: status(given)?,
        error_message: text_or_nothing(given, "error_message").unwrap_or_default(),
        retry_after: millis(given, "retry_after_ms"),
        ..RecordRequest::new(settles, outcome(&given["outcome"])?)
    }))
}

pub fn note(given: &Value) -> Result<Note, Defect> {
    Ok(Note {
        model: text_or_nothing(given, "model"),
        endpoint: text_or_nothing(given, "endpoint"),
        response_time: millis(given, "response_time_ms"),
        http_status: status(given)?,
    })
}

pub fn failure(given: &Value) -> Result<Failure, Defect> {
    Ok(Failure {
        http_status: status(given)?,
        error_message: text_or_nothing(given, "error_message").unwrap_or_default(),
        retry_after: millis(given, "retry_after_ms"),
    })
}

/// The defaults of the page are arguments here: AUTH_REJECTED, with 401.
pub fn refusal(given: &Value) -> Result<(Outcome, Failure), Defect> {
    let mut failure = failure(given)?;
    failure.http_status.get_or_insert(401);
    Ok((word(given, "outcome")?.unwrap_or(Outcome::AuthRejected), failure))
}

pub fn headers(given: &Value) -> Result<HeaderMap, Defect> {
    let given = given.as_object().cloned().unwrap_or_default();
    let pairs = given.into_iter().map(|(name, value)| (name, value.as_str().unwrap_or_default().to_string()));
    HeaderMap::try_from(&pairs.collect::<std::collections::HashMap<_, _>>())
        .map_err(|error| error.to_string())
}

/// Header names are in lower case here, as everywhere with `http`; `spelled` has them as they were given.
pub fn from_headers<'a>(headers: &HeaderMap, spelled: impl Iterator<Item = &'a str> + Clone) -> Value {
    let named = |(name, value): (&HeaderName, &HeaderValue)| {
        let given = spelled.clone().find(|given| name.as_str().eq_ignore_ascii_case(given));
        let value = String::from_utf8_lossy(value.as_bytes());
        (given.unwrap_or(name.as_str()).to_string(), Value::from(value))
    };
    headers.iter().map(named).collect::<Map<_, _>>().into()
}

pub fn decision(decision: &Decision, request_id: Option<&str>) -> Value {
    json!({
        "decision_id": decision.decision_id,
        "mode": decision.mode.to_string(),
        "reason": decision.reason.to_string(),
        "message": decision.message,
        "degraded": decision.degraded,
        "replayed": decision.replayed,
        "unmetered": decision.unmetered(),
        "allowed": decision.allowed(),
        "request_id": request_id,
        "key": decision.key().map(key),
        "ticket": decision.ticket().map(ticket),
        "denial": decision.denial().map(denial),
    })
}

fn key(key: &KeyHandle) -> Value {
    json!({
        "handle": key.handle.as_str(),
        "key_id": key.key_id,
        "provider": key.provider,
        "hint": key.hint,
        "secret": key.secret.as_ref().map(|secret| secret.reveal()),
        "auth_header": key.auth_header,
        "auth_prefix": key.auth_prefix,
        "base_url": key.base_url,
        "expire_time": key.expires_at.map(time),
    })
}

fn ticket(ticket: &CreditTicket) -> Value {
    json!({
        "ticket": ticket.ticket.as_str(),
        "hold_micros": ticket.hold_micros,
        "available_micros": ticket.available_micros,
        "expire_time": ticket.expires_at.map(time),
    })
}

fn denial(denial: &Denial) -> Value {
    json!({
        "reason": denial.reason.to_string(),
        "retryable": denial.retryable,
        "retry_after_ms": denial.retry_after.map(in_millis),
        "suggestion": denial.suggestion,
    })
}

pub fn explanation(explanation: &Explanation) -> Value {
    let steps = explanation.steps.iter();
    let steps: Vec<_> = steps
        .map(|step| json!({"check": step.check, "result": step.result, "detail": step.detail}))
        .collect();
    json!({"decision": decision(&explanation.decision, None), "steps": steps})
}

pub fn recorded(recorded: &Recorded) -> Value {
    json!({
        "record_id": recorded.record_id,
        "charged_micros": recorded.charged_micros,
        "released_micros": recorded.released_micros,
        "balance_micros": recorded.balance_micros,
        "cost_source": recorded.cost_source.to_string(),
        "replayed": recorded.replayed,
        "durability": recorded.durability.to_string(),
        "key_state": recorded.key_state.to_string(),
    })
}

pub fn unsent(unsent: &Unsent) -> Value {
    let (kind, sealed) = match &unsent.record.settles {
        Settles::Handle(handle) => ("handle", handle.as_str()),
        Settles::Ticket(ticket) => ("ticket", ticket.as_str()),
    };
    json!({kind: sealed, "outcome": unsent.record.outcome.to_string(), "error": error(&unsent.error)})
}

pub fn error(error: &Error) -> Value {
    let kind = match error {
        Error::InvalidArgument(_) => "InvalidArgument",
        Error::Unauthenticated(_) => "Unauthenticated",
        Error::PermissionDenied(_) => "PermissionDenied",
        Error::NotFound(_) => "NotFound",
        Error::AlreadyExists(_) => "AlreadyExists",
        Error::FailedPrecondition(_) => "FailedPrecondition",
        Error::ResourceExhausted(_) => "ResourceExhausted",
        Error::Unavailable(_) => "Unavailable",
        Error::DeadlineExceeded(_) => "DeadlineExceeded",
        Error::Internal(_) => "InternalError",
        Error::Invalid(_) => "Invalid",
        Error::QueueFull => "QueueFull",
        Error::Closed => "Closed",
        _ => "KeyturnError",
    };
    let Some(fault) = error.fault() else {
        return json!({"kind": kind, "text": error.to_string()});
    };
    let violations = fault.field_violations.iter();
    let violations: Vec<_> =
        violations.map(|each| json!({"field": each.field, "description": each.description})).collect();
    let resource = fault.resource.as_ref();
    let code: Code = fault.code;
    json!({
        "kind": kind,
        "code": code.to_string(),
        "reason": fault.reason,
        "message": fault.message,
        "text": error.to_string(),
        "field_violations": violations,
        "retry_after_ms": fault.retry_after.map(in_millis),
        "resource": resource.map(|found| {
            json!({"type": found.kind, "name": found.name, "description": found.description})
        }),
        "metadata": fault.metadata,
    })
}

fn in_millis(span: Duration) -> u64 {
    span.as_millis().try_into().unwrap_or(u64::MAX)
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339(time).to_string()
}

/// What the client logs goes to standard error: warnings and worse, of any crate.
pub struct StandardError;

impl tracing::Subscriber for StandardError {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Line(String);
        impl tracing::field::Visit for Line {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
                let _ = write!(self.0, " {field}={value:?}");
            }
        }
        let mut line = Line(format!("{} {}", event.metadata().level(), event.metadata().target()));
        event.record(&mut line);
        eprintln!("{}", line.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
