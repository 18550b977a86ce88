//! What a node knows: of itself from the config, of its peer from heartbeats.

use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_common::maps::State;

use crate::cli::Role;
use crate::heartbeat::{MacAddr, Nanos};

/// What a node needs to know. `lease < interval × missed`.
#[derive(Clone, Copy, Debug)]
pub struct NodeConfig {
    /// What the operator prefers.
    pub role: Role,
    /// Own address.
    pub node: Ipv4Addr,
    /// The peer's address.
    pub peer: Ipv4Addr,
    /// Own hardware address.
    pub mac: MacAddr,
    /// Hardware address of the own tap: it sends and takes copies of the VIP's frames.
    pub tap_mac: MacAddr,
    /// Between two heartbeats.
    pub interval: Duration,
    /// Intervals of silence until a takeover.
    pub missed: u32,
    /// How long the gate stays open after a heartbeat.
    pub lease: Duration,
    /// How long a backup waits for a primary.
    pub startup_grace: Duration,
    /// Random, not 0.
    pub session: u64,
}

/// What was last heard of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerView {
    /// Its address.
    pub node: Ipv4Addr,
    /// Its role.
    pub role: Role,
    /// Its state.
    pub state: State,
    /// Its epoch.
    pub epoch: u64,
    /// Arrival of its last fresh heartbeat.
    pub heard_at: Nanos,
    /// Up to when it may have been active: arrival of its last heartbeat that does not say `standby`, or of the first
    /// behind that which does.
    pub active_until: Nanos,
    /// Its hardware address.
    pub mac: MacAddr,
    /// Hardware address of its tap.
    pub tap_mac: MacAddr,
    /// Flows that a takeover by the standby would lose, as far as it knows.
    pub at_risk: u32,
}
