//! Waiting for something to become true, with a deadline and an account of what was seen last.

use std::fmt::Debug;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long anything is waited for before a test fails, on real hardware ([`slowed`]). Far above
/// what is ever needed: a loaded machine must not fail a test.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How much slower than real hardware this machine is: `RFSIS_TEST_SLOW`, 1 where it is not set. An
/// emulated machine is told so by who starts it.
///
/// # Panics
/// When it is set to something other than a whole number.
pub fn slowness() -> u32 {
    static SLOWNESS: LazyLock<u32> = LazyLock::new(|| match std::env::var("RFSIS_TEST_SLOW") {
        Ok(text) => match text.parse() {
            Ok(factor @ 1..) => factor,
            _ => panic!("RFSIS_TEST_SLOW is {text:?}; expected a whole number from 1 on"),
        },
        Err(_) => 1,
    });
    *SLOWNESS
}

/// A limit as long as it must be on this machine.
pub fn slowed(limit: Duration) -> Duration {
    limit * slowness()
}

/// Says when dropped that it is over. Threads of a scope go by that, so that they end when the test fails, too.
#[derive(Debug)]
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How often a condition that cannot be awaited is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Looks with `probe` until `accept` says yes, and returns what was accepted.
///
/// # Panics
/// After [`PATIENCE`], with the last value seen.
#[track_caller]
pub fn wait_until<T: Debug>(
    what: &str,
    probe: impl FnMut() -> T,
    accept: impl FnMut(&T) -> bool,
) -> T {
    wait_at_most(PATIENCE, what, probe, accept)
}

/// [`wait_until`] with another limit, on real hardware ([`slowed`]).
///
/// # Panics
/// After `limit`, with the last value seen.
#[track_caller]
pub fn wait_at_most<T: Debug>(
    limit: Duration,
    what: &str,
    mut probe: impl FnMut() -> T,
    mut accept: impl FnMut(&T) -> bool,
) -> T {
    let limit = slowed(limit);
    let deadline = Instant::now() + limit;
    loop {
        let value = probe();
        if accept(&value) {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {limit:?} for {what}; last seen: {value:#?}"
        );
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_returns_the_accepted_value() {
        let mut count = 0;
        let seen = wait_until(
            "three looks",
            || {
                count += 1;
                count
            },
            |&count| count == 3,
        );
        assert_eq!(seen, 3);
    }

    #[test]
    #[should_panic(expected = "for the impossible; last seen: 7")]
    fn waiting_in_vain_names_what_was_seen() {
        wait_at_most(Duration::from_millis(10), "the impossible", || 7, |_| false);
    }
}
