//! A node whose own cable is cut: nobody hears it, and the silence of its peer says nothing.
//!
//! Without carrier it takes over from nobody, claims nothing and earns no lease: an active is fenced by its own
//! kernel before its standby takes over, and silent when the cable is plugged in again, until both have met. If
//! both had none, as behind a switch that was restarted, the active goes on as if nothing had been.
//! With the carrier the peer gets the time anew in which it is to be heard.
//!
//! Only a cut that the own interface shows is known here. Between two switches it makes two actives.

use super::{Absence, Action, Fact, Nanos, Node, Phase};
use crate::fault::faulty;

impl Node {
    /// The interface has carrier, or has it no longer.
    pub(super) fn process_carrier(&mut self, carrier: bool, now: Nanos, actions: &mut Vec<Action>) {
        if carrier == self.carrier || faulty!(IgnoreCarrier) {
            return;
        }
        self.carrier = carrier;
        self.pending_lease = None;
        actions.push(Action::Report(Fact::Carrier(carrier)));
        if carrier {
            self.connected_at = Some(now);
            self.reconnect(now, actions);
        } else if let Phase::Claiming { sent_at, .. } = &mut self.phase {
            // Perhaps nobody has heard of it.
            *sent_at = None;
        }
    }

    fn reconnect(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        match self.phase {
            // What was offered may have been taken back since.
            Phase::Standby {
                deadline: Some(deadline),
                ..
            } => {
                let heard_by_then = now.saturating_add(self.takeover_time);
                self.phase = Phase::standby(Some(deadline.max(heard_by_then)));
            }
            Phase::Standby { deadline: None, .. } => self.started = now,
            // A switch forgets who was behind a port without carrier.
            Phase::TakingOver | Phase::Active => actions.push(Action::Announce),
            // The standby hears only now that this node is fenced, and promises what it would have promised then.
            Phase::Fenced {
                lapsed,
                absence: Absence::Away,
                ..
            } => {
                self.phase = Phase::Fenced {
                    since: now,
                    first_sequence: self.session.own_sequence() + 1,
                    lapsed,
                    absence: Absence::Over,
                };
            }
            Phase::Claiming { .. }
            | Phase::Fenced { .. }
            | Phase::HandingOver { .. }
            | Phase::Stopped => {}
        }
        self.dispatch_heartbeat(now, actions);
    }

    /// Until when the peer may have been active without being heard here, ns; `None` if it was never heard. One that has
    /// started anew, and says so again and again, is no longer the active that it was.
    pub fn peer_lived_until(&self) -> Option<Nanos> {
        let peer = self.peer?;
        Some(peer.active_until.max(self.connected_at.unwrap_or(0)))
    }
}
