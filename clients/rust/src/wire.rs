//! Values to messages and back.

use std::time::Duration;

use crate::error::{Code, Error};
use crate::model::{
    CreditTicket, DecideRequest, Decision, Denial, ExplainStep, Explanation, KeyHandle, RecordRequest,
    Recorded, Route, Settles, Usage,
};
use crate::pb;
use crate::secret::{SealedHandle, SealedTicket, Secret};
use crate::words::{CostSource, DenialReason, Durability, KeyState, Mode, Reason};

/// Characters of a provider's error text that are sent.
const ERROR_TEXT: usize = 500;

/// Said of an item of a batch that came back with neither an answer nor a status.
const NO_ANSWER: &str = "the sidecar gave no answer to this item";

/// A new id: 32 hex digits of a UUIDv4.
pub(crate) fn new_request_id() -> String {
    let version = 0x4 << 76;
    let variant = 0b10 << 62;
    let mut bytes = [0; 16];
    if getrandom::fill(&mut bytes).is_err() {
        fastrand::fill(&mut bytes); // a system without random numbers: it need not be secret
    }
    let random = u128::from_be_bytes(bytes) & !(0xf << 76) & !(0b11 << 62);
    format!("{:032x}", random | version | variant)
}

/// # Errors
/// `Invalid` when there is both a cost and tokens.
pub(crate) fn decide_request(asked: &DecideRequest) -> Result<pb::DecideRequest, Error> {
    let tokens = asked.input_tokens.or(asked.max_output_tokens).is_some();
    let estimate = match asked.cost_micros {
        Some(_) if tokens => {
            return Err(Error::invalid("estimate with cost_micros or with tokens, not with both"));
        }
        Some(micros) => Some(pb::decide_request::Estimate::CostMicros(micros)),
        None => tokens.then(|| {
            pb::decide_request::Estimate::Tokens(pb::TokenEstimate {
                input_tokens: asked.input_tokens.unwrap_or_default(),
                max_output_tokens: asked.max_output_tokens.unwrap_or_default(),
            })
        }),
    };
    let delivery = if asked.redeem { pb::KeyDelivery::Redeem } else { pb::KeyDelivery::Inline };
    Ok(pb::DecideRequest {
        request_id: match asked.request_id.as_deref() {
            None | Some("") => new_request_id(),
            Some(id) => id.into(),
        },
        user_id: asked.user_id.clone(),
        provider: asked.provider.clone(),
        model: asked.model.clone(),
        service_type: asked.service_type.clone(),
        constraint: asked.constraint.number(),
        failed_key_handles: asked.failed_keys.iter().map(|key| key.as_str().into()).collect(),
        key_delivery: delivery.into(),
        hold_ttl: asked.hold_ttl.map(duration),
        estimate,
    })
}

pub(crate) fn record_request(record: &RecordRequest) -> pb::RecordRequest {
    pb::RecordRequest {
        outcome: record.outcome.number(),
        usage: record.usage.filter(|usage| *usage != Usage::default()).map(|usage| pb::Usage {
            input_tokens: usage.input_tokens.unwrap_or_default(),
            output_tokens: usage.output_tokens.unwrap_or_default(),
            cache_read_tokens: usage.cache_read_tokens.unwrap_or_default(),
            cache_write_tokens: usage.cache_write_tokens.unwrap_or_default(),
            total_tokens: usage.total_tokens,
        }),
        cost_micros: record.cost_micros,
        model: record.model.clone(),
        endpoint: record.endpoint.clone(),
        response_time: record.response_time.map(duration),
        http_status: record.http_status.unwrap_or_default().into(),
        error_message: record.error_message.chars().take(ERROR_TEXT).collect(),
        retry_after: record.retry_after.map(duration),
        settles: Some(match &record.settles {
            Settles::Handle(handle) => pb::record_request::Settles::KeyHandle(handle.as_str().into()),
            Settles::Ticket(ticket) => pb::record_request::Settles::CreditTicket(ticket.as_str().into()),
        }),
    }
}

pub(crate) fn decision(response: pb::DecideResponse) -> Decision {
    use pb::decide_response::Route as Wire;
    Decision {
        decision_id: response.decision_id,
        mode: Mode::from_number(response.mode),
        reason: Reason::from_number(response.reason),
        message: response.message,
        degraded: response.degraded,
        replayed: response.replayed,
        route: match response.route {
            Some(Wire::Key(key)) => Route::Key(key_handle(key)),
            Some(Wire::Ticket(ticket)) => Route::Ticket(credit_ticket(ticket)),
            Some(Wire::Denial(denial)) => Route::Denial(Denial {
                reason: DenialReason::from_number(denial.reason),
                retryable: denial.retryable,
                retry_after: denial.retry_after.map(|wait| wait.try_into().unwrap_or_default()),
                suggestion: denial.suggestion,
            }),
            None => Route::Unrecognized,
        },
    }
}

