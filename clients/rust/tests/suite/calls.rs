//! What is asked and recorded, and what becomes of it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use keyturn::{
    Constraint, DecideRequest, Error, Failure, HeaderMap, Mode, Note, Options, Outcome, RecordRequest,
    RequestError, Route, SealedHandle, SealedTicket, Usage,
};

use crate::pb;
use crate::scripted::{HANDLE, Reply, SECRET, Sidecar, TICKET, deciding, denial, key, ticket};

fn asked() -> DecideRequest {
    DecideRequest::new("u1", "openai")
}

fn platform() -> HeaderMap {
    HeaderMap::from_iter([(http::header::AUTHORIZATION, "Bearer platform".parse().unwrap())])
}

#[tokio::test]
async fn a_decision_asks_for_the_secret_and_has_an_id_of_its_own() {
    let sidecar = Sidecar::new(deciding([key()]));
    let options = Options { token: Some("  t0ken\n".into()), ..sidecar.options() };
    let decision = keyturn::Client::new(options).unwrap().decide(asked()).await.unwrap();

    assert_eq!(decision.mode, Mode::ByokFirst);
    assert_eq!(decision.key().unwrap().secret.as_ref().unwrap().reveal(), SECRET);
    assert!(decision.key().unwrap().expires_at.is_some());
    let seen = sidecar.seen("Decide").remove(0);
    let request: pb::DecideRequest = seen.message();
    assert_eq!(request.request_id.len(), 32);
    assert_eq!(request.key_delivery(), pb::KeyDelivery::Inline);
    assert_eq!(request.estimate, None);
    assert_eq!(seen.authority, "localhost");
    assert_eq!(seen.headers["authorization"], "Bearer t0ken");
    assert!(seen.headers["user-agent"].to_str().unwrap().starts_with("keyturn-rust/0.1.0"));
    assert!(seen.headers.contains_key("grpc-timeout"));
}

#[tokio::test]
async fn everything_that_is_asked_arrives() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let request = DecideRequest {
        model: "gpt-4o".into(),
        service_type: "copilot".into(),
        request_id: Some("mine".into()),
        input_tokens: Some(10),
        constraint: Constraint::CreditsOnly,
        failed_keys: vec![SealedHandle::new("h1")],
        redeem: true,
        hold_ttl: Some(Duration::from_millis(1500)),
        ..asked()
    };
    sidecar.client().decide(request).await.unwrap();
    let expected = pb::DecideRequest {
        request_id: "mine".into(),
        user_id: "u1".into(),
        provider: "openai".into(),
        model: "gpt-4o".into(),
        service_type: "copilot".into(),
        estimate: Some(pb::decide_request::Estimate::Tokens(pb::TokenEstimate {
            input_tokens: 10,
            max_output_tokens: 0,
        })),
        constraint: pb::Constraint::CreditsOnly.into(),
        failed_key_handles: vec!["h1".into()],
        key_delivery: pb::KeyDelivery::Redeem.into(),
        hold_ttl: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
    };
    assert_eq!(sidecar.seen("Decide")[0].message::<pb::DecideRequest>(), expected);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_before_it_is_sent() {
    let sidecar = Sidecar::new(deciding([denial()]));
    let client = sidecar.client();
    let both = DecideRequest { cost_micros: Some(1), input_tokens: Some(1), ..asked() };
    assert!(matches!(client.decide(both.clone()).await, Err(Error::Invalid(_))));
    assert!(matches!(client.decide_many([both]).await, Err(Error::Invalid(_))));
    assert!(matches!(client.with_timeout(Duration::ZERO).decide(asked()).await, Err(Error::Invalid(_))));
    assert!(client.decide_many([]).await.unwrap().is_empty());
    assert!(client.record_many([]).await.unwrap().is_empty());
    assert!(sidecar.seen("Decide").is_empty() && sidecar.seen("BatchDecide").is_empty());
    let denied = client.decide(asked()).await.unwrap();
    assert!(!denied.allowed());
    assert!(matches!(denied.settles(), Err(Error::Invalid(_))));
}

#[tokio::test]
async fn a_batch_has_an_answer_or_an_error_for_each_item() {
    use pb::batch_decide_result::Result as Item;
    let sidecar = Sidecar::new(|seen, before| {
        let missing = pb::Status { code: 5, message: "no such user".into(), details: vec![] };
        let mut results = vec![Item::Response(ticket()), Item::Status(missing)];
        results.truncate(if before == 0 { 2 } else { 1 });
        assert_eq!(seen.message::<pb::BatchDecideRequest>().requests.len(), 2);
        let results = results.into_iter().map(|item| pb::BatchDecideResult { result: Some(item) }).collect();
        Reply::message(pb::BatchDecideResponse { results })
    });
    let client = sidecar.client();
    let results = client.decide_many([asked(), asked()]).await.unwrap();
    assert!(results[0].as_ref().unwrap().allowed());
    assert!(matches!(results[1], Err(Error::NotFound(_))));
    assert!(matches!(client.decide_many([asked(), asked()]).await, Err(Error::Internal(_))));
}

