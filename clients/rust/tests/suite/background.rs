//! Records in the background: sent, or unsent and told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use keyturn::{
    Client, DecideRequest, Error, Options, Outcome, RecordRequest, Retries, SealedTicket, Settles, Unsent,
};

use crate::pb;
use crate::scripted::{Reply, Sidecar, all_taken, deciding, each_taken, ticket, unavailable};

const QUICK: Retries =
    Retries { attempts: 5, first_delay: Duration::from_millis(1), max_delay: Duration::from_millis(2) };

fn numbered(number: usize) -> RecordRequest {
    RecordRequest::new(SealedTicket::new(format!("ticket-{number}")), Outcome::Success)
}

fn name(record: &pb::RecordRequest) -> String {
    match &record.settles {
        Some(pb::record_request::Settles::CreditTicket(ticket)) => ticket.clone(),
        other => panic!("{other:?}"),
    }
}

type Told = Arc<Mutex<Vec<Unsent>>>;

fn told(options: Options) -> (Client, Told) {
    let told = Told::default();
    let noted = told.clone();
    let on_unsent = move |unsent: &Unsent| noted.lock().unwrap().push(unsent.clone());
    let options = Options { retries: QUICK, on_unsent: Some(Arc::new(on_unsent)), ..options };
    (Client::new(options).unwrap(), told)
}