fn key_handle(key: pb::KeyHandle) -> KeyHandle {
    let auth = key.auth.unwrap_or_default();
    KeyHandle {
        handle: SealedHandle::new(key.handle),
        key_id: key.key_id,
        provider: key.provider,
        hint: key.hint,
        secret: (!key.secret.is_empty()).then(|| Secret::new(key.secret)),
        auth_header: auth.header,
        auth_prefix: auth.prefix,
        base_url: key.base_url,
        expires_at: key.expire_time.and_then(|time| time.try_into().ok()),
    }
}

fn credit_ticket(ticket: pb::CreditTicket) -> CreditTicket {
    CreditTicket {
        ticket: SealedTicket::new(ticket.ticket),
        hold_micros: ticket.hold_micros,
        available_micros: ticket.available_micros,
        expires_at: ticket.expire_time.and_then(|time| time.try_into().ok()),
    }
}

pub(crate) fn recorded(response: pb::RecordResponse) -> Recorded {
    Recorded {
        record_id: response.record_id,
        charged_micros: response.charged_micros,
        released_micros: response.released_micros,
        balance_micros: response.balance_micros,
        cost_source: CostSource::from_number(response.cost_source),
        replayed: response.replayed,
        durability: Durability::from_number(response.durability),
        key_state: KeyState::from_number(response.key_state),
    }
}

pub(crate) fn explanation(response: pb::ExplainResponse) -> Explanation {
    let steps = response.steps.into_iter();
    Explanation {
        decision: decision(response.decision.unwrap_or_default()),
        steps: steps
            .map(|step| ExplainStep { check: step.check, result: step.result, detail: step.detail })
            .collect(),
    }
}

pub(crate) fn decisions(response: pb::BatchDecideResponse) -> Vec<Result<Decision, Error>> {
    use pb::batch_decide_result::Result as Wire;
    let results = response.results.into_iter();
    results
        .map(|each| match each.result {
            Some(Wire::Response(response)) => Ok(decision(response)),
            Some(Wire::Status(status)) => Err(Error::from_item(&status)),
            None => Err(Error::new(Code::Unknown, NO_ANSWER)),
        })
        .collect()
}

pub(crate) fn records(response: pb::BatchRecordResponse) -> Vec<Result<Recorded, Error>> {
    use pb::batch_record_result::Result as Wire;
    let results = response.results.into_iter();
    results
        .map(|each| match each.result {
            Some(Wire::Response(response)) => Ok(recorded(response)),
            Some(Wire::Status(status)) => Err(Error::from_item(&status)),
            None => Err(Error::new(Code::Unknown, NO_ANSWER)),
        })
        .collect()
}

fn duration(span: Duration) -> prost_types::Duration {
    span.try_into().unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 999_999_999 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::Outcome;

    #[test]
    fn a_new_request_id_is_a_random_uuid_without_dashes() {
        let id = new_request_id();
        assert_eq!(id.len(), 32);
        assert!(id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
        assert_eq!(&id[12..13], "4");
        assert!("89ab".contains(&id[16..17]));
        assert_ne!(id, new_request_id());
    }

    #[test]
    fn an_estimate_is_a_cost_or_tokens() {
        let both = DecideRequest {
            cost_micros: Some(0),
            max_output_tokens: Some(0),
            ..DecideRequest::new("u1", "openai")
        };
        assert!(matches!(decide_request(&both), Err(Error::Invalid(_))));
        let neither = decide_request(&DecideRequest::new("u1", "openai")).unwrap();
        assert_eq!(neither.estimate, None);
    }

    #[test]
    fn absent_usage_is_not_zero_and_error_texts_are_cut_by_characters() {
        let mut record = RecordRequest::new(SealedTicket::new("t"), Outcome::Success);
        record.usage = Some(Usage::default());
        record.error_message = "ü".repeat(501);
        let wire = record_request(&record);
        assert_eq!(wire.usage, None);
        assert_eq!(wire.error_message, "ü".repeat(500));
        record.usage = Some(Usage { output_tokens: Some(0), ..Usage::default() });
        assert_eq!(record_request(&record).usage, Some(pb::Usage::default()));
    }

    #[test]
    fn a_route_of_a_newer_sidecar_is_not_allowed() {
        let newer = pb::DecideResponse { mode: 99, ..Default::default() };
        let decision = decision(newer);
        assert_eq!(decision.mode, Mode::Unrecognized(99));
        assert!(!decision.allowed() && decision.settles().is_err());
    }
}
