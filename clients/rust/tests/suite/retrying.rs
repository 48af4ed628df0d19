//! What is tried again, how long, and what it costs when nobody is there.

use std::time::Duration;

use http::StatusCode;
use keyturn::{
    Client, DecideRequest, Error, Options, Outcome, RecordRequest, Retries, SealedHandle, SealedTicket,
};

use crate::pb;
use crate::scripted::{Reply, Sidecar, deciding, error_info, retry_info, taken, ticket, unavailable};

const QUICK: Retries =
    Retries { attempts: 5, first_delay: Duration::from_millis(1), max_delay: Duration::from_millis(2) };

fn quick(sidecar: &Sidecar) -> Client {
    Client::new(Options { retries: QUICK, ..sidecar.options() }).unwrap()
}

fn asked() -> DecideRequest {
    DecideRequest::new("u1", "openai")
}

#[tokio::test]
async fn unavailable_is_tried_again_with_the_same_request_id() {
    let sidecar = Sidecar::new(|seen, before| match before {
        0..3 => unavailable("STORE_UNAVAILABLE"),
        _ => deciding([ticket()])(seen, before),
    });
    assert!(quick(&sidecar).decide(asked()).await.unwrap().allowed());
    let mut ids: Vec<_> =
        sidecar.seen("Decide").iter().map(|seen| seen.message::<pb::DecideRequest>().request_id).collect();
    assert_eq!(ids.len(), 4);
    ids.dedup();
    assert_eq!(ids.len(), 1);
}

#[tokio::test]
async fn attempts_end_and_nothing_else_is_tried_again() {
    let sidecar = Sidecar::new(|seen, _| match seen.message::<pb::DecideRequest>().user_id.as_str() {
        "u1" => unavailable("STORE_UNAVAILABLE"),
        "1" => Reply::status(1, &[error_info("X")]),
        code => Reply::bare(code.parse().unwrap()),
    });
    let client = quick(&sidecar);
    assert!(matches!(client.decide(asked()).await, Err(Error::Unavailable(_))));
    assert_eq!(sidecar.seen("Decide").len(), 5);
    for code in ["1", "2", "4", "8", "13"] {
        assert!(client.decide(DecideRequest::new(code, "openai")).await.is_err());
    }
    assert_eq!(sidecar.seen("Decide").len(), 10);
}

#[tokio::test]
async fn a_call_that_the_sidecar_dropped_as_it_ended_is_tried_again() {
    let sidecar = Sidecar::new(|seen, before| match before {
        0 => Reply::bare(1),
        _ => deciding([ticket()])(seen, before),
    });
    assert!(quick(&sidecar).decide(asked()).await.unwrap().allowed());
    assert_eq!(sidecar.seen("Decide").len(), 2);
}

#[tokio::test]
async fn a_call_that_its_caller_drops_is_not_tried_again() {
    let sidecar = Sidecar::new(|seen, before| match seen.method.as_str() {
        "Explain" => Reply::Silence,
        _ => deciding([ticket()])(seen, before),
    });
    let client = quick(&sidecar);
    tokio::select! {
        answer = client.explain(asked()) => panic!("{answer:?}"),
        _ = sidecar.called("Explain", 1) => {}
    }
    for _ in 0..20 {
        assert!(client.decide(asked()).await.unwrap().allowed());
    }
    assert_eq!(sidecar.seen("Explain").len(), 1);
}

#[tokio::test]
async fn redeem_is_never_tried_again_and_the_others_are() {
    let sidecar = Sidecar::new(|_, _| unavailable("STORE_UNAVAILABLE"));
    let client = quick(&sidecar);
    let record = RecordRequest::new(SealedTicket::new("t"), Outcome::Success);
    assert!(client.redeem(&SealedHandle::new("h")).await.is_err());
    assert!(client.record(record.clone()).await.is_err());
    assert!(client.record_many([record]).await.is_err());
    assert!(client.explain(asked()).await.is_err());
    assert!(client.decide_many([asked()]).await.is_err());
    let calls = ["Redeem", "Record", "BatchRecord", "Explain", "BatchDecide"];
    assert_eq!(calls.map(|method| sidecar.seen(method).len()), [1, 5, 5, 5, 5]);
}

#[tokio::test]
async fn a_wait_that_does_not_fit_in_the_deadline_is_not_begun() {
    let details = [error_info("STORE_UNAVAILABLE"), retry_info(Duration::from_secs(3600))];
    let sidecar = Sidecar::new(move |_, _| Reply::status(14, &details));
    let error = quick(&sidecar).decide(asked()).await.unwrap_err();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(3600)));
    assert_eq!(sidecar.seen("Decide").len(), 1);
}

