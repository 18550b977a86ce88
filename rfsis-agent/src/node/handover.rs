//! The planned handover, and the wishes that lead to it.
//!
//! ```text
//!   active                                   standby
//!     │ gate closed                             │
//!     │ ── heartbeat: handing_over, epoch e ──► │ ring drained, nothing else heard: gate open
//!     │ ◄────── heartbeat: taking_over, e + 1 ─ │
//!   standby                                   active
//! ```
//!
//! # Why two gates are not open at once
//!
//! The gate is closed *before* the offer is made, so the standby may open its own as soon as it hears it. A
//! node whose offer is not answered within the takeover time **claims** the VIP again: the gate stays closed
//! until a lease from the claim has lapsed. A standby that decides by an offer does so at a time before it
//! could hear the claim, else it finds the claim behind the offer when it drains its ring; so by then its
//! lease has lapsed, or one of its heartbeats was heard, and it outranks who claims: the claim keeps the
//! epoch of the offer, and the standby's is higher.

use std::time::Duration;

use rfsis_common::maps::State;

use super::{Action, Event, Fact, Nanos, Node, Phase, TakeoverReason};
use crate::fault::faulty;
use crate::heartbeat::Heartbeat;
use crate::heartbeat::wish::{Objection, Wish};

impl Node {
    /// Offers the VIP to the standby. Nothing is lost by trying: where nobody takes it, this node goes on.
    pub(super) fn hand_over(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        let listens = self.peer_heard(now) && self.peer.is_some_and(|p| p.state == State::Standby);
        let objection = match self.phase {
            Phase::Active if listens => None,
            Phase::Active => Some(Objection::NoStandby),
            _ => Some(Objection::NotActive),
        };
        if let Some(objection) = objection {
            actions.push(Action::Report(Fact::NotHandedOver(objection)));
            return;
        }
        self.phase = Phase::HandingOver { since: now };
        self.offered_at = now;
        self.double_active = false;
        // What is between the programs on ingress is still to be copied.
        let state = if faulty!(OfferTooEarly) {
            State::Active
        } else {
            State::HandingOver
        };
        self.set_kernel_state(state, self.lease_until, actions);
        self.dispatch_heartbeat(now, actions);
        actions.push(Action::Report(Fact::HandingOver(self.epoch)));
    }

    /// The peer did not take what it was offered: everything here is as it was.
    pub(super) fn take_back(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        self.phase = Phase::Active;
        self.set_kernel_state(State::Active, self.lease_until, actions);
        // It may have announced itself and died.
        actions.push(Action::Announce);
        self.dispatch_heartbeat(now, actions);
        let closed_for = Duration::from_nanos(now.saturating_sub(self.offered_at));
        actions.push(Action::Report(Fact::Resumed { closed_for }));
    }

    /// What is to be said to the peer about handovers.
    pub(super) fn process_order(&mut self, event: Event, now: Nanos, actions: &mut Vec<Action>) {
        match event {
            Event::HandOver => return self.hand_over(now, actions),
            Event::AtRisk(flows) => {
                self.at_risk = flows;
                return;
            }
            Event::Wish(wish) => {
                self.wish = wish;
                self.wish_first = self.session.own_sequence() + 1;
            }
            // Nobody asks any more: there is nothing to answer.
            Event::Object(_) if self.peer_wish == Wish::None => return,
            Event::Object(objection) => self.objection = Some(objection),
            _ => return,
        }
        self.dispatch_heartbeat(now, actions);
    }

    /// What the peer wishes, and what it answers to the wish of this node.
    pub(super) fn process_wish(&mut self, heartbeat: &Heartbeat, actions: &mut Vec<Action>) {
        if heartbeat.wish != self.peer_wish {
            self.peer_wish = heartbeat.wish;
            self.objection = None;
            match (heartbeat.wish, self.phase) {
                (Wish::None, _) => {}
                (wish, Phase::Active) => actions.push(Action::Wished(wish)),
                _ => self.objection = Some(Objection::NotActive),
            }
        }
        if self.wish != Wish::None
            && let Some(objection) = heartbeat.objection
            && self.session.echoes_since(heartbeat.echo, self.wish_first)
        {
            self.wish = Wish::None;
            let flows = heartbeat.at_risk;
            actions.push(Action::Report(Fact::Refused { objection, flows }));
        }
    }

    /// Why a standby whose deadline has passed takes over.
    pub(super) const fn reason_of(offered: bool) -> TakeoverReason {
        if offered {
            TakeoverReason::Switchover
        } else {
            TakeoverReason::HeartbeatTimeout
        }
    }
}
