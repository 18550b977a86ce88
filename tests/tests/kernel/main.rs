//! The programs in the kernel, the interface around them. Needs root.
//!
//! Each test has a network namespace of its own: that of its thread, gone with it.
#![expect(clippy::unwrap_used, reason = "tests")]

mod ack_gate;
mod adopt;
mod agree;
mod attach;
mod differential;
mod frames;
mod gate;
mod host;
mod kinds;
mod mirror;
mod model;
mod netif;
mod openings;
mod pledge;
mod prompt;
mod rig;
mod rings;
mod segments;
mod sockets;
mod verdicts;