#[tokio::test]
async fn the_deadline_covers_everything_and_reaches_the_sidecar() {
    let sidecar = Sidecar::new(|_, _| Reply::Silence);
    let client = quick(&sidecar).with_timeout(Duration::from_millis(50));
    let error = client.decide(asked()).await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded(_)) && error.is_unavailable(), "{error}");
    let sent = sidecar.called("Decide", 1).await[0].headers["grpc-timeout"].to_str().unwrap().to_string();
    let micros: u64 = match sent.split_at(sent.len() - 1) {
        (nanos, "n") => nanos.parse::<u64>().unwrap() / 1000,
        (micros, "u") => micros.parse().unwrap(),
        other => panic!("{other:?}"),
    };
    assert!(micros <= 50_000);
}

#[tokio::test]
async fn whatever_breaks_on_the_way_is_unavailable_and_tried_again() {
    let broken: [fn() -> Reply; 5] = [
        || Reply::Close,
        || Reply::Reset,
        || Reply::CutOff,
        || Reply::Page(StatusCode::BAD_GATEWAY),
        || Reply::Page(StatusCode::SERVICE_UNAVAILABLE),
    ];
    for (nth, reply) in broken.into_iter().enumerate() {
        let sidecar = Sidecar::new(move |seen, before| match before {
            0..2 => reply(),
            _ => deciding([ticket()])(seen, before),
        });
        let once = Retries { attempts: 1, ..QUICK };
        let client = Client::new(Options { retries: once, ..sidecar.options() }).unwrap();
        let error = client.decide(asked()).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{nth}: {error:?}");
        assert!(quick(&sidecar).decide(asked()).await.unwrap().allowed(), "{nth}");
    }
}

#[tokio::test]
async fn a_page_that_no_sidecar_made_is_an_error_of_its_own() {
    let sidecar = Sidecar::new(|_, _| Reply::Page(StatusCode::NOT_FOUND));
    assert!(matches!(quick(&sidecar).decide(asked()).await, Err(Error::Other(_))));
}

#[tokio::test]
async fn a_sidecar_that_is_down_costs_one_attempt_until_it_answers() {
    let sidecar = Sidecar::new(|seen, before| match (seen.method.as_str(), before) {
        ("Decide", 0..7) => Reply::bare(14),
        ("Decide", 7) => Reply::bare(5),
        ("Decide", 8) => unavailable("STORE_UNAVAILABLE"),
        _ => deciding([ticket()])(seen, before),
    });
    let client = quick(&sidecar);
    let calls = async || {
        let before = sidecar.seen("Decide").len();
        let answer = client.decide(asked()).await;
        (answer.is_ok(), sidecar.seen("Decide").len() - before)
    };
    assert_eq!(calls().await, (false, 5)); // down from here
    assert_eq!(calls().await, (false, 1));
    assert_eq!(calls().await, (false, 1));
    assert_eq!(calls().await, (false, 1)); // NOT_FOUND: it is there again
    assert_eq!(calls().await, (true, 2));
}

#[tokio::test]
async fn a_deadline_or_a_store_that_is_away_is_no_sidecar_that_is_down() {
    let sidecar = Sidecar::new(|seen, before| match (seen.method.as_str(), before) {
        ("Explain", _) => Reply::Silence,
        ("Decide", 0..5) => unavailable("STORE_UNAVAILABLE"),
        ("Decide", 5..7) => Reply::bare(14),
        _ => deciding([ticket()])(seen, before),
    });
    let client = quick(&sidecar);
    assert!(client.decide(asked()).await.is_err());
    let late = client.with_timeout(Duration::from_millis(20)).explain(asked()).await;
    assert!(matches!(late, Err(Error::DeadlineExceeded(_))));
    assert!(client.decide(asked()).await.unwrap().allowed());
    assert_eq!(sidecar.seen("Decide").len(), 8);
}

#[tokio::test]
async fn nobody_there_fails_at_once_and_a_restart_is_found_again() {
    let mut sidecar = Sidecar::new(|seen, before| match seen.method.as_str() {
        "Record" => Reply::message(taken()),
        _ => deciding([ticket()])(seen, before),
    });
    let client = quick(&sidecar);
    assert!(client.decide(asked()).await.is_ok());
    for _ in 0..3 {
        sidecar.stop().await;
        let error = client.decide(asked()).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        assert_eq!(error.reason(), "");
        sidecar.start();
        let error = client.decide(asked()).await.err();
        assert!(error.is_none(), "{error:?}");
    }
}
