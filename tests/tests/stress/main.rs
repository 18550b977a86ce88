//! What hosts and LANs do to a failover that nobody planned for. What was expected and observed of each is in
//! `docs/reliability.md`; the longer ones run by `cargo xtask stress` only.
#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

mod churn;
mod clocks;
mod crowd;
mod flood;
mod memory;
mod one_way;
mod slow_standby;
mod starved;
