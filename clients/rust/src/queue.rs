//! Records in the background: kept in order until they are sent or unsent.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::error::{Code, Error};
use crate::link::{LONGEST, Link};
use crate::model::{RecordRequest, Recorded, Unsent};
use crate::options::{OnUnsent, Options};
use crate::pb;
use crate::retries::Retries;
use crate::wire;

const BATCH: usize = 100;
/// Below the sidecar's limit of 1 MiB, with room for what frames the items.
const BATCH_BYTES: usize = 1_000_000;
/// The sidecar's limit of one record. What is larger can never get through.
const RECORD_BYTES: usize = 65_536;
const BATCH_TIMEOUT: Duration = Duration::from_secs(10);

/// What waits to be sent, and the one task that sends it.
pub(crate) struct Queue {
    link: Arc<Link>,
    size: usize,
    close_timeout: Duration,
    retries: Retries,
    on_unsent: Option<OnUnsent>,
    state: Mutex<State>,
    /// There is something for the sender to do.
    wake: Notify,
    /// Something went, or ended.
    moved: Notify,
}

#[derive(Default)]
struct State {
    /// By number: the oldest first. What is being sent stays here until it is answered.
    items: VecDeque<Item>,
    numbers: u64,
    sender: Sender,
    /// Whole batches that failed in a row, and until when not to send another.
    failures: u32,
    paused: Option<Instant>,
    /// When to give up: set by closing.
    ends: Option<Instant>,
    /// Decisions under way that nobody may wait for any more, and that may leave a record.
    deciding: usize,
    /// What the end of the sender left.
    left: Vec<Unsent>,
}

#[derive(Default, PartialEq)]
enum Sender {
    #[default]
    NotYet,
    Runs,
    Ended,
}

struct Item {
    number: u64,
    record: RecordRequest,
    made: u32,
    due: Instant,
    error: Option<Error>,
}

enum Next {
    Send(Vec<(u64, pb::RecordRequest)>),
    Wait(Option<Instant>),
    End,
}

impl Queue {
    pub(crate) fn new(link: Arc<Link>, options: &Options) -> Arc<Self> {
        Arc::new(Self {
            link,
            size: options.queue_size,
            close_timeout: options.close_timeout,
            retries: options.retries,
            on_unsent: options.on_unsent.clone(),
            state: Mutex::default(),
            wake: Notify::new(),
            moved: Notify::new(),
        })
    }

    /// Takes a record, or gives it back with the reason.
    pub(crate) fn push(self: &Arc<Self>, record: RecordRequest) -> Result<(), Box<Unsent>> {
        let mut state = self.state();
        let refused = if state.ends.is_some() || state.sender == Sender::Ended {
            Some(Error::Closed)
        } else {
            (state.items.len() >= self.size).then_some(Error::QueueFull)
        };
        if let Some(error) = refused {
            return Err(Box::new(Unsent { record, error }));
        }
        let number = state.numbers;
        state.numbers += 1;
        state.items.push_back(Item { number, record, made: 0, due: Instant::now(), error: None });
        drop(state);
        self.start();
        Ok(())
    }

    /// Takes a record that nobody would take back: what is refused is unsent.
    pub(crate) fn push_or_report(self: &Arc<Self>, record: RecordRequest) {
        if let Err(unsent) = self.push(record) {
            self.report(&unsent);
        }
    }

    /// Waits until what is queued now is sent or unsent.
    pub(crate) async fn flush(self: &Arc<Self>) {
        let until = self.state().numbers;
        self.start();
        self.wait_for(|state| state.items.front().is_none_or(|item| item.number >= until)).await;
    }

    /// Takes no more records, sends what there is until the close timeout, and gives back what is left.
    pub(crate) async fn close(self: &Arc<Self>) -> Vec<Unsent> {
        let ends = self.closing_ends();
        // Decisions that were given up may still leave a record.
        let _ = timeout_at(ends, self.wait_for(|state| state.deciding == 0)).await;
        self.end_at(ends);
        self.wait_for(|state| state.sender != Sender::Runs).await;
        std::mem::take(&mut self.state().left)
    }

