//! Waiting for something to become true, with a deadline and an account of what was seen last.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long anything is waited for before a test fails. Far above what is ever needed: a loaded
/// machine must not fail a test.
pub const PATIENCE: Duration = Duration::from_secs(20);

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

/// [`wait_until`] with another limit.
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
