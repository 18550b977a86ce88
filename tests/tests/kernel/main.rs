//! The programs in the kernel, the interface around them. Needs root.
//!
//! Each test has a network namespace of its own: that of its thread, gone with it.
#![expect(clippy::unwrap_used, reason = "tests")]

mod ack_gate;
mod adopt;
mod attach;
mod frames;
mod host;
mod mirror;
mod netif;
mod sockets;
mod verdicts;
