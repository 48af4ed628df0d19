//! Statuses as typed errors.

use std::time::Duration;

use keyturn::{Code, DecideRequest, Error};

use crate::scripted::{Reply, Sidecar, any, details_header, error_info, nested, retry_info};

/// Two texts in the fields 1 and 2: a FieldViolation, or a ResourceInfo as far as it goes.
fn two_texts(first: &str, second: &str) -> keyturn_texts::Two {
    keyturn_texts::Two { first: first.into(), second: second.into() }
}

mod keyturn_texts {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Two {
        #[prost(string, tag = "1")]
        pub first: String,
        #[prost(string, tag = "2")]
        pub second: String,
    }

    /// An ErrorInfo with its metadata.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Info {
        #[prost(string, tag = "1")]
        pub reason: String,
        #[prost(btree_map = "string, string", tag = "3")]
        pub metadata: std::collections::BTreeMap<String, String>,
    }
}

async fn decide(sidecar: &Sidecar) -> Error {
    let once = keyturn::Retries { attempts: 1, ..Default::default() };
    let client = keyturn::Client::new(keyturn::Options { retries: once, ..sidecar.options() }).unwrap();
    client.decide(DecideRequest::new("u1", "openai")).await.unwrap_err()
}

#[tokio::test]
async fn every_detail_is_read() {
    let sidecar = Sidecar::new(|_, _| {
        let metadata = [("error_id".to_string(), "9f2c".to_string())].into();
        Reply::status(
            3,
            &[
                any(
                    "google.rpc.ErrorInfo",
                    &keyturn_texts::Info { reason: "INVALID_FIELD".into(), metadata },
                ),
                nested("google.rpc.BadRequest", &two_texts("user_id", "Required.")),
                retry_info(Duration::from_millis(1500)),
                any("google.rpc.ResourceInfo", &two_texts("user", "u1")),
                any("example.Unknown", &String::from("whatever")),
            ],
        )
    });
    let error = decide(&sidecar).await;
    let Error::InvalidArgument(fault) = &error else { panic!("{error:?}") };
    assert_eq!(error.to_string(), "INVALID_ARGUMENT (INVALID_FIELD): as scripted [user_id: Required.]");
    assert_eq!((error.reason(), error.code()), ("INVALID_FIELD", Some(Code::InvalidArgument)));
    assert_eq!(error.retry_after(), Some(Duration::from_millis(1500)));
    assert_eq!(fault.metadata["error_id"], "9f2c");
    let resource = fault.resource.as_ref().unwrap();
    assert_eq!((resource.kind.as_str(), resource.name.as_str()), ("user", "u1"));
}

#[tokio::test]
async fn garbled_details_never_mask_the_status() {
    let cut = prost_types::Any { value: vec![0x0a, 99], ..error_info("") };
    let negative = nested("google.rpc.RetryInfo", &prost_types::Duration { seconds: -5, nanos: 0 });
    let details = [
        "!!!not base64!!!".to_string(),
        "A".into(),
        "AB".into(),
        "////".into(),
        String::new(),
        details_header(5, &[cut]),
        details_header(5, &[negative]),
    ];
    for details in details {
        let sent = details.clone();
        let sidecar = Sidecar::new(move |_, _| Reply::Status {
            code: 5,
            message: "as scripted",
            details: Some(sent.clone()),
        });
        let error = decide(&sidecar).await;
        assert!(matches!(error, Error::NotFound(_)), "{details}: {error:?}");
        assert_eq!(error.to_string(), "NOT_FOUND: as scripted");
        assert!(error.retry_after().is_none_or(|wait| wait.is_zero()));
    }
}

#[tokio::test]
async fn every_status_has_its_kind() {
    type Kind = fn(&Error) -> bool;
    let kinds: [(i32, &str, Kind); 17] = [
        (1, "UNAVAILABLE", |error| matches!(error, Error::Unavailable(_))),
        (2, "UNKNOWN", |error| matches!(error, Error::Internal(_))),
        (3, "INVALID_ARGUMENT", |error| matches!(error, Error::InvalidArgument(_))),
        (4, "DEADLINE_EXCEEDED", |error| {
            matches!(error, Error::DeadlineExceeded(_)) && error.is_unavailable()
        }),
        (5, "NOT_FOUND", |error| matches!(error, Error::NotFound(_))),
        (6, "ALREADY_EXISTS", |error| matches!(error, Error::AlreadyExists(_))),
        (7, "PERMISSION_DENIED", |error| matches!(error, Error::PermissionDenied(_))),
        (8, "RESOURCE_EXHAUSTED", |error| matches!(error, Error::ResourceExhausted(_))),
        (9, "FAILED_PRECONDITION", |error| matches!(error, Error::FailedPrecondition(_))),
        (10, "ABORTED", |error| matches!(error, Error::Other(_))),
        (11, "OUT_OF_RANGE", |error| matches!(error, Error::Other(_))),
        (12, "UNIMPLEMENTED", |error| matches!(error, Error::Other(_))),
        (13, "INTERNAL", |error| matches!(error, Error::Internal(_))),
        (14, "UNAVAILABLE", |error| matches!(error, Error::Unavailable(_)) && error.is_unavailable()),
        (15, "DATA_LOSS", |error| matches!(error, Error::Internal(_))),
        (16, "UNAUTHENTICATED", |error| matches!(error, Error::Unauthenticated(_))),
        (77, "UNKNOWN", |error| matches!(error, Error::Internal(_))),
    ];
    for (code, word, is_kind) in kinds {
        let sidecar = Sidecar::new(move |_, _| Reply::bare(code));
        let error = decide(&sidecar).await;
        assert!(is_kind(&error), "{code}: {error:?}");
        assert_eq!(error.to_string(), format!("{word}: as scripted"));
    }
}
