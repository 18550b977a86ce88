//! What the kernel side and the user side of RFSIS agree on.
//!
//! Read in this order: [`frame`] (what a frame *is*), [`verdict`] (what is done with it), [`mirror`]
//! (what of it the standby gets), [`ack_gate`] (what a client is told), [`maps`] (what both sides share through eBPF maps), [`heartbeat`]
//! (the bytes behind the ARP header).
//!
//! Everything here is pure and `no_std`: the eBPF programs, the agent and the tests call the same
//! functions.
#![no_std]

pub mod ack_gate;
pub mod agree;
pub mod frame;
pub mod heartbeat;
pub mod maps;
pub mod mirror;
pub mod options;
pub mod pledge;
pub mod prompt;
pub mod verdict;
