//! Nothing prints a secret.

use std::fmt::Debug;

use keyturn::{Client, DecideRequest, HeaderMap, Options, Outcome, RecordRequest, SealedHandle};

use crate::scripted::{HANDLE, SECRET, Sidecar, TICKET, deciding, key, ticket};

const TOKEN: &str = "kta_canary-token-0123456789abcdef";
const CANARIES: [&str; 5] = [SECRET, HANDLE, TICKET, TOKEN, "canary-error-text"];

fn clean(text: &str) {
    for canary in CANARIES {
        // Also in the way that bytes print.
        let bytes = format!("{:?}", canary.as_bytes());
        for leak in [canary, bytes.trim_matches(['[', ']']), &canary[8..]] {
            assert!(!text.contains(leak), "{leak} is in {text}");
        }
    }
}

fn prints(value: &impl Debug) {
    clean(&format!("{value:?}"));
    clean(&format!("{value:#?}"));
}

#[tokio::test]
async fn nothing_that_is_given_out_prints_a_secret() {
    let sidecar = Sidecar::new(deciding([key(), ticket(), key()]));
    let options = Options { token: Some(TOKEN.into()), ..sidecar.options() };
    prints(&options);
    let client = Client::new(options).unwrap();
    prints(&client);
    let own = client.decide(DecideRequest::new("u1", "openai")).await.unwrap();
    let credit = client.decide(DecideRequest::new("u1", "openai")).await.unwrap();
    prints(&own);
    prints(&own.key().unwrap().headers().unwrap());
    prints(&credit);
    let mut call = client.request(DecideRequest::new("u1", "openai")).await.unwrap();
    prints(&call.headers(&HeaderMap::new()).unwrap());
    prints(&call);
    let mut record = RecordRequest::new(own.settles().unwrap(), Outcome::AuthRejected);
    record.error_message = "canary-error-text".into();
    prints(&record);
    let failed = SealedHandle::new(HANDLE);
    prints(&DecideRequest { failed_keys: vec![failed], ..DecideRequest::new("u1", "openai") });
    let shown = format!("{:?}", credit.ticket().unwrap());
    assert!(shown.contains("SealedTicket(ktt1_can…)"), "{shown}");
}
