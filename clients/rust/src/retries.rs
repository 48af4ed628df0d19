//! When a call is tried again: the one retry policy.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::Error;

/// Exponential backoff with full jitter, for UNAVAILABLE alone, within the call's deadline.
///
/// Before attempt n+1 the client waits a random time up to `first_delay * 2^(n-1)`, at most `max_delay`, on
/// top of the wait that the sidecar asked for. A wait that does not fit in the deadline is not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries {
    /// At most so many attempts: 5. With 1 nothing is tried again.
    pub attempts: u32,
    /// 100 ms.
    pub first_delay: Duration,
    /// 1 s.
    pub max_delay: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self { attempts: 5, first_delay: Duration::from_millis(100), max_delay: Duration::from_secs(1) }
    }
}

impl Retries {
    /// The longest jitter after the `made`-th attempt.
    fn most(&self, made: u32) -> Duration {
        let doubled = self.first_delay.saturating_mul(1 << made.saturating_sub(1).min(30));
        doubled.min(self.max_delay)
    }

    /// The wait after the `made`-th attempt, which ended with `error`, of something that has no deadline.
    pub(crate) fn backoff(&self, made: u32, error: &Error) -> Duration {
        error.retry_after().unwrap_or_default().saturating_add(jitter(self.most(made)))
    }
}

fn jitter(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}

/// The attempts of one call: whether there is another.
pub(crate) struct Attempts {
    retries: Retries,
    most: u32,
    made: u32,
    deadline: Instant,
    jitter: fn(Duration) -> Duration,
}

impl Attempts {
    /// At most `most` attempts until `deadline`.
    pub(crate) fn new(retries: Retries, most: u32, deadline: Instant) -> Self {
        Self { retries, most, made: 0, deadline, jitter }
    }

    /// How long to wait before the next attempt; nothing: there is none.
    pub(crate) fn wait_after(&mut self, error: &Error) -> Option<Duration> {
        self.made += 1;
        if !matches!(error, Error::Unavailable(_)) || self.made >= self.most {
            return None;
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        let asked = error.retry_after().unwrap_or_default();
        let wait = asked.saturating_add((self.jitter)(self.retries.most(self.made)));
        if wait < left {
            return Some(wait);
        }
        // Jitter gives way to the deadline; what the sidecar asked for does not.
        (!asked.is_zero() && asked < left).then_some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    const MS: Duration = Duration::from_millis(1);

    fn attempts(deadline: Duration) -> Attempts {
        let retries = Retries::default();
        Attempts {
            jitter: |most| most,
            ..Attempts::new(retries, retries.attempts, Instant::now() + deadline)
        }
    }

    fn asking(wait: Duration) -> Error {
        let mut error = Error::new(Code::Unavailable, "away");
        if let Error::Unavailable(fault) = &mut error {
            fault.retry_after = Some(wait);
        }
        error
    }

    #[tokio::test(start_paused = true)]
    async fn the_jitter_doubles_up_to_its_limit_and_ends_with_the_attempts() {
        let away = Error::new(Code::Unavailable, "away");
        let mut some = attempts(Duration::from_secs(60));
        let waits: Vec<_> = std::iter::from_fn(|| some.wait_after(&away)).collect();
        assert_eq!(waits, [100 * MS, 200 * MS, 400 * MS, 800 * MS]);
        let patient = Retries { attempts: 99, ..Retries::default() };
        assert_eq!(patient.most(5), Duration::from_secs(1));
        assert_eq!(patient.most(u32::MAX), Duration::from_secs(1));
        assert!((0..100).all(|_| jitter(100 * MS) <= 100 * MS));
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_asked_for_is_kept_and_the_jitter_gives_way_to_the_deadline() {
        assert_eq!(attempts(Duration::from_secs(60)).wait_after(&asking(300 * MS)), Some(400 * MS));
        assert_eq!(attempts(350 * MS).wait_after(&asking(300 * MS)), Some(300 * MS));
        assert_eq!(attempts(300 * MS).wait_after(&asking(300 * MS)), None);
        assert_eq!(attempts(100 * MS).wait_after(&asking(Duration::ZERO)), None);
        assert_eq!(attempts(60_000 * MS).wait_after(&asking(Duration::MAX)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_but_unavailable_is_tried_again() {
        for code in [Code::DeadlineExceeded, Code::ResourceExhausted, Code::Internal, Code::Cancelled] {
            assert_eq!(attempts(Duration::from_secs(60)).wait_after(&Error::new(code, "")), None);
        }
    }
}
