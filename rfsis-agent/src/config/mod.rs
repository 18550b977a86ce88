//! The operator's YAML file, validated.
//!
//! [`yaml`] gives a tree of nodes that know their lines, `read` walks it and collects every error,
//! [`fields`] turns one scalar into one value.

mod error;
mod fields;
mod read;
mod reader;
#[cfg(test)]
mod tests;
mod yaml;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::bpf::XdpMode;
pub use error::{ConfigError, ConfigErrors};
use rfsis_common::mirror::MirrorEgress;

/// Most bytes of a config file. A real one has a few hundred lines at the most.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Reads and validates a config file.
///
/// # Errors
/// All errors of the file, in the order of its lines; a file that cannot be read is one error.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    let text = fields::read_bounded(path, MAX_FILE_BYTES)
        .map_err(|error| error.to_string())
        .and_then(|bytes| String::from_utf8(bytes).map_err(|error| error.to_string()));
    match text {
        Ok(text) => parse(&text, path),
        Err(found) => Err(ConfigErrors(vec![ConfigError {
            file: path.to_owned(),
            line: None,
            field: String::new(),
            found,
            expected: "a readable YAML file in UTF-8 (name it with --config)".into(),
        }])),
    }
}

/// Validates the text of a config file. `file` names it in errors, and a relative `key_file` is
/// looked for beside it.
///
/// # Errors
/// All errors of the text, in the order of its lines. A syntax error is reported alone.
pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigErrors> {
    read::config(text, file)
}

/// A whole, valid configuration. The same file serves both nodes.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the cluster; heartbeats of another are ignored.
    pub cluster: String,
    /// Interface that carries the VIP.
    pub interface: String,
    /// How frames are caught; `None`, the default, if the interface is to decide.
    pub xdp: Option<XdpMode>,
    /// The virtual IP.
    pub virtual_ip: Ipv4Addr,
    /// Prefix length of the VIP's subnet, 1–30: the VIP and both nodes must fit.
    pub prefix_len: u8,
    /// Own addresses of the two nodes, distinct, inside the VIP's subnet, not the VIP.
    pub nodes: [Ipv4Addr; 2],
    /// Cluster key for heartbeats.
    pub key: ClusterKey,
    /// How the VIP's frames reach the standby; default `mirror`, over the interface of the VIP.
    pub tap: Tap,
    /// What a client's ACK promises; default `sync`.
    pub protect: Protect,
    /// How long a UDP datagram waits for the active's answer before the standby forgets it, at most 10 s;
    /// default 1 s. Zero: none is kept, and none is answered after a takeover.
    pub udp_replay: Duration,
    /// A primary that has been a ready standby for so long asks for the VIP, 1 s to 1 day; `None`, the
    /// default, for never.
    pub preempt: Option<Duration>,
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

/// In one line, what the operator would want to check again.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cluster {}, virtual IP {}/{} on {}, nodes {} and {}, tap {}, protect {}, takeover after {}, {} service{}",
            self.cluster,
            self.virtual_ip,
            self.prefix_len,
            self.interface,
            self.nodes[0],
            self.nodes[1],
            self.tap,
            self.protect,
            humantime::format_duration(self.heartbeat.takeover_time()),
            self.services.len(),
            if self.services.len() == 1 { "" } else { "s" },
        )
    }
}

impl Config {
    /// All interfaces that programs are attached to, the one with the VIP first.
    pub fn interfaces(&self) -> impl Iterator<Item = &str> {
        let sync = match &self.tap {
            Tap::Mirror(mirror) => mirror.sync_interface.as_deref(),
            Tap::Lan => None,
        };
        std::iter::once(&*self.interface).chain(sync)
    }
}

/// How the VIP's frames reach the standby.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tap {
    /// The LAN brings them: hub, flooding bridge, SPAN port.
    Lan,
    /// The active copies them.
    Mirror(MirrorConfig),
}

impl fmt::Display for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tap::Lan => write!(f, "lan"),
            Tap::Mirror(mirror) => match &mirror.sync_interface {
                None => write!(f, "mirror"),
                Some(interface) => write!(f, "mirror over {interface}"),
            },
        }
    }
}

/// What a client may conclude from the ACK of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protect {
    /// The active has them.
    Async,
    /// The standby has them too, while there is one.
    Sync(SyncConfig),
}

impl fmt::Display for Protect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protect::Async => "async",
            Protect::Sync(_) => "sync",
        })
    }
}

/// Protection `sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncConfig {
    /// Silence of the standby after which clients' ACKs wait for it no longer, 1 ms to 60 s; default the
    /// takeover time.
    pub timeout: Duration,
    /// UDP port of the sync channel on the nodes' own addresses; default 9501. It may be that of a UDP
    /// service, which listens on the VIP.
    pub port: u16,
}

/// Tap `mirror`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorConfig {
    /// Where the copies go, if not over the interface that carries the VIP.
    pub sync_interface: Option<String>,
    /// What of the VIP's output is copied; default `handshake` with `protect: sync`, `full` with `async`.
    /// Without the ACK gate the standby learns only from the active's acknowledgements that it lacks a byte,
    /// and with `handshake` it does not see them: a lost copy is then found out by the client.
    pub egress: MirrorEgress,
}

/// At least 32 bytes. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(pub Vec<u8>);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
    /// How long a backup that hears nobody waits before it becomes active, at least the takeover
    /// time; default 3 s, or the takeover time where that is longer.
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

impl Protocol {
    /// The word used in the config.
    pub const fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}