#[tokio::test]
async fn words_and_routes_of_a_newer_sidecar_fail_no_call() {
    let newer = pb::DecideResponse { mode: 99, reason: 98, ..Default::default() };
    let sidecar = Sidecar::new(deciding([newer]));
    let client = sidecar.client();
    let decision = client.decide(asked()).await.unwrap();
    assert_eq!((decision.mode, decision.allowed()), (Mode::Unrecognized(99), false));
    assert!(matches!(client.request(asked()).await, Err(RequestError::Denied(_))));
    let record = RecordRequest::new(SealedTicket::new(TICKET), Outcome::Unrecognized(42));
    client.record(record).await.unwrap();
    assert_eq!(sidecar.records()[0].outcome, 42);
}

#[tokio::test]
async fn a_call_is_recorded_once_by_what_was_said_of_it() {
    use pb::Outcome as Wire;
    type Say = fn(&mut keyturn::Call);
    let cases: [(Say, Wire); 7] = [
        (|_| {}, Wire::NeverSent),
        (|call| call.sending().unwrap(), Wire::ClientCancelled),
        (|call| drop(call.headers(&platform()).unwrap()), Wire::ClientCancelled),
        (|call| call.cost(5).unwrap(), Wire::ClientCancelled),
        (|call| call.succeeded().unwrap(), Wire::Success),
        (|call| call.failed(Outcome::Timeout, Failure::default()).unwrap(), Wire::Timeout),
        (
            |call| {
                call.failed(Outcome::Refused, Failure::status(400)).unwrap();
                call.succeeded().unwrap();
            },
            Wire::Refused,
        ),
    ];
    for (say, outcome) in cases {
        let sidecar = Sidecar::new(deciding([ticket()]));
        let client = sidecar.client();
        let mut call = client.request(asked()).await.unwrap();
        say(&mut call);
        drop(call);
        client.flush().await;
        let records = sidecar.records();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].outcome(), outcome);
        assert_eq!(records[0].settles, Some(pb::record_request::Settles::CreditTicket(TICKET.into())));
        assert!(client.close().await.is_empty());
    }
}

#[tokio::test]
async fn finish_records_in_the_foreground_with_everything_noted() {
    let sidecar = Sidecar::new(deciding([key()]));
    let mut call = sidecar.client().request(asked()).await.unwrap();
    assert_eq!(call.headers(&platform()).unwrap()["authorization"], format!("Bearer {SECRET}"));
    assert_eq!(call.secret().unwrap().unwrap().reveal(), SECRET);
    call.used(Usage { input_tokens: Some(1), output_tokens: Some(2), ..Usage::default() }).unwrap();
    call.used(Usage { output_tokens: Some(5), ..Usage::default() }).unwrap();
    call.cost(70).unwrap();
    call.note(Note { model: Some("m".into()), http_status: Some(200), ..Note::default() }).unwrap();
    call.note(Note { endpoint: Some("/v1".into()), ..Note::default() }).unwrap();
    let recorded = call.finish().await.unwrap().unwrap();
    assert_eq!(recorded.charged_micros, 7);

    let expected = pb::RecordRequest {
        settles: Some(pb::record_request::Settles::KeyHandle(HANDLE.into())),
        outcome: pb::Outcome::Success.into(),
        usage: Some(pb::Usage { input_tokens: 1, output_tokens: 5, ..Default::default() }),
        cost_micros: Some(70),
        model: "m".into(),
        endpoint: "/v1".into(),
        http_status: 200,
        ..Default::default()
    };
    assert_eq!(sidecar.records(), [expected]);

    // It has ended: it can be read, and nothing else.
    assert!(call.key().is_some() && call.unrecorded().is_none());
    assert!(matches!(call.sending(), Err(Error::Invalid(_))));
    assert!(matches!(call.used(Usage::default()), Err(Error::Invalid(_))));
    assert!(matches!(call.headers(&platform()), Err(Error::Invalid(_))));
    assert!(matches!(call.finish().await, Err(Error::Invalid(_))));
    drop(call);
    assert_eq!(sidecar.records().len(), 1);
}