    /// The same without waiting: nobody holds the client any more.
    pub(crate) fn abandon(self: &Arc<Self>) {
        self.end_at(self.closing_ends());
    }

    fn closing_ends(&self) -> Instant {
        Instant::now() + self.close_timeout.min(LONGEST)
    }

    fn end_at(self: &Arc<Self>, ends: Instant) {
        self.state().ends.get_or_insert(ends);
        self.start();
        if self.state().sender == Sender::NotYet {
            drop(Sending(self.clone())); // nothing to send, or no runtime to do it
        }
    }

    /// A decision begins that may leave a record; it ends when what this gives is dropped.
    pub(crate) fn deciding(self: &Arc<Self>) -> Deciding {
        self.state().deciding += 1;
        Deciding(self.clone())
    }

    async fn wait_for(&self, done: impl Fn(&State) -> bool) {
        loop {
            let moved = self.moved.notified();
            if done(&self.state()) {
                return;
            }
            moved.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the sender, or starts it when there is something to send and a runtime to do it.
    fn start(self: &Arc<Self>) {
        let mut state = self.state();
        if state.sender == Sender::NotYet
            && !state.items.is_empty()
            && let Some(runtime) = self.link.runtime()
        {
            state.sender = Sender::Runs;
            drop(state); // a runtime that is going down drops the task at once
            runtime.spawn(Sending(self.clone()).run());
        }
        self.wake.notify_one();
    }

    fn next(&self) -> Next {
        let now = Instant::now();
        let state = self.state();
        if state.ends.is_some_and(|ends| now >= ends || state.items.is_empty()) {
            return Next::End;
        }
        if let Some(paused) = state.paused.filter(|paused| now < *paused) {
            return Next::Wait(Some(state.ends.map_or(paused, |ends| ends.min(paused))));
        }
        let mut bytes = 0;
        let mut batch = Vec::new();
        for item in state.items.iter().filter(|item| item.due <= now).take(BATCH) {
            let request = wire::record_request(&item.record);
            bytes += request.encoded_len() + 8;
            if bytes > BATCH_BYTES && !batch.is_empty() {
                break;
            }
            batch.push((item.number, request));
        }
        if batch.is_empty() {
            Next::Wait(state.items.iter().map(|item| item.due).chain(state.ends).min())
        } else {
            Next::Send(batch)
        }
    }

    /// Takes in what became of each item of a batch that was answered.
    fn settle(&self, results: impl Iterator<Item = (u64, Result<Recorded, Error>)>) {
        let mut unsent = Vec::new();
        let mut state = self.state();
        state.failures = 0;
        for (number, result) in results {
            match result {
                Ok(_) => drop(state.take(number)),
                Err(error) => {
                    let retries = self.retries;
                    unsent.extend(state.fail(number, error, |item, error| {
                        item.made = item.made.saturating_add(1);
                        item.due = Instant::now() + pause(retries.backoff(item.made, error));
                    }));
                }
            }
        }
        drop(state);
        self.moved(&unsent);
    }

    /// Takes in that a whole batch failed: nothing is sent for a while, neither it nor newer records.
    fn fail(&self, numbers: &[u64], error: &Error) {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        state.paused = Some(Instant::now() + pause(self.retries.backoff(state.failures, error)));
        let unsent: Vec<_> =
            numbers.iter().filter_map(|number| state.fail(*number, error.clone(), |_, _| {})).collect();
        drop(state);
        self.moved(&unsent);
    }

    fn moved(&self, unsent: &[Unsent]) {
        for each in unsent {
            self.report(each);
        }
        self.moved.notify_waiters();
    }

    fn report(&self, unsent: &Unsent) {
        let Some(on_unsent) = &self.on_unsent else {
            tracing::warn!(outcome = %unsent.record.outcome, error = %unsent.error, "a record was not sent");
            return;
        };
        if catch_unwind(AssertUnwindSafe(|| on_unsent(unsent))).is_err() {
            tracing::error!("on_unsent panicked");
        }
    }
}

impl State {
    fn find(&mut self, number: u64) -> Option<usize> {
        self.items.binary_search_by_key(&number, |item| item.number).ok()
    }

    fn take(&mut self, number: u64) -> Option<Item> {
        let place = self.find(number)?;
        self.items.remove(place)
    }

    /// An item failed: it stays, and `later` says what for; or it goes, and is unsent.
    fn fail(&mut self, number: u64, error: Error, later: impl FnOnce(&mut Item, &Error)) -> Option<Unsent> {
        let place = self.find(number)?;
        if may_pass(&error, &self.items[place].record) {
            let item = &mut self.items[place];
            later(item, &error);
            item.error = Some(error);
            return None;
        }
        self.take(number).map(|item| Unsent { record: item.record, error })
    }
}

/// A wait that is never nothing, whatever the delays (a busy loop helps nobody), and that clocks can add.
fn pause(wait: Duration) -> Duration {
    wait.clamp(Duration::from_millis(1), LONGEST)
}

/// Whether the record may get through later.
fn may_pass(error: &Error, record: &RecordRequest) -> bool {
    match error {
        Error::Unavailable(_) | Error::DeadlineExceeded(_) => true,
        Error::ResourceExhausted(_) => wire::record_request(record).encoded_len() <= RECORD_BYTES,
        _ => false,
    }
}

/// A decision under way.
pub(crate) struct Deciding(Arc<Queue>);

impl Drop for Deciding {
    fn drop(&mut self) {
        self.0.state().deciding -= 1;
        self.0.moved.notify_waiters();
    }
}

/// The sender. However it ends (closed, or with its runtime), what is left is unsent.
struct Sending(Arc<Queue>);

impl Sending {
    async fn run(self) {
        let queue = &self.0;
        loop {
            match queue.next() {
                Next::End => return,
                Next::Wait(until) => {
                    tokio::select! {
                        () = queue.wake.notified() => {}
                        () = at(until) => {}
                    }
                }
                Next::Send(batch) => {
                    let numbers: Vec<_> = batch.iter().map(|(number, _)| *number).collect();
                    let requests = batch.into_iter().map(|(_, request)| request).collect();
                    let Some(answer) = self.send(pb::BatchRecordRequest { requests }).await else {
                        return;
                    };
                    match answer {
                        Ok(results) => queue.settle(numbers.into_iter().zip(results)),
                        Err(error) => queue.fail(&numbers, &error),
                    }
                }
            }
        }
    }

    /// Sends one batch; nothing when closing took too long meanwhile.
    async fn send(
        &self,
        batch: pb::BatchRecordRequest,
    ) -> Option<Result<Vec<Result<Recorded, Error>>, Error>> {
        let queue = &self.0;
        let asked = batch.requests.len();
        let mut attempt = std::pin::pin!(queue.link.attempt(batch, Instant::now() + BATCH_TIMEOUT));
        loop {
            let ends = queue.state().ends;
            tokio::select! {
                answer = &mut attempt => {
                    return Some(answer.and_then(|answer| answers(wire::records(answer), asked)));
                }
                () = at(ends) => return None,
                // Closing, perhaps.
                () = queue.wake.notified() => {}
            }
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let queue = &self.0;
        let mut state = queue.state();
        state.sender = Sender::Ended;
        let left: Vec<_> = state
            .items
            .drain(..)
            .map(|item| Unsent { record: item.record, error: item.error.unwrap_or(Error::Closed) })
            .collect();
        state.left.clone_from(&left);
        drop(state);
        queue.moved(&left);
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The results of a batch, if there is one for each item.
///
/// # Errors
/// UNKNOWN when there are more or fewer.
pub(crate) fn answers<T>(results: Vec<T>, asked: usize) -> Result<Vec<T>, Error> {
    if results.len() == asked {
        return Ok(results);
    }
    let text = format!("The sidecar answered {} of {asked} items.", results.len());
    Err(Error::new(Code::Unknown, text))
}