#[tokio::test]
async fn what_is_queued_goes_in_batches_of_a_hundred_in_order() {
    let sidecar = Sidecar::new(|seen, _| all_taken(seen));
    let (client, told) = told(sidecar.options());
    for number in 0..250 {
        client.record_later(numbered(number)).unwrap();
    }
    client.flush().await;
    let batches = sidecar.seen("BatchRecord");
    let sizes: Vec<_> =
        batches.iter().map(|seen| seen.message::<pb::BatchRecordRequest>().requests.len()).collect();
    assert_eq!(sizes, [100, 100, 50]);
    let names: Vec<_> = sidecar.records().iter().map(name).collect();
    assert_eq!(names, (0..250).map(|number| format!("ticket-{number}")).collect::<Vec<_>>());
    assert!(client.close().await.is_empty() && told.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_batch_that_fails_is_sent_again_until_it_is_taken() {
    let sidecar = Sidecar::new(|seen, before| match before {
        0 => Reply::Close,
        1 => unavailable("STORE_UNAVAILABLE"),
        2 => Reply::bare(8),
        3 => Reply::bare(4),
        4..12 => Reply::bare(14),
        _ => all_taken(seen),
    });
    let (client, told) = told(sidecar.options());
    client.record_later(numbered(1)).unwrap();
    client.flush().await;
    assert_eq!(sidecar.seen("BatchRecord").len(), 13);
    assert!(client.close().await.is_empty() && told.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_item_that_may_pass_later_holds_up_no_other_and_what_is_refused_is_unsent() {
    let locked = Arc::new(Mutex::new(3));
    let sidecar = Sidecar::new(move |seen, _| {
        each_taken(seen, |record| match name(record).as_str() {
            "ticket-1" if *locked.lock().unwrap() > 0 => {
                *locked.lock().unwrap() -= 1;
                Err(14)
            }
            "ticket-2" => Err(6),
            _ => Ok(()),
        })
    });
    let (client, told) = told(sidecar.options());
    for number in 0..4 {
        client.record_later(numbered(number)).unwrap();
    }
    client.flush().await;
    let mut times = std::collections::BTreeMap::<_, usize>::new();
    for record in sidecar.records() {
        *times.entry(name(&record)).or_default() += 1;
    }
    assert_eq!(times.into_values().collect::<Vec<_>>(), [1, 4, 1, 1]);
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 1);
    assert!(matches!(told[0].error, Error::AlreadyExists(_)));
    assert_eq!(told[0].record, numbered(2));
}

#[tokio::test]
async fn a_batch_that_is_refused_is_unsent() {
    let sidecar = Sidecar::new(|_, _| Reply::bare(16));
    let (client, told) = told(sidecar.options());
    client.record_later(numbered(1)).unwrap();
    client.flush().await;
    assert!(matches!(told.lock().unwrap()[0].error, Error::Unauthenticated(_)));
    assert!(client.close().await.is_empty());
}

#[tokio::test]
async fn a_record_that_is_too_large_does_not_come_again_for_ever() {
    let sidecar = Sidecar::new(|_, _| Reply::bare(8));
    let (client, told) = told(sidecar.options());
    client.record_later(RecordRequest { model: "m".repeat(70_000), ..numbered(1) }).unwrap();
    client.flush().await;
    assert!(matches!(told.lock().unwrap()[0].error, Error::ResourceExhausted(_)));
}

#[tokio::test]
async fn a_full_queue_gives_the_record_back_and_a_call_reports_it() {
    let sidecar = Sidecar::new(|seen, before| match seen.method.as_str() {
        "BatchRecord" => Reply::Silence,
        _ => deciding([ticket()])(seen, before),
    });
    let short = Options { queue_size: 2, close_timeout: Duration::from_millis(50), ..sidecar.options() };
    let (client, told) = told(short);
    let call = client.request(DecideRequest::new("u1", "openai")).await.unwrap();
    client.record_later(numbered(1)).unwrap();
    client.record_later(numbered(2)).unwrap();
    let refused = client.record_later(numbered(3)).unwrap_err();
    assert!(matches!(refused.error, Error::QueueFull));
    assert_eq!(refused.record, numbered(3));
    assert!(told.lock().unwrap().is_empty());
    drop(call);
    assert!(matches!(told.lock().unwrap()[0].error, Error::QueueFull));
    assert_eq!(client.close().await.len(), 2);
}

#[tokio::test]
async fn close_gives_up_in_time_and_gives_back_what_is_left() {
    let mut sidecar = Sidecar::new(|seen, _| all_taken(seen));
    let (client, told) = told(Options { close_timeout: Duration::from_millis(50), ..sidecar.options() });
    client.record_later(numbered(0)).unwrap();
    client.flush().await;
    sidecar.stop().await;
    client.record_later(numbered(1)).unwrap();
    client.record_later(numbered(2)).unwrap();
    let left = client.close().await;
    let settled: Vec<_> = left.iter().map(|unsent| unsent.record.settles.clone()).collect();
    assert_eq!(settled, ["ticket-1", "ticket-2"].map(|text| Settles::from(SealedTicket::new(text))));
    assert!(matches!(left[0].error, Error::Unavailable(_)), "{:?}", left[0].error);
    assert_eq!(told.lock().unwrap().len(), 2);
    assert!(client.close().await.is_empty());
}

#[tokio::test]
async fn a_callback_that_panics_does_not_stop_the_sender() {
    let sidecar = Sidecar::new(|seen, before| if before == 0 { Reply::bare(3) } else { all_taken(seen) });
    let options = Options { on_unsent: Some(Arc::new(|_| panic!("on purpose"))), ..sidecar.options() };
    let client = Client::new(options).unwrap();
    client.record_later(numbered(1)).unwrap();
    client.flush().await;
    client.record_later(numbered(2)).unwrap();
    client.flush().await;
    assert_eq!(sidecar.seen("BatchRecord").len(), 2);
}

#[tokio::test]
async fn a_client_that_is_dropped_sends_what_it_has() {
    let sidecar = Sidecar::new(|seen, _| all_taken(seen));
    let client = sidecar.client();
    for number in 0..101 {
        client.record_later(numbered(number)).unwrap();
    }
    drop(client);
    sidecar.called("BatchRecord", 2).await;
    assert_eq!(sidecar.records().len(), 101);
}

#[test]
fn a_runtime_that_ends_leaves_nothing_in_silence() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (client, told) = told(Options::to("unix:/nonexistent/k.sock"));
    runtime.block_on(async { client.record_later(numbered(1)).unwrap() });
    drop(runtime);
    assert_eq!(told.lock().unwrap().len(), 1);
    assert!(matches!(client.record_later(numbered(2)).unwrap_err().error, Error::Closed));
}

#[test]
fn a_record_that_is_queued_outside_of_any_runtime_waits_for_one() {
    let (client, told) = told(Options::to("unix:/nonexistent/k.sock"));
    client.record_later(numbered(1)).unwrap();
    let closing = client.with_timeout(Duration::from_secs(1));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    assert_eq!(runtime.block_on(closing.close()).len(), 1);
    assert!(matches!(told.lock().unwrap()[0].error, Error::Unavailable(_)));
}
