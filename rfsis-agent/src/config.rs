//! The operator's YAML file, validated.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// A whole, valid configuration. The same file serves both nodes.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the cluster; heartbeats of another are ignored.
    pub cluster: String,
    /// Interface that carries the VIP.
    pub interface: String,
    /// The virtual IP.
    pub virtual_ip: Ipv4Addr,
    /// Prefix length of the VIP's subnet, 1–32.
    pub prefix_len: u8,
    /// Own addresses of the two nodes, distinct, inside the VIP's subnet, not the VIP.
    pub nodes: [Ipv4Addr; 2],
    /// Cluster key for heartbeats.
    pub key: ClusterKey,
    /// Heartbeat timing.
    pub heartbeat: HeartbeatConfig,
    /// At least one service.
    pub services: Vec<Service>,
    /// Bounds of the shadows.
    pub shadow: ShadowConfig,
    /// Where `/metrics`, `/live` and `/ready` are served.
    pub metrics: SocketAddr,
    /// Path of the control socket.
    pub control: PathBuf,
}

/// At least 32 bytes. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(pub Vec<u8>);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClusterKey({} bytes)", self.0.len())
    }
}

/// Heartbeat timing. `lease < interval × missed`, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeartbeatConfig {
    /// 1 ms to 10 s.
    pub interval: Duration,
    /// Intervals without a heartbeat until a takeover, 2–100.
    pub missed: u32,
    /// How long after each heartbeat sent the gate stays open; default `interval × (missed - 0.5)`.
    pub lease: Duration,
    /// How long a backup that hears nobody waits before it becomes active; default 3 s.
    pub startup_grace: Duration,
}

impl HeartbeatConfig {
    /// Silence of the peer after which the standby takes over: `interval × missed`.
    pub fn takeover_time(&self) -> Duration {
        self.interval * self.missed
    }
}

/// Bounds of the shadows; at a bound new flows stay unprotected and are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowConfig {
    /// Flows at the most; default 20 000.
    pub max_flows: usize,
    /// Bytes queued in all shadows together; default 256 MiB.
    pub max_bytes: usize,
    /// A flow without a frame for this long is forgotten; default 2 h.
    pub idle_timeout: Duration,
    /// Size of the frame ring, bytes, a power of two; default 32 MiB.
    pub ring_bytes: u32,
}

/// One service on the VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name, unique.
    pub name: String,
    /// Transport.
    pub protocol: Protocol,
    /// Port on the VIP; (protocol, port) is unique.
    pub port: u16,
    /// What answers.
    pub handler: crate::handler::HandlerKind,
}

/// Transport of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `tcp/PORT`
    Tcp,
    /// `udp/PORT`
    Udp,
}
