#![expect(
    clippy::unwrap_used,
    reason = "what cannot be in a model is a finding, and ends the run"
)]
//! A network in one process, on a virtual clock: the core of the agent as it is, and around it models of what it
//! works with.
//!
//! ```text
//!                ┌────────────────── LAN: loss, delay, duplicates, cuts ──────────────────┐
//!  client stack ─┤                                                                        │
//!                └─► machine a: kernel (XDP, gate, stacks) ◄─► agent (Node, Flows, Guard) │
//!                    machine b: the same                                                  ┘
//! ```
//!
//! The real code: [`crate::node`], [`crate::flows`], [`crate::exchange`] with guard and sync channel,
//! [`crate::announce`], the handlers, and the decisions of the eBPF programs ([`rfsis_common`]). Models: the
//! kernel's TCP is smoltcp ([`stack`]), its maps are [`gate`] and [`world`], an agent's loops are `agent`.
//!
//! Read [`schedule`] first (what happens is data, made of a seed), then [`cluster`] (how it happens) and
//! [`invariant`] (what must hold).

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use rfsis_common::maps::{Direction, FlowKey};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpCidr, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    TcpTimestampRepr,
};

use crate::adopt::{Numbers, Unfinished};
use crate::collections::{HashMap, HashSet};
use crate::flows::{Effects, FlowsConfig};
use crate::handler::{HandlerKind, StreamHandler, chargen_fill};
use crate::heartbeat::Nanos;
use crate::lockstep::{before, distance, later, window_field};
use crate::segment::{Segment, flow_key, parse};
use crate::wire::{bare_repr, emit_packet, instant};

mod adopted;
mod agent;
mod agree;
mod app;
mod cluster;
mod gate;
pub mod invariant;
mod kernel;
mod promise;
mod pulse;
pub mod run;
mod schedule;
mod stack;
#[cfg(test)]
mod tests;
mod world;

pub(crate) use adopted::*;
pub(crate) use agent::*;
pub(crate) use agree::*;
pub(crate) use app::*;
pub(crate) use cluster::*;
pub(crate) use gate::*;
use invariant::{Invariant, broken, hold};
pub(crate) use kernel::*;
pub(crate) use promise::*;
pub(crate) use pulse::*;
pub(crate) use schedule::*;
pub(crate) use stack::*;
pub(crate) use world::*;

pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 50);
pub(crate) const ECHO: u16 = 7;
pub(crate) const DISCARD: u16 = 9;
pub(crate) const DAYTIME: u16 = 13;
pub(crate) const CHARGEN: u16 = 19;
pub(crate) const MTU: usize = 1500;
pub(crate) const MS: Nanos = 1_000_000;
pub(crate) use crate::flows::SECOND;

/// Deterministic numbers (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn happens(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.below(1000) < per_mille
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

pub(crate) fn config() -> FlowsConfig {
    FlowsConfig {
        vip: VIP,
        services: [
            (ECHO, HandlerKind::Echo),
            (DISCARD, HandlerKind::Discard),
            (DAYTIME, HandlerKind::Daytime),
            (CHARGEN, HandlerKind::Chargen),
        ]
        .into_iter()
        .collect(),
        max_flows: 20_000,
        max_bytes: 256 << 20,
        idle_timeout: 3600 * SECOND,
        mtu: MTU,
        guarded: false,
        copied: false,
    }
}

/// A segment on one line.
pub(crate) struct Brief<'a>(pub &'a Segment<'a>);

impl std::fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Segment {
            seq,
            ack,
            window,
            payload,
            ..
        } = self.0;
        let flag = |set, name| if set { name } else { "" };
        let (syn, fin, rst) = (self.0.syn, self.0.fin, self.0.rst);
        let flags = [flag(syn, "S"), flag(fin, "F"), flag(rst, "R")].concat();
        let bytes = payload.len();
        write!(f, "{seq}+{bytes}{flags}")?;
        if let Some(ack) = ack {
            write!(f, " ack {ack}")?;
        }
        write!(f, " window {window}")
    }
}

/// A segment by hand.
pub(crate) fn by_hand(repr: &TcpRepr<'_>, direction: Direction) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (from, to) = match direction {
        Direction::ToVip => (CLIENT, VIP),
        Direction::FromVip => (VIP, CLIENT),
    };
    emit_packet(&mut bytes, from, to, repr, &ChecksumCapabilities::default());
    bytes
}

/// A sequence number for smoltcp.
pub(crate) fn seq(number: u32) -> TcpSeqNumber {
    TcpSeqNumber(number as i32)
}
