//! What the agent can tell about itself: `status`, `/ready`, and the takeovers that it remembers.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rfsis_common::maps::State;

use crate::bpf::XdpMode;
use crate::cli::Role;
use crate::config::{Config, Protect};
use crate::control::{Failover, FlowCounts, Peer, ProtectionStatus, Status};
use crate::metrics::{GuardCondition, Metrics, Protection};
use crate::node::TakeoverReason;
use crate::pulse::Takeover;
use crate::redundancy::{Redundancy, age};
use crate::shared::Shared;
use crate::wall;

/// Failovers that `status` remembers.
const HISTORY: usize = 16;

/// How long ago the peer may have been heard for the node to call itself ready, at least.
const READY_SILENCE: Duration = Duration::from_secs(1);

/// `Err` says when somebody was heard last, if that is longer ago than `most`.
pub(super) fn heard_within(age: Option<Duration>, most: Duration) -> Result<(), String> {
    match age {
        None => Err("never heard".to_owned()),
        Some(age) if age > most => Err(format!("last heard {age:.1?} ago")),
        Some(_) => Ok(()),
    }
}

/// What the agent can tell about itself.
pub(super) struct Story {
    node: Ipv4Addr,
    peer: Ipv4Addr,
    pub(super) role: Role,
    virtual_ip: Ipv4Addr,
    interface: String,
    xdp_mode: XdpMode,
    ready_silence: Duration,
    /// Of the sync channel, for an active node; `None` with `protect: async`.
    sync_silence: Option<Duration>,
    started: Instant,
    pub(super) shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    pub(super) redundancy: Arc<Redundancy>,
    failovers: Mutex<Failovers>,
}

/// Takeovers by this node since it started.
#[derive(Clone, Default)]
pub(super) struct Failovers {
    count: u64,
    /// The latest last.
    history: VecDeque<Failover>,
}

impl Story {
    pub(super) fn new(
        config: &Config,
        role: Role,
        own: usize,
        xdp_mode: XdpMode,
        shared: &Arc<Shared>,
        metrics: &Arc<Metrics>,
        redundancy: &Arc<Redundancy>,
    ) -> Self {
        let ready_silence = READY_SILENCE.max(config.heartbeat.takeover_time());
        Self {
            node: config.nodes[own],
            peer: config.nodes[1 - own],
            role,
            virtual_ip: config.virtual_ip,
            interface: config.interface.clone(),
            xdp_mode,
            ready_silence,
            sync_silence: match &config.protect {
                Protect::Async => None,
                Protect::Sync(sync) => Some(ready_silence.max(sync.timeout)),
            },
            started: Instant::now(),
            shared: Arc::clone(shared),
            metrics: Arc::clone(metrics),
            redundancy: Arc::clone(redundancy),
            failovers: Mutex::default(),
        }
    }

    pub(super) fn took_over(&self, takeover: &Takeover) {
        let duration = Duration::from_nanos(takeover.duration);
        tracing::info!(
            reason = takeover.reason.as_str(),
            epoch = takeover.epoch,
            ?duration,
            "announced the VIP"
        );
        if !TakeoverReason::FAILOVERS.contains(&takeover.reason) {
            return;
        }
        self.metrics
            .failovers
            .with_label_values(&[takeover.reason.as_str()])
            .inc();
        self.metrics
            .takeover_duration
            .observe(duration.as_secs_f64());
        let mut failovers = self
            .failovers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        failovers.count += 1;
        if failovers.history.len() == HISTORY {
            failovers.history.pop_front();
        }
        failovers.history.push_back(Failover {
            reason: takeover.reason.as_str().to_owned(),
            epoch: takeover.epoch,
            at: humantime::format_rfc3339_millis(wall::now()).to_string(),
            duration_seconds: duration.as_secs_f64(),
        });
    }

    pub(super) fn peer_age(&self) -> Option<Duration> {
        self.shared.peer_heard_at().map(age)
    }

    pub(super) fn sync_age(&self) -> Option<Duration> {
        self.shared.sync_heard_at().map(age)
    }

    /// Whether the death of either node would be survived, and cost no connection, as far as this one can
    /// tell: an active node that is to protect and for long has not been able to is not ready, though it
    /// serves, and neither is a standby that lacks a flow. Who restarts nodes one after the other must wait
    /// here. What is shorter is for `rfsis_protection` and `rfsis_flows` to show.
    pub(super) fn ready(&self) -> Result<(), String> {
        let peer = self.peer;
        heard_within(self.peer_age(), self.ready_silence)
            .map_err(|heard| format!("peer {peer} was {heard}"))?;
        let node = self.shared.node();
        let peer_state = node.peer.map_or(State::Standby, |peer| peer.state);
        match (node.state, peer_state) {
            (State::Active, State::Standby) | (State::Standby, State::Active) => {}
            (own, other) => {
                let (own, other) = (own.as_str(), other.as_str());
                return Err(format!("this node is {own} and peer {peer} is {other}"));
            }
        }
        if let Some(most) = self.sync_silence
            && node.state == State::Active
        {
            heard_within(self.sync_age(), most).map_err(|heard| {
                format!("not protected: peer {peer} was {heard} on the sync channel (`sync_port`)")
            })?;
        }
        match self.shared.safe_at().map(age) {
            Some(age) if age <= self.ready_silence => Ok(()),
            _ => Err(format!("not protected: {} flows", self.at_risk())),
        }
    }

