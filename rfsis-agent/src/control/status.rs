//! What `rfsis-agent status` tells.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_common::maps::State;
use serde::{Deserialize, Serialize};

use crate::bpf::XdpMode;
use crate::cli::Role;

/// What the node is doing: the JSON of `status --json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// Own address.
    pub node: Ipv4Addr,
    /// What the operator prefers.
    pub role: Role,
    /// What the node is now.
    #[serde(with = "state_word")]
    pub state: State,
    /// Grows with each takeover.
    pub epoch: u64,
    /// The VIP.
    pub virtual_ip: Ipv4Addr,
    /// Interface that carries the VIP.
    pub interface: String,
    /// How the XDP program is attached.
    pub xdp_mode: XdpMode,
    /// The other node, once it was heard.
    pub peer: Option<Peer>,
    /// Flows by condition.
    pub flows: FlowCounts,
    /// Takeovers by this node since it started.
    pub failovers: u64,
    /// The latest of them.
    pub last_failover: Option<LastFailover>,
    /// Programs attached and peer heard.
    pub ready: bool,
    /// Since the agent started, seconds.
    pub uptime_seconds: f64,
}

/// The other node, as its last authentic heartbeat told.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Peer {
    /// Its address.
    pub node: Ipv4Addr,
    /// What it is.
    #[serde(with = "state_word")]
    pub state: State,
    /// Its epoch.
    pub epoch: u64,
    /// Age of that heartbeat, seconds.
    pub heard_seconds_ago: f64,
}

/// Flows by condition.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct FlowCounts {
    /// Not established yet.
    pub handshake: u64,
    /// The shadow holds all that the active acknowledged.
    pub lockstep: u64,
    /// The shadow lacks bytes.
    pub lagging: u64,
    /// The shadow's bytes differ from what the active sent.
    pub diverged: u64,
    /// Without a shadow.
    pub unprotected: u64,
    /// Carried by the shadow since a takeover.
    pub live: u64,
}

/// The latest takeover by this node.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LastFailover {
    /// Why.
    pub reason: String,
    /// Epoch that it began.
    pub epoch: u64,
    /// When, RFC 3339.
    pub at: String,
    /// From the deadline noticed to the first frame from the VIP, seconds.
    pub duration_seconds: f64,
}

/// [`State`] as its word.
mod state_word {
    use super::State;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        state: &State,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(state.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<State, D::Error> {
        let word = String::deserialize(deserializer)?;
        State::ALL
            .into_iter()
            .find(|state| state.as_str() == word)
            .ok_or_else(|| {
                Error::custom(format!(
                    "found state {word:?}, expected one of {:?}",
                    State::ALL.map(State::as_str)
                ))
            })
    }
}

/// For a person: aligned, a few lines, no newline at the end.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "state       {}, epoch {}, {}",
            self.state.as_str(),
            self.epoch,
            if self.ready { "ready" } else { "not ready" }
        )?;
        writeln!(
            f,
            "node        {}, role {}, up {}",
            self.node,
            self.role.as_str(),
            seconds(self.uptime_seconds)
        )?;
        writeln!(
            f,
            "virtual IP  {} on {} ({} XDP)",
            self.virtual_ip,
            self.interface,
            self.xdp_mode.as_str()
        )?;
        match &self.peer {
            Some(peer) => writeln!(
                f,
                "peer        {}, {}, epoch {}, heard {} ago",
                peer.node,
                peer.state.as_str(),
                peer.epoch,
                seconds(peer.heard_seconds_ago)
            )?,
            None => writeln!(f, "peer        never heard")?,
        }
        let flows = &self.flows;
        writeln!(
            f,
            "flows       {} lockstep, {} live, {} handshake, {} lagging, {} diverged, {} unprotected",
            flows.lockstep,
            flows.live,
            flows.handshake,
            flows.lagging,
            flows.diverged,
            flows.unprotected
        )?;
        write!(f, "failovers   {}", self.failovers)?;
        if let Some(last) = &self.last_failover {
            write!(
                f,
                ", last at {}: {}, epoch {}, took {}",
                last.at,
                last.reason,
                last.epoch,
                seconds(last.duration_seconds)
            )?;
        }
        Ok(())
    }
}

/// Short forms: `1.3ms`, `12s`, `2h 5m`.
fn seconds(seconds: f64) -> String {
    let Ok(duration) = Duration::try_from_secs_f64(seconds) else {
        return format!("{seconds} s");
    };
    if duration < Duration::from_secs(1) {
        format!("{:.1}ms", duration.as_secs_f64() * 1e3)
    } else {
        humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One with something in every field.
    pub(in crate::control) fn status() -> Status {
        Status {
            node: Ipv4Addr::new(192, 168, 1, 2),
            role: Role::Backup,
            state: State::Active,
            epoch: 8,
            virtual_ip: Ipv4Addr::new(192, 168, 1, 100),
            interface: "eth0".into(),
            xdp_mode: XdpMode::Generic,
            peer: Some(Peer {
                node: Ipv4Addr::new(192, 168, 1, 1),
                state: State::Fenced,
                epoch: 7,
                heard_seconds_ago: 0.0125,
            }),
            flows: FlowCounts {
                lockstep: 3,
                live: 200,
                ..FlowCounts::default()
            },
            failovers: 1,
            last_failover: Some(LastFailover {
                reason: "peer_silent".into(),
                epoch: 8,
                at: "2026-01-02T03:04:05Z".into(),
                duration_seconds: 0.00042,
            }),
            ready: true,
            uptime_seconds: 7500.9,
        }
    }

    #[test]
    fn status_json_has_exactly_the_fields_of_the_contract() {
        let json = serde_json::to_value(status()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "node": "192.168.1.2",
                "role": "backup",
                "state": "active",
                "epoch": 8,
                "virtual_ip": "192.168.1.100",
                "interface": "eth0",
                "xdp_mode": "generic",
                "peer": {
                    "node": "192.168.1.1",
                    "state": "fenced",
                    "epoch": 7,
                    "heard_seconds_ago": 0.0125
                },
                "flows": {
                    "handshake": 0,
                    "lockstep": 3,
                    "lagging": 0,
                    "diverged": 0,
                    "unprotected": 0,
                    "live": 200
                },
                "failovers": 1,
                "last_failover": {
                    "reason": "peer_silent",
                    "epoch": 8,
                    "at": "2026-01-02T03:04:05Z",
                    "duration_seconds": 0.00042
                },
                "ready": true,
                "uptime_seconds": 7500.9
            })
        );
        let lonely = Status {
            peer: None,
            last_failover: None,
            ..status()
        };
        let json = serde_json::to_value(lonely).unwrap();
        assert!(json["peer"].is_null() && json["last_failover"].is_null());
    }

    #[test]
    fn status_is_readable_by_a_person() {
        assert_eq!(
            status().to_string(),
            "\
state       active, epoch 8, ready
node        192.168.1.2, role backup, up 2h 5m
virtual IP  192.168.1.100 on eth0 (generic XDP)
peer        192.168.1.1, fenced, epoch 7, heard 12.5ms ago
flows       3 lockstep, 200 live, 0 handshake, 0 lagging, 0 diverged, 0 unprotected
failovers   1, last at 2026-01-02T03:04:05Z: peer_silent, epoch 8, took 0.4ms"
        );
    }
}
