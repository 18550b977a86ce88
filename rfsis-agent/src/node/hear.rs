//! What a heartbeat of the peer's changes.

use rfsis_common::maps::State;

use super::events::{Action, Fact, HeartbeatResult, TakeoverReason, YieldReason};
use super::view::PeerView;
use super::{Absence, COMPLAINT_INTERVAL, Nanos, Node, Phase, rank, speaks};
use crate::fault::faulty;
use crate::heartbeat::Heartbeat;
use crate::heartbeat::session::{Freshness, Refusal};

impl Node {
    pub(super) fn process_heartbeat(
        &mut self,
        heartbeat: Heartbeat,
        arrival: Nanos,
        now: Nanos,
        actions: &mut Vec<Action>,
    ) {
        let freshness = match self.session.judge(&heartbeat) {
            Ok(freshness) => freshness,
            Err(refusal) => return self.process_refusal(refusal, arrival, now, actions),
        };
        actions.push(Action::Count(HeartbeatResult::Accepted));
        self.note_peer(&heartbeat, freshness, arrival, actions);
        self.process_wish(&heartbeat, actions);

        let speaks = speaks(heartbeat.state);
        let theirs = rank(heartbeat.epoch, heartbeat.state, heartbeat.node);
        let outranks_us =
            theirs > rank(self.epoch, self.state(), self.config.node) && !faulty!(IgnoreEpoch);
        // What came before the cable was cut says nothing of the time since it is there again.
        let before_cut = self.connected_at.is_some_and(|at| arrival < at);
        let heard_at = arrival.max(self.connected_at.unwrap_or(0));
        let deadline = heard_at.saturating_add(self.takeover_time);
        let newly_fenced = heartbeat.state == State::Fenced && !self.peer_fenced;
        self.peer_fenced = heartbeat.state == State::Fenced;

        match self.phase {
            Phase::Standby { .. } if heartbeat.state == State::HandingOver && !before_cut => {
                self.epoch = self.epoch.max(self.seen_epoch);
                // Taken by the next tick, which knows what came behind it.
                self.phase = Phase::Standby {
                    deadline: Some(arrival),
                    offered: true,
                };
            }
            Phase::Standby { deadline: old, .. } if speaks || newly_fenced => {
                self.epoch = self.epoch.max(self.seen_epoch);
                // Heartbeats may overtake each other: a deadline never comes nearer.
                let deadline = old.map_or(deadline, |old| old.max(deadline));
                self.phase = Phase::standby(Some(deadline));
                if newly_fenced {
                    // The peer is silent until it gets this answer.
                    self.dispatch_heartbeat(now, actions);
                }
            }
            Phase::HandingOver { .. }
            | Phase::Claiming {
                reason: TakeoverReason::Unanswered,
                ..
            } if speaks && outranks_us => {
                self.yield_to_peer(YieldReason::HandedOver, deadline, now, actions);
            }
            Phase::Claiming {
                reason: TakeoverReason::PeerSilent,
                ..
            } if speaks && outranks_us => {
                self.yield_to_peer(YieldReason::PeerActive, deadline, now, actions);
            }
            Phase::Claiming { .. } if speaks && outranks_us => {
                self.phase = Phase::standby(Some(deadline));
                actions.push(Action::Report(Fact::ClaimWithdrawn));
                self.dispatch_heartbeat(now, actions);
            }
            Phase::Claiming { reason, sent_at } if speaks => {
                // It will yield, but perhaps has not heard us yet: its lease runs from this on.
                self.phase = Phase::Claiming {
                    reason,
                    sent_at: sent_at.map(|at| at.max(arrival)),
                };
            }
            Phase::TakingOver | Phase::Active if speaks && outranks_us => {
                self.yield_to_peer(YieldReason::Outranked, deadline, now, actions);
            }
            Phase::TakingOver | Phase::Active if speaks => {
                self.begin_double_active(&heartbeat, now, actions);
            }
            Phase::TakingOver | Phase::Active => {
                self.end_double_active(actions);
                self.outgrow(&heartbeat);
            }
            // Silent already, so there is nothing to contest: it keeps whoever does speak.
            Phase::Fenced { .. } if speaks => {
                self.yield_to_peer(YieldReason::PeerActive, deadline, now, actions);
            }
            // It has been active meanwhile, or the agent before it may have been.
            Phase::Fenced {
                absence: Absence::Over,
                ..
            } if heartbeat.epoch > self.epoch || freshness == Freshness::NewSession => {
                self.yield_to_peer(YieldReason::PeerActive, deadline, now, actions);
            }
            Phase::Fenced { .. } if heartbeat.state == State::Fenced && outranks_us => {
                self.yield_to_peer(YieldReason::BothFenced, deadline, now, actions);
            }
            Phase::Fenced {
                since,
                first_sequence,
                lapsed,
                absence: Absence::None | Absence::Over,
            } if heartbeat.state == State::Standby
                && self.session.echoes_since(heartbeat.echo, first_sequence) =>
            {
                self.resume(since, lapsed, now, actions);
            }
            // A standby passes the highest epoch on: a peer that restarts learns it from here.
            Phase::Standby { .. } => self.epoch = self.epoch.max(self.seen_epoch),
            Phase::Claiming { .. }
            | Phase::Fenced { .. }
            | Phase::HandingOver { .. }
            | Phase::Stopped => {}
        }
    }

