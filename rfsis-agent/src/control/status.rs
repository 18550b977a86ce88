//! What `rfsis-agent status` tells.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_common::maps::State;
use serde::{Deserialize, Serialize};

use crate::bpf::XdpMode;
use crate::cli::Role;
use crate::metrics::{Label, Protection};

/// What the node is doing: the JSON of `status --json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// Own address.
    pub node: Ipv4Addr,
    /// What the operator prefers.
    pub role: Role,
    /// What the node is now.
    #[serde(with = "word")]
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
    /// What the node can promise its clients.
    pub protection: ProtectionStatus,
    /// Flows by condition.
    pub flows: FlowCounts,
    /// Flows that a takeover by the standby would lose, as far as the nodes know.
    pub at_risk: u64,
    /// Since when the death of either node would cost no connection, RFC 3339; `None` while it would.
    pub redundant_since: Option<String>,
    /// Takeovers by this node since it started.
    pub failovers: u64,
    /// The latest of them.
    pub last_failover: Option<Failover>,
    /// The latest few of them, the last at the end.
    pub history: Vec<Failover>,
    /// The death of either node would be survived, and cost no connection.
    pub ready: bool,
    /// Why not.
    pub not_ready: Option<String>,
    /// Since the agent started, seconds.
    pub uptime_seconds: f64,
}

/// The other node, as its last authentic heartbeat told.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Peer {
    /// Its address.
    pub node: Ipv4Addr,
    /// What it is.
    #[serde(with = "word")]
    pub state: State,
    /// Its epoch.
    pub epoch: u64,
    /// Age of that heartbeat, seconds.
    pub heard_seconds_ago: f64,
}

/// What the node can promise its clients, and how many of them.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct ProtectionStatus {
    /// What it promises now.
    #[serde(with = "word")]
    pub mode: Protection,
    /// Flows whose clients are told of nothing that the standby lacks.
    pub guarded: u64,
    /// Flows whose clients were told of more, and the standby has not caught up.
    pub exposed: u64,
    /// Flows whose SYN-ACK waits for the standby.
    pub opening: u64,
    /// Age of the peer's last authentic sync datagram, seconds; `None` before the first, and with
    /// `protect: async`.
    pub sync_heard_seconds_ago: Option<f64>,
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

/// A takeover by this node.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Failover {
    /// Why.
    pub reason: String,
    /// Epoch that it began.
    pub epoch: u64,
    /// When, RFC 3339.
    pub at: String,
    /// From the deadline noticed to the first frame from the VIP, seconds.
    pub duration_seconds: f64,
}

/// A [`Label`] as its word.
mod word {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::metrics::Label;

    pub(super) fn serialize<L: Label, S: Serializer>(
        value: &L,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(value.as_str())
    }