#[tokio::test]
async fn a_finish_that_fails_leaves_its_record_with_the_caller() {
    let sidecar = Sidecar::new(|seen, _| match seen.method.as_str() {
        "Decide" => Reply::message(ticket()),
        _ => Reply::bare(9),
    });
    let mut call = sidecar.client().request(asked()).await.unwrap();
    assert!(matches!(call.finish().await, Err(Error::FailedPrecondition(_))));
    assert_eq!(call.unrecorded().unwrap().outcome, Outcome::Success);
    assert!(call.failed(Outcome::Success, Failure::default()).is_err());
}

#[tokio::test]
async fn a_refused_key_is_recorded_and_left_out_of_the_next_decision() {
    let sidecar = Sidecar::new(deciding([key(), ticket()]));
    let client = sidecar.client();
    let mut call = client.request(asked()).await.unwrap();
    call.used(Usage { input_tokens: Some(9), ..Usage::default() }).unwrap();
    call.key_refused(Outcome::AuthRejected, Failure::status(401)).await.unwrap();

    let asked: Vec<pb::DecideRequest> = sidecar.seen("Decide").iter().map(|seen| seen.message()).collect();
    assert_eq!(asked[0].request_id, asked[1].request_id);
    assert_eq!(asked[1].failed_key_handles, [HANDLE]);
    assert_eq!(call.request_id(), asked[0].request_id);
    let records = sidecar.records();
    assert_eq!((records[0].outcome(), records[0].http_status), (pb::Outcome::AuthRejected, 401));
    // The new route has nothing noted, and credits have no key to refuse.
    assert_eq!(call.headers(&platform()).unwrap(), platform());
    let again = call.key_refused(Outcome::AuthRejected, Failure::status(401)).await;
    assert!(matches!(again, Err(RequestError::Fault(Error::Invalid(_)))));
    call.finish().await.unwrap();
    assert_eq!(sidecar.records()[1].usage, None);
}

#[tokio::test]
async fn a_call_whose_last_key_is_refused_ends_denied() {
    let sidecar = Sidecar::new(deciding([key(), denial()]));
    let client = sidecar.client();
    let mut call = client.request(asked()).await.unwrap();
    match call.key_refused(Outcome::RateLimited, Failure::status(429)).await {
        Err(RequestError::Denied(denied)) => {
            assert_eq!(denied.to_string(), "HOLDS_IN_FLIGHT: Nobody pays.");
            assert_eq!(denied.decision.denial().unwrap().retry_after, Some(Duration::from_secs(3)));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(call.succeeded(), Err(Error::Invalid(_))));
    drop(call);
    client.flush().await;
    assert_eq!(sidecar.records().len(), 1);
    assert!(matches!(client.request(asked()).await, Err(RequestError::Denied(_))));
}

#[tokio::test]
async fn when_down_lets_a_request_pass_unmetered_and_is_asked_for_nothing_else() {
    let mut sidecar = Sidecar::new(|seen, _| match seen.message::<pb::DecideRequest>().user_id.as_str() {
        "missing" => Reply::bare(5),
        _ => Reply::message(denial()),
    });
    let questions = Arc::new(Mutex::new(Vec::new()));
    let noted = questions.clone();
    let client = keyturn::Client::new(Options {
        when_down: Some(Arc::new(move |request, error| {
            noted.lock().unwrap().push((request.user_id.clone(), error.is_unavailable()));
            request.user_id == "u1"
        })),
        ..sidecar.options()
    })
    .unwrap();
    assert!(client.decide(DecideRequest::new("missing", "openai")).await.is_err());
    assert!(client.request(asked()).await.is_err());
    assert!(questions.lock().unwrap().is_empty());

    sidecar.stop().await;
    let mut call = client.request(asked()).await.unwrap();
    assert!(matches!(call.decision().route, Route::Unmetered));
    assert!(call.decision().allowed() && call.key().is_none() && call.ticket().is_none());
    assert_eq!(call.headers(&platform()).unwrap(), platform());
    assert!(call.finish().await.unwrap().is_none());
    drop(client.request(asked()).await.unwrap());
    let failed = client.request(DecideRequest::new("u2", "openai")).await;
    assert!(matches!(failed, Err(RequestError::Fault(Error::Unavailable(_)))));
    let expected = [("u1", true), ("u1", true), ("u2", true)].map(|(user, down)| (user.to_string(), down));
    assert_eq!(*questions.lock().unwrap(), expected);
    assert!(client.close().await.is_empty());
}

#[tokio::test]
async fn a_dropped_decision_leaves_no_hold_behind() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let client = sidecar.client();
    // Begun, and dropped before it is answered: the RPC goes on by itself.
    tokio::select! {
        biased;
        _ = client.decide(asked()) => panic!("nobody can have answered"),
        () = std::future::ready(()) => {}
    }
    tokio::select! {
        biased;
        _ = client.request(asked()) => panic!("nobody can have answered"),
        () = std::future::ready(()) => {}
    }
    // Closing waits for what is under way.
    assert!(client.close().await.is_empty());
    let outcomes: Vec<_> = sidecar.records().iter().map(pb::RecordRequest::outcome).collect();
    assert_eq!(outcomes, [pb::Outcome::NeverSent, pb::Outcome::NeverSent]);
}

