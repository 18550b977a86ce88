//! Stub.
/// Nanoseconds of CLOCK_MONOTONIC.
pub type Nanos = u64;