    /// A standby that had begun to take over, in an epoch that is not below this one, and has given up, knows
    /// nothing any more of the connections that it followed. The next epoch is one in which it has confirmed nothing.
    fn outgrow(&mut self, heartbeat: &Heartbeat) {
        let contests = heartbeat.epoch >= self.epoch;
        if heartbeat.state != State::Standby {
            self.contested |= contests;
        } else if self.contested || heartbeat.epoch > self.epoch {
            self.contested = false;
            self.epoch = self.next_epoch();
        }
    }

    fn process_refusal(
        &mut self,
        refusal: Refusal,
        arrival: Nanos,
        now: Nanos,
        actions: &mut Vec<Action>,
    ) {
        actions.push(Action::Count(HeartbeatResult::Refused(refusal)));
        match refusal {
            Refusal::Unproven => self.unproven_at = Some(arrival),
            Refusal::OwnId(_) | Refusal::UnknownNode(_) => {
                let silent = self
                    .complained_at
                    .is_none_or(|at| now >= at.saturating_add(COMPLAINT_INTERVAL));
                if silent {
                    self.complained_at = Some(now);
                    actions.push(Action::Report(Fact::Misconfigured(refusal)));
                }
            }
            Refusal::Stale => {}
        }
    }

    fn note_peer(
        &mut self,
        heartbeat: &Heartbeat,
        freshness: Freshness,
        arrival: Nanos,
        actions: &mut Vec<Action>,
    ) {
        let before = self.peer;
        let heard_at = before.map_or(arrival, |p| p.heard_at.max(arrival));
        let was_standby =
            before.filter(|p| (p.state, heartbeat.state) == (State::Standby, State::Standby));
        self.seen_epoch = self.seen_epoch.max(heartbeat.epoch);
        self.peer = Some(PeerView {
            node: heartbeat.node,
            role: heartbeat.role,
            state: heartbeat.state,
            epoch: heartbeat.epoch,
            heard_at,
            active_until: was_standby.map_or(heard_at, |p| p.active_until),
            mac: heartbeat.mac,
            tap_mac: heartbeat.tap_mac,
            at_risk: heartbeat.at_risk,
        });
        if before.is_some() && freshness == Freshness::NewSession {
            actions.push(Action::Report(Fact::PeerRestarted(heartbeat.node)));
        }
        match before {
            Some(before) if self.peer_up => {
                if before.state != heartbeat.state {
                    actions.push(Action::Report(Fact::PeerState {
                        from: before.state,
                        to: heartbeat.state,
                        epoch: heartbeat.epoch,
                    }));
                }
            }
            _ => actions.push(Action::Report(Fact::PeerUp {
                peer: heartbeat.node,
                role: heartbeat.role,
                state: heartbeat.state,
                epoch: heartbeat.epoch,
            })),
        }
        self.peer_up = true;
    }
}