#[tokio::test]
async fn a_dropped_decision_of_a_dropped_client_leaves_no_hold_either() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let client = sidecar.client();
    tokio::select! {
        biased;
        _ = client.decide(asked()) => panic!("nobody can have answered"),
        () = std::future::ready(()) => {}
    }
    drop(client);
    sidecar.called("BatchRecord", 1).await;
    assert_eq!(sidecar.records()[0].outcome(), pb::Outcome::NeverSent);
}

#[tokio::test]
async fn a_dropped_decision_with_the_callers_id_is_expected_again() {
    let sidecar = Sidecar::new(|seen, before| match (seen.method.as_str(), before) {
        ("Decide", 0) => Reply::Silence,
        _ => deciding([ticket()])(seen, before),
    });
    let client = sidecar.client();
    let mine = || DecideRequest { request_id: Some("mine".into()), ..asked() };
    tokio::select! {
        _ = client.decide(mine()) => panic!("nobody answers"),
        _ = sidecar.called("Decide", 1) => {}
    }
    assert!(client.decide(mine()).await.unwrap().allowed());
    assert!(client.close().await.is_empty());
    assert!(sidecar.records().is_empty());
}

#[tokio::test]
async fn a_dropped_record_is_carried_on_in_the_background() {
    let sidecar = Sidecar::new(|seen, before| match seen.method.as_str() {
        "Record" => Reply::Silence,
        _ => deciding([ticket()])(seen, before),
    });
    let client = sidecar.client();
    let record = RecordRequest::new(SealedTicket::new(TICKET), Outcome::Success);
    tokio::select! {
        _ = client.record(record) => panic!("nobody answers"),
        _ = sidecar.called("Record", 1) => {}
    }
    let mut call = client.request(asked()).await.unwrap();
    tokio::select! {
        _ = call.finish() => panic!("nobody answers"),
        _ = sidecar.called("Record", 2) => {}
    }
    drop(call);
    client.flush().await;
    let batched: usize = sidecar
        .seen("BatchRecord")
        .iter()
        .map(|seen| seen.message::<pb::BatchRecordRequest>().requests.len())
        .sum();
    assert_eq!(batched, 2);
}

#[tokio::test]
async fn redeem_and_explain_answer() {
    let sidecar = Sidecar::new(|seen, _| match seen.method.as_str() {
        "Redeem" => {
            assert_eq!(seen.message::<pb::RedeemRequest>().key_handle, HANDLE);
            Reply::message(pb::RedeemResponse { secret: SECRET.into() })
        }
        _ => Reply::message(pb::ExplainResponse {
            decision: Some(denial()),
            steps: vec![pb::ExplainStep { check: "tier".into(), ..Default::default() }],
        }),
    });
    let client = sidecar.client();
    assert_eq!(client.redeem(&SealedHandle::new(HANDLE)).await.unwrap().reveal(), SECRET);
    let explained = client.explain(asked()).await.unwrap();
    assert!(!explained.decision.allowed());
    assert_eq!(explained.steps[0].check, "tier");
}

#[tokio::test]
async fn after_close_every_call_fails_as_closed() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let client = sidecar.client();
    let mut call = client.request(asked()).await.unwrap();
    client.close().await;
    let record = RecordRequest::new(SealedTicket::new(TICKET), Outcome::Success);
    assert!(matches!(client.decide(asked()).await, Err(Error::Closed)));
    assert!(matches!(client.request(asked()).await, Err(RequestError::Fault(Error::Closed))));
    assert!(matches!(client.record(record.clone()).await, Err(Error::Closed)));
    assert!(matches!(client.redeem(&SealedHandle::new("h")).await, Err(Error::Closed)));
    assert!(matches!(client.explain(asked()).await, Err(Error::Closed)));
    assert!(matches!(client.decide_many([]).await, Err(Error::Closed)));
    assert!(matches!(client.record_later(record).unwrap_err().error, Error::Closed));
    assert!(matches!(call.finish().await, Err(Error::Closed)));
    assert!(call.unrecorded().is_some());
    assert!(client.close().await.is_empty());
}