    pub(super) fn deserialize<'de, L: Label, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<L, D::Error> {
        let word = String::deserialize(deserializer)?;
        let known = L::ALL.iter().find(|value| value.as_str() == word);
        known.copied().ok_or_else(|| {
            let words: Vec<_> = L::ALL.iter().map(|value| value.as_str()).collect();
            Error::custom(format!("found {word:?}, expected one of {words:?}"))
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
            "virtual IP  {} on {} ({})",
            self.virtual_ip,
            self.interface,
            match self.xdp_mode {
                XdpMode::Native => "native XDP",
                XdpMode::Tc => "TC ingress",
            }
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
        writeln!(f, "protection  {}", self.protection)?;
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
        match (&self.redundant_since, &self.not_ready) {
            (Some(since), _) => writeln!(f, "redundancy  since {since}")?,
            (None, Some(why)) => writeln!(f, "redundancy  none: {why}")?,
            (None, None) => writeln!(f, "redundancy  since now")?,
        }
        write!(f, "failovers   {}", self.failovers)?;
        for failover in self.history.iter().rev() {
            write!(
                f,
                "\n            {}: {}, epoch {}, took {}",
                failover.at,
                failover.reason,
                failover.epoch,
                seconds(failover.duration_seconds)
            )?;
        }
        Ok(())
    }
}

/// In one line. Only an active node guards flows.
impl fmt::Display for ProtectionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mode.as_str())?;
        match self.mode {
            Protection::Async => return Ok(()),
            Protection::Standby => {}
            Protection::Sync | Protection::Degraded => write!(
                f,
                ", {} guarded, {} exposed, {} opening",
                self.guarded, self.exposed, self.opening
            )?,
        }
        match self.sync_heard_seconds_ago {
            Some(age) => write!(f, ", sync channel heard {} ago", seconds(age)),
            None => f.write_str(", sync channel never heard"),
        }
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

    fn failover(epoch: u64) -> Failover {
        Failover {
            reason: "peer_silent".into(),
            epoch,
            at: format!("2026-01-02T03:04:0{epoch}Z"),
            duration_seconds: 0.00042,
        }
    }

    /// One with something in every field.
    pub(in crate::control) fn status() -> Status {
        Status {
            node: Ipv4Addr::new(192, 168, 1, 2),
            role: Role::Backup,
            state: State::Active,
            epoch: 8,
            virtual_ip: Ipv4Addr::new(192, 168, 1, 100),
            interface: "eth0".into(),
            xdp_mode: XdpMode::Tc,
            peer: Some(Peer {
                node: Ipv4Addr::new(192, 168, 1, 1),
                state: State::Fenced,
                epoch: 7,
                heard_seconds_ago: 0.0125,
            }),
            protection: ProtectionStatus {
                mode: Protection::Degraded,
                guarded: 5,
                exposed: 2,
                opening: 1,
                sync_heard_seconds_ago: Some(0.25),
            },
            flows: FlowCounts {
                lockstep: 3,
                live: 200,
                ..FlowCounts::default()
            },
            at_risk: 202,
            redundant_since: None,
            failovers: 2,
            last_failover: Some(failover(8)),
            history: vec![failover(6), failover(8)],
            ready: false,
            not_ready: Some("not protected: 202 flows".into()),
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
                "xdp_mode": "tc",
                "peer": {
                    "node": "192.168.1.1",
                    "state": "fenced",
                    "epoch": 7,
                    "heard_seconds_ago": 0.0125
                },
                "protection": {
                    "mode": "degraded",
                    "guarded": 5,
                    "exposed": 2,
                    "opening": 1,
                    "sync_heard_seconds_ago": 0.25
                },
                "flows": {
                    "handshake": 0,
                    "lockstep": 3,
                    "lagging": 0,
                    "diverged": 0,
                    "unprotected": 0,
                    "live": 200
                },
                "at_risk": 202,
                "redundant_since": null,
                "failovers": 2,
                "last_failover": {
                    "reason": "peer_silent",
                    "epoch": 8,
                    "at": "2026-01-02T03:04:08Z",
                    "duration_seconds": 0.00042
                },
                "history": [
                    {
                        "reason": "peer_silent",
                        "epoch": 6,
                        "at": "2026-01-02T03:04:06Z",
                        "duration_seconds": 0.00042
                    },
                    {
                        "reason": "peer_silent",
                        "epoch": 8,
                        "at": "2026-01-02T03:04:08Z",
                        "duration_seconds": 0.00042
                    }
                ],
                "ready": false,
                "not_ready": "not protected: 202 flows",
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
state       active, epoch 8, not ready
node        192.168.1.2, role backup, up 2h 5m
virtual IP  192.168.1.100 on eth0 (TC ingress)
peer        192.168.1.1, fenced, epoch 7, heard 12.5ms ago
protection  degraded, 5 guarded, 2 exposed, 1 opening, sync channel heard 250.0ms ago
flows       3 lockstep, 200 live, 0 handshake, 0 lagging, 0 diverged, 0 unprotected
redundancy  none: not protected: 202 flows
failovers   2
            2026-01-02T03:04:08Z: peer_silent, epoch 8, took 0.4ms
            2026-01-02T03:04:06Z: peer_silent, epoch 6, took 0.4ms"
        );
        let ready = Status {
            ready: true,
            not_ready: None,
            redundant_since: Some("2026-01-02T03:04:09Z".into()),
            history: Vec::new(),
            ..status()
        };
        let text = ready.to_string();
        assert!(
            text.starts_with("state       active, epoch 8, ready\n"),
            "{text}"
        );
        assert!(
            text.ends_with("redundancy  since 2026-01-02T03:04:09Z\nfailovers   2"),
            "{text}"
        );
    }

    #[test]
    fn a_node_that_guards_nothing_claims_no_guarded_flows() {
        let protection = |mode, sync_heard_seconds_ago| ProtectionStatus {
            mode,
            sync_heard_seconds_ago,
            ..status().protection
        };
        for (protection, expected) in [
            (protection(Protection::Async, None), "async"),
            (
                protection(Protection::Standby, Some(0.001)),
                "standby, sync channel heard 1.0ms ago",
            ),
            (
                protection(Protection::Degraded, None),
                "degraded, 5 guarded, 2 exposed, 1 opening, sync channel never heard",
            ),
        ] {
            assert_eq!(protection.to_string(), expected);
        }
    }
}