    /// Flows that a takeover by the standby would lose: neither node knows of all of them.
    pub(super) fn at_risk(&self) -> u32 {
        let peer = self.shared.node().peer;
        peer.map_or(0, |peer| peer.at_risk)
            .max(self.shared.at_risk())
    }

    pub(super) fn protection(&self) -> ProtectionStatus {
        let flows = |condition| self.metrics.guarded_flows.get(condition) as u64;
        ProtectionStatus {
            // Chosen before the first question can be asked.
            mode: self
                .metrics
                .protection
                .chosen()
                .unwrap_or(Protection::Standby),
            guarded: flows(GuardCondition::Guarded),
            exposed: flows(GuardCondition::Exposed),
            opening: flows(GuardCondition::Opening),
            sync_heard_seconds_ago: self.sync_age().map(|age| age.as_secs_f64()),
        }
    }

    pub(super) fn status(&self) -> Status {
        let node = self.shared.node();
        let census = self.shared.census();
        let failovers = self
            .failovers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let count = |count: usize| count as u64;
        Status {
            node: self.node,
            role: self.role,
            state: node.state,
            epoch: node.epoch,
            virtual_ip: self.virtual_ip,
            interface: self.interface.clone(),
            xdp_mode: self.xdp_mode,
            peer: node.peer.zip(self.peer_age()).map(|(peer, age)| Peer {
                node: self.peer,
                state: peer.state,
                epoch: peer.epoch,
                heard_seconds_ago: age.as_secs_f64(),
            }),
            protection: self.protection(),
            flows: FlowCounts {
                handshake: count(census.handshake),
                lockstep: count(census.lockstep),
                lagging: count(census.lagging),
                diverged: count(census.diverged),
                unprotected: count(census.unprotected),
                live: count(census.live),
            },
            at_risk: self.at_risk().into(),
            redundant_since: self
                .redundancy
                .since()
                .map(|since| humantime::format_rfc3339_millis(since).to_string()),
            failovers: failovers.count,
            last_failover: failovers.history.back().cloned(),
            history: failovers.history.into(),
            ready: self.ready().is_ok(),
            not_ready: self.ready().err(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::heartbeat::Nanos;
    use crate::pulse::PulseHandle;
    use crate::shared::{NodeView, PeerGlimpse};
    use crate::sockets::VipSockets;
    use crate::sys;

    /// The story of an agent with the shipped config and these lines instead of its protection.
    fn story(protect: &str) -> Story {
        let shipped = include_str!("../../../config.yaml");
        let text = shipped.replacen("protect: sync\n", &format!("{protect}\n"), 1);
        let config = crate::config::parse(&text, Path::new("config.yaml")).unwrap();
        let metrics = Arc::new(Metrics::new("test").unwrap());
        let shared = Arc::<Shared>::default();
        let redundancy = Arc::new(Redundancy::new(
            Arc::clone(&shared),
            Arc::clone(&metrics),
            PulseHandle::new().unwrap().0,
            VipSockets {
                vip: config.virtual_ip,
                ports: Vec::new(),
            },
            None,
        ));
        Story::new(
            &config,
            Role::Primary,
            0,
            XdpMode::Native,
            &shared,
            &metrics,
            &redundancy,
        )
    }

    /// The node is this, and its peer the other of active and standby; no flow is at risk.
    fn turn(story: &Story, state: State) {
        turn_to(story, state, 0);
    }

    fn turn_to(story: &Story, state: State, at_risk: u32) {
        let view = NodeView {
            state,
            epoch: 1,
            peer: Some(PeerGlimpse {
                state: match state {
                    State::Active => State::Standby,
                    _ => State::Active,
                },
                epoch: 1,
                role: Role::Backup,
                at_risk,
            }),
        };
        assert!(story.shared.try_set_node(view));
        if at_risk == 0 {
            story.shared.set_safe(ago(Duration::ZERO));
        }
    }

    fn ago(duration: Duration) -> Nanos {
        sys::monotonic() - duration.as_nanos() as Nanos
    }

    #[test]
    fn ready_is_who_heard_the_peer_within_a_second() {
        let story = story("protect: async");
        turn(&story, State::Active);
        assert!(story.ready().unwrap_err().contains("never heard"));
        story.shared.peer_heard(ago(Duration::from_secs(2)), [0; 6]);
        let why = story.ready().unwrap_err();
        assert!(why.contains("192.168.1.2 was last heard 2.0s ago"), "{why}");
        story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
        assert_eq!(story.ready(), Ok(()));
    }

    #[test]
    fn an_active_node_without_protection_for_long_is_not_ready_and_a_standby_is() {
        let story = story("protect: sync\nprotect_timeout: 4s");
        story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
        turn(&story, State::Standby);
        assert_eq!(story.ready(), Ok(()));
        turn(&story, State::Active);
        let why = story.ready().unwrap_err();
        assert!(
            why.contains("not protected") && why.contains("sync_port"),
            "{why}"
        );
        // Degraded or not: as long as this the clients may wait.
        story.shared.sync_heard(ago(Duration::from_secs(3)), 1);
        assert_eq!(story.ready(), Ok(()));
        story.shared.sync_heard(ago(Duration::from_secs(5)), 1);
        let why = story.ready().unwrap_err();
        assert!(
            why.contains("last heard 5.0s ago on the sync channel"),
            "{why}"
        );
    }

    #[test]
    fn with_flows_at_risk_for_long_neither_node_is_ready_and_status_says_how_many() {
        let story = story("protect: async");
        for (state, own, peer) in [(State::Standby, 0, 3), (State::Active, 3, 1)] {
            story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
            turn_to(&story, state, peer);
            story.shared.set_at_risk(own);
            story.shared.set_safe(ago(Duration::from_millis(500)));
            assert_eq!(story.ready(), Ok(()), "flows lag for moments");
            story.shared.set_safe(ago(Duration::from_secs(2)));
            assert_eq!(story.ready(), Err("not protected: 3 flows".into()));
            let status = story.status();
            assert_eq!((status.at_risk, status.ready), (3, false));
            assert_eq!(status.not_ready, story.ready().err());
        }
    }

    #[test]
    fn two_standbys_are_not_ready() {
        let story = story("protect: async");
        story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
        turn(&story, State::Fenced);
        let why = story.ready().unwrap_err();
        assert!(why.contains("fenced") && why.contains("active"), "{why}");
    }

    #[test]
    fn the_history_keeps_the_latest_and_counts_all() {
        let story = story("protect: async");
        for epoch in 1..=HISTORY as u64 + 2 {
            story.took_over(&Takeover {
                reason: TakeoverReason::Switchover,
                epoch,
                duration: 5,
            });
        }
        let status = story.status();
        assert_eq!(status.failovers, HISTORY as u64 + 2);
        let epochs: Vec<u64> = status.history.iter().map(|f| f.epoch).collect();
        assert_eq!(epochs, (3..=HISTORY as u64 + 2).collect::<Vec<_>>());
        assert_eq!(status.last_failover.as_ref(), status.history.last());
        assert_eq!(status.history[0].reason, "switchover");
    }

    #[test]
    fn redundancy_is_dated_while_it_lasts_and_its_lack_is_counted() {
        let story = story("protect: async");
        story.redundancy.note(false);
        assert_eq!(story.status().redundant_since, None);
        assert!(story.metrics.without_redundancy.get() > 0.0);
        story.redundancy.note(true);
        let (since, without) = (
            story.status().redundant_since,
            story.metrics.without_redundancy.get(),
        );
        assert!(since.is_some());
        story.redundancy.note(true);
        assert_eq!(story.status().redundant_since, since);
        assert_eq!(story.metrics.without_redundancy.get(), without);
        story.redundancy.note(false);
        assert_eq!(story.status().redundant_since, None);
    }

    #[test]
    fn status_tells_what_the_gate_guards() {
        let story = story("protect: sync");
        let metrics = &story.metrics;
        metrics.protection.choose(Protection::Standby);
        metrics.protection.choose(Protection::Sync);
        metrics.guarded_flows.set(GuardCondition::Guarded, 3.0);
        metrics.guarded_flows.set(GuardCondition::Exposed, 2.0);
        metrics.guarded_flows.set(GuardCondition::Opening, 1.0);
        let expected = ProtectionStatus {
            mode: Protection::Sync,
            guarded: 3,
            exposed: 2,
            opening: 1,
            sync_heard_seconds_ago: None,
        };
        assert_eq!(story.status().protection, expected);
        story.shared.sync_heard(ago(Duration::from_secs(1)), 1);
        let heard = story.status().protection.sync_heard_seconds_ago.unwrap();
        assert!((1.0..2.0).contains(&heard), "{heard}");
    }
}
