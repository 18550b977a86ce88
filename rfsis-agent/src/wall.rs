//! The wall clock, for people to read. It steps, so nothing is decided by it: elsewhere clippy refuses it.

use std::time::SystemTime;

/// What the wall clock shows.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place; what it returns is only ever printed"
)]
pub fn now() -> SystemTime {
    SystemTime::now()
}
