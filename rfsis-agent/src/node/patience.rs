//! How long a node waits, and for whom.

use std::time::Duration;

use rfsis_common::maps::State;

use super::{Nanos, Node};
use crate::cli::Role;

/// A running peer is proven within this time after our start, even at slow schedulers.
pub(super) const START_WAIT: Nanos = 200_000_000;

impl Node {
    /// Whether the peer may become active by a decision of its own that we cannot foresee: a
    /// takeover of ours must then be claimed.
    pub(super) fn peer_may_decide(&self) -> bool {
        self.peer.is_none_or(|peer| {
            // Two that yielded to each other both have a deadline; and an unproven session may be
            // the peer's new agent. A replay can bring this about too: it costs one lease.
            peer.state == State::Standby || self.unproven_at.is_some_and(|at| at > peer.heard_at)
        })
    }

    /// When a node that never heard an active peer may claim the VIP.
    pub(super) fn startup_deadline(&self) -> Nanos {
        let start_wait = match self.config.role {
            Role::Primary => START_WAIT.max(self.takeover_time.saturating_mul(2)),
            Role::Backup => self.startup_grace,
        };
        let patience = self.started.saturating_add(start_wait);
        let Some(peer) = self.peer else {
            // Somebody with the key may be there: give it time to be proven. Not forever, or a
            // recording that is replayed again and again would keep the VIP dead.
            let proven_or_silent = self
                .unproven_at
                .map_or(patience, |at| at.saturating_add(self.takeover_time));
            let at_most = patience.saturating_add(self.startup_grace);
            return patience.max(proven_or_silent.min(at_most));
        };
        let we_outrank = match (self.config.role, peer.role) {
            (Role::Primary, Role::Backup) => true,
            (Role::Backup, Role::Primary) => false,
            _ => self.config.node < peer.node,
        };
        if !self.peer_up {
            let grace = match self.config.role {
                Role::Primary => self.takeover_time,
                Role::Backup => self.startup_grace.max(self.takeover_time),
            };
            return patience.max(peer.heard_at.saturating_add(grace));
        }
        match self.config.role {
            // An epoch says that somebody was active: then the peer may be about to take over, and
            // it has the shadows.
            Role::Primary if we_outrank && self.seen_epoch == 0 => self.started,
            _ if we_outrank => patience,
            // It should have claimed by then. Perhaps its frames of the VIP cannot leave.
            _ => patience
                .saturating_add(self.startup_grace)
                .saturating_add(self.takeover_time),
        }
    }

    /// First moment at which a lease from `since` no longer holds; both nodes have the same lease.
    pub(super) fn lapsed_at(&self, since: Nanos) -> Nanos {
        since.saturating_add(self.lease).saturating_add(1)
    }

    pub(super) fn peer_silent_at(&self) -> Nanos {
        // From the carrier's return on it could be heard.
        let since = self.peer.map(|peer| peer.heard_at).max(self.connected_at);
        since.map_or(0, |at| at.saturating_add(self.takeover_time))
    }

    pub(super) fn peer_silent_for(&self, now: Nanos) -> Option<Duration> {
        self.peer
            .map(|p| Duration::from_nanos(now.saturating_sub(p.heard_at)))
    }

    /// When an offer counts as not answered.
    pub(super) fn offer_ends(&self, since: Nanos) -> Nanos {
        since.saturating_add(self.takeover_time)
    }
}
