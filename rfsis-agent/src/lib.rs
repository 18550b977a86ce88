//! The RFSIS agent as a library. The binary is a thin shell around it.
//!
//! **Core**, sans-IO, `(event, now) → actions`: [`node`] (who speaks for the VIP), [`heartbeat`]
//! (codec, authentication, replay), [`shadow`] (one flow in lockstep), [`flows`] (all of them),
//! [`guard`] (which of them the ACK gate guards), [`join`] (handing those over that the standby does not
//! know), [`sync`] (what the nodes tell each other about them), [`exchange`] (who of both is told),
//! [`datagrams`] (UDP across a takeover), [`handler`] (what answers a service's bytes).
//!
//! **Edges**: [`bpf`] (programs and maps), [`netif`] (addresses, neighbours, qdisc), [`carrier`]
//! (is there a cable), [`pulse`] (the heartbeat thread), [`engine`] (the shadow thread), [`services`] (kernel sockets), [`adopt`] (a live
//! shadow becomes one), [`tcp_repair`] (what a kernel socket knows), [`metrics`],
//! [`control`], [`tap`] (how frames reach the standby), [`link`] (sync channel and ACK gate), [`warm`] (next
//! hops), [`privileges`] (capabilities), [`agent`] (start, stop, who talks to whom), [`sys`] (system calls).

pub mod adopt;
pub mod agent;
pub mod announce;
pub mod auth;
pub mod bpf;
pub mod carrier;
pub mod cli;
pub mod collections;
pub mod config;
pub mod control;
pub mod datagrams;
pub mod engine;
pub mod exchange;
mod fault;
pub mod flows;
pub mod guard;
pub mod handler;
pub mod heartbeat;
pub mod join;
pub mod link;
pub mod lockstep;
pub mod metrics;
pub mod netif;
pub mod node;
pub mod pledge;
pub mod privileges;
pub mod pulse;
pub mod redundancy;
pub mod relay;
pub mod reorder;
pub mod segment;
pub mod services;
pub mod shadow;
pub mod shared;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod sockets;
pub mod switchover;
pub mod sync;
pub mod sys;
pub mod tail;
pub mod tap;
pub mod tcp_repair;
pub mod wall;
pub mod warm;
pub mod wire;
