//! Who speaks for the VIP: the state machine of one node.
//!
//! Sans-IO: [`Node::handle`] takes an [`Event`] and the time, and pushes [`Action`]s.
//!
//! # Why two gates are never open at once
//!
//! With heartbeats that arrive at once and unlost, and agents that may be stopped for any time
//! between any two steps, the *gates* (active, and `now <= lease`) exclude each other:
//!
//! - A **lease** covers `lease` from the moment before a heartbeat was sent, and is written only
//!   when that heartbeat *was* sent ([`Event::HeartbeatSent`]) and the old lease still ran then. So
//!   the peer heard it before its deadline, and its new deadline (arrival + takeover time) is later
//!   than the new lease. All writes hold absolute times: a late write opens nothing.
//! - The standby's **deadline** opens its gate at once only if the peer's last word was not
//!   `standby` and nobody unproven spoke after that; else the standby claims, as below. It is checked by arrival times of the kernel and after the ring was
//!   drained ([`Event::Tick`]). If the standby itself did not run, what the peer sent meanwhile
//!   lies in the ring: its own sleep is not the peer's death.
//! - A **fenced** node resumes only on a heartbeat that says `standby` and echoes one that it sent
//!   after fencing, and only within one lease from the fencing. Its peer lets the first `fenced`
//!   heartbeat of an episode count like an active one, and no later one: it does not take over
//!   before the fenced node's chance is over, and then it does.
//! - Any other way to become active (start, peer silent while fenced) is a decision that both nodes
//!   might make at once. So it is **claimed** first: a heartbeat says `taking_over` while the gate
//!   stays closed for longer than one lease from when that was sent. Longer, because a lease holds
//!   in its last nanosecond too. Whatever the peer decided before it could hear the claim is heard
//!   by then, or has lapsed. The gate opens with the lease that the claim's heartbeats earned.
//! - A node without **carrier** earns no lease and decides nothing: see [`carrier`].
//! - A **planned handover** closes the gate before it is offered: see [`handover`].
//!
//! With loss or a cut LAN both may be active. Then the higher epoch wins, and at equal epochs the
//! numerically higher node address.

mod carrier;
pub mod events;
mod handover;
mod hear;
mod patience;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod view;

use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_common::maps::State;

use crate::fault::faulty;
use crate::heartbeat::session::PeerSession;
use crate::heartbeat::wish::{Objection, Wish};
use crate::heartbeat::{Heartbeat, Nanos};
pub use events::{Action, Event, Fact, HeartbeatResult, TakeoverReason, YieldReason};
pub use view::{NodeConfig, PeerView};

/// A wrong set-up is reported once in this time.
const COMPLAINT_INTERVAL: Nanos = 10_000_000_000;

/// What a heartbeat earns.
#[derive(Clone, Copy, Debug)]
struct PendingLease {
    sequence: u64,
    until: Nanos,
}

/// The phases behind the four states. `taking_over` has two: gate closed, and open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// `deadline` is set once the peer was heard as active. `offered`: the peer's last word was that its
    /// gate is closed and the VIP this node's to take; the deadline is when that was heard.
    Standby {
        deadline: Option<Nanos>,
        offered: bool,
    },
    /// Waits until a lease from `sent_at`, when the claim had surely been sent, has lapsed. Its
    /// heartbeats earn the lease with which the gate will be opened.
    Claiming {
        reason: TakeoverReason,
        sent_at: Option<Nanos>,
    },
    /// The gate is open; shadows and announcements are under way.
    TakingOver,
    Active,
    /// `since`, with the sequence of our first heartbeat that says so; `lapsed` is the old lease.
    Fenced {
        since: Nanos,
        first_sequence: u64,
        lapsed: Nanos,
        absence: Absence,
    },
    /// The gate is closed; the standby was offered the VIP.
    HandingOver {
        since: Nanos,
    },
    Stopped,
}

/// Whether a node was fenced for want of carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    /// It was there, and what its peer did meanwhile lies in its ring.
    None,
    /// There was no carrier, and there is none since: nobody has heard that the node is fenced.
    Away,
    /// The carrier is there again. What the peer did meanwhile nobody knows.
    Over,
}

impl Phase {
    const fn standby(deadline: Option<Nanos>) -> Self {
        let offered = false;
        Phase::Standby { deadline, offered }
    }
}

/// The state machine of one node.
///
/// ```text
///                 ┌────────────────────────────────────────────────────────┐
///  start          ▼                                                        │
///    ├──────► STANDBY ──── nobody active: startup ────► TAKING_OVER        │
///    │        │  ▲  ▲                                   claim: gate closed │
///    │        │  │  └── peer speaks and outranks us ────────┤      ▲        │
///    │        │  │                                 claim heard     │        │
///    │  deadline │                                  for a lease     │        │
///    │  passed,  │                                          ▼       │        │
///    │  ring     └─── peer outranks us ───────────── TAKING_OVER    │        │
///    │  drained ──────────────────────────────────►  gate open      │        │
///    │                ▲                              │   │          │        │
///    │                │                  TakeoverDone│   │lease     │        │
///    │                │                              ▼   │lapsed    │        │
///    │                └── peer outranks us ─────── ACTIVE│          │        │
///    │                                             ▲ │   │          │        │
///    │          peer answers "standby" in time ────┘ ▼   ▼          │        │
///    │                                             FENCED ──────────┘        │
///    │                                               │    peer silent        │
///    └─ Stop, from anywhere: silent                  └── peer speaks ────────┘
///
///  planned:  ACTIVE ──HandOver──► HANDING_OVER ── peer speaks, epoch + 1 ──► STANDBY
///                                  gate closed ── peer silent ──► TAKING_OVER (claim) ──► ACTIVE
///            STANDBY ── peer hands over, ring drained ──► TAKING_OVER, gate open
/// ```
#[derive(Debug)]
pub struct Node {
    config: NodeConfig,
    interval: Nanos,
    takeover_time: Nanos,
    lease: Nanos,
    startup_grace: Nanos,

    phase: Phase,
    epoch: u64,
    seen_epoch: u64,
    /// The kernel's lease, as last written; of no meaning while the gate is closed by state.
    lease_until: Nanos,
    /// Lease that the last heartbeat earns once it is known to have been sent.
    pending_lease: Option<PendingLease>,
    started: Nanos,
    next_send: Nanos,
    /// The interface has carrier; since when, if it once had none.
    carrier: bool,
    connected_at: Option<Nanos>,

    session: PeerSession,
    peer: Option<PeerView>,
    peer_up: bool,
    peer_fenced: bool,
    double_active: bool,
    /// The peer has been active, or about to be, in this epoch or one behind it.
    contested: bool,
    unproven_at: Option<Nanos>,
    complained_at: Option<Nanos>,

    /// When the VIP was offered last.
    offered_at: Nanos,
    /// What this node wishes, and the first heartbeat that says so.
    wish: Wish,
    wish_first: u64,
    /// What the peer wishes, and the answer.
    peer_wish: Wish,
    objection: Option<Objection>,
    /// Flows that a takeover by the standby would lose, as far as is known here.
    at_risk: u32,
}

impl Node {
    /// A node that has just started.
    pub fn new(config: NodeConfig, now: Nanos) -> Self {
        let interval = nanos(config.interval);
        Self {
            interval,
            takeover_time: interval.saturating_mul(config.missed.into()),
            lease: nanos(config.lease),
            startup_grace: nanos(config.startup_grace),
            phase: Phase::standby(None),
            epoch: 0,
            seen_epoch: 0,
            lease_until: 0,
            pending_lease: None,
            started: now,
            next_send: now,
            carrier: true,
            connected_at: None,
            session: PeerSession::new(config.node, config.peer, config.session, interval),
            peer: None,
            peer_up: false,
            peer_fenced: false,
            double_active: false,
            contested: false,
            unproven_at: None,
            complained_at: None,
            offered_at: now,
            wish: Wish::None,
            wish_first: 0,
            peer_wish: Wish::None,
            objection: None,
            at_risk: 0,
            config,
        }
    }

    /// The word for what the node is now.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Standby { .. } | Phase::Stopped => State::Standby,
            Phase::Claiming { .. } | Phase::TakingOver => State::TakingOver,
            Phase::Active => State::Active,
            Phase::Fenced { .. } => State::Fenced,
            Phase::HandingOver { .. } => State::HandingOver,
        }
    }

    /// Whether a heartbeat that claims, holds or offers the VIP is not to be sent any more: who made it has slept
    /// since, for longer than a lease, and the peer may have decided meanwhile. As good as lost.
    pub fn is_stale(&self, heartbeat: &Heartbeat, now: Nanos) -> bool {
        let decides = speaks(heartbeat.state) || heartbeat.state == State::HandingOver;
        decides && now > heartbeat.sent_ns.saturating_add(self.lease)
    }

    /// Epoch of this node, 0 before any takeover.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The peer's session, once it is proven.
    pub fn peer_session(&self) -> Option<u64> {
        self.session.peer_session()
    }

    /// What was last heard of the peer.
    pub fn peer(&self) -> Option<PeerView> {
        self.peer
    }

    /// Whether the peer was heard within the takeover time.
    pub fn peer_heard(&self, now: Nanos) -> bool {
        self.peer.is_some_and(|p| self.is_recent(p.heard_at, now))
    }

    /// Whether `at` is no longer ago than the takeover time.
    pub fn is_recent(&self, at: Nanos, now: Nanos) -> bool {
        now < at.saturating_add(self.takeover_time)
    }

    /// When the next [`Event::Tick`] is due; `Nanos::MAX` after a stop.
    pub fn next_wakeup(&self) -> Nanos {
        let decision = match self.phase {
            Phase::Stopped => return Nanos::MAX,
            _ if !self.carrier => Nanos::MAX,
            Phase::Standby {
                deadline: Some(deadline),
                ..
            } => deadline,
            Phase::Standby { deadline: None, .. } => self.startup_deadline(),
            Phase::Claiming { sent_at, .. } => sent_at.map_or(Nanos::MAX, |at| self.lapsed_at(at)),
            Phase::TakingOver | Phase::Active => Nanos::MAX,
            Phase::Fenced { .. } => self.peer_silent_at(),
            Phase::HandingOver { since } => self.offer_ends(since),
        };
        decision.min(self.next_send)
    }

    /// Takes an event at `now` and pushes what is to be done.
    pub fn handle(&mut self, event: Event, now: Nanos, actions: &mut Vec<Action>) {
        if self.phase == Phase::Stopped {
            return;
        }
        // Whatever happened, nothing may be done in the belief that the gate is open if it is not.
        if self.gate_is_open() && now > self.lease_until {
            self.fence(now, actions);
        }
        match event {
            Event::Heartbeat { heartbeat, arrival } => {
                self.process_heartbeat(heartbeat, arrival.min(now), now, actions);
            }
            Event::Tick => self.process_tick(now, actions),
            Event::HeartbeatSent { sequence } => self.process_sent(sequence, now, actions),
            Event::LinkSendFailed => self.pending_lease = None,
            Event::Carrier(carrier) => self.process_carrier(carrier, now, actions),
            Event::TakeoverDone => {
                if self.phase == Phase::TakingOver {
                    self.phase = Phase::Active;
                    actions.push(Action::Report(Fact::NowActive(self.epoch)));
                }
            }
            Event::HandOver | Event::AtRisk(_) | Event::Wish(_) | Event::Object(_) => {
                self.process_order(event, now, actions);
            }
            Event::Stop => {
                if !matches!(self.phase, Phase::Standby { .. }) {
                    self.set_kernel_state(State::Standby, 0, actions);
                }
                self.phase = Phase::Stopped;
                actions.push(Action::Report(Fact::Stopped));
            }
        }
    }

    fn gate_is_open(&self) -> bool {
        matches!(self.phase, Phase::TakingOver | Phase::Active)
    }

    // ---- time ----------------------------------------------------------------------------------

    fn process_tick(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        if self.peer_up && now >= self.peer_silent_at() {
            self.peer_up = false;
            self.end_double_active(actions);
            if let Some(silent_for) = self.peer_silent_for(now) {
                let peer = self.config.peer;
                actions.push(Action::Report(Fact::PeerDown { peer, silent_for }));
            }
        }
        let early = if faulty!(TakeOverEarly) {
            self.takeover_time / 2
        } else {
            0
        };
        match self.phase {
            _ if !self.carrier => {}
            Phase::Standby {
                deadline: Some(deadline),
                offered,
            } if now >= deadline.saturating_sub(early) => {
                let reason = Self::reason_of(offered);
                if self.peer_may_decide() {
                    self.claim(reason, now, actions);
                } else {
                    self.epoch = self.next_epoch();
                    let lease = now.saturating_add(self.lease);
                    self.take_over(reason, lease, now, actions);
                }
            }
            Phase::HandingOver { since } if now >= self.offer_ends(since) => {
                self.claim(TakeoverReason::Unanswered, now, actions);
            }
            Phase::Standby { deadline: None, .. } if now >= self.startup_deadline() => {
                self.claim(TakeoverReason::Startup, now, actions);
            }
            Phase::Fenced { .. } if now >= self.peer_silent_at() => {
                self.claim(TakeoverReason::PeerSilent, now, actions);
            }
            Phase::Claiming {
                reason,
                sent_at: Some(sent_at),
                ..
            } if now >= self.lapsed_at(sent_at) => {
                if now > self.lease_until {
                    // Slept over it: the peer's deadline may have passed meanwhile.
                    self.claim(reason, now, actions);
                } else if reason == TakeoverReason::Unanswered {
                    self.take_back(now, actions);
                } else {
                    self.take_over(reason, self.lease_until, now, actions);
                }
            }
            _ => {}
        }
        if now >= self.next_send {
            self.dispatch_heartbeat(now, actions);
        }
    }

    fn process_sent(&mut self, sequence: u64, now: Nanos, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending_lease.take_if(|p| p.sequence == sequence) else {
            return;
        };
        if let Phase::Claiming { sent_at, .. } = &mut self.phase {
            // A gap wider than a lease, and the claim begins anew.
            if sent_at.is_none() || now > self.lease_until {
                *sent_at = Some(now);
            }
            self.lease_until = pending.until;
        } else if pending.until > self.lease_until {
            // `now` is within the old lease, else the node would be fenced: see the module's proof.
            self.lease_until = pending.until;
            actions.push(Action::RenewLease {
                until: pending.until,
            });
        }
    }

    // ---- transitions ---------------------------------------------------------------------------

    fn next_epoch(&self) -> u64 {
        self.epoch.max(self.seen_epoch).saturating_add(1)
    }

    fn claim(&mut self, reason: TakeoverReason, now: Nanos, actions: &mut Vec<Action>) {
        // Who claims anew, having slept, says the same again: it was not contradicted.
        let again = matches!(self.phase, Phase::Claiming { .. }) && self.epoch > self.seen_epoch;
        if reason != TakeoverReason::Unanswered && !again {
            self.epoch = self.next_epoch();
        }
        self.phase = Phase::Claiming {
            reason,
            sent_at: None,
        };
        actions.push(Action::Report(Fact::Claiming(reason, self.epoch)));
        self.dispatch_heartbeat(now, actions);
    }

    /// Opens the gate. The epoch is set already.
    fn take_over(
        &mut self,
        reason: TakeoverReason,
        lease_until: Nanos,
        now: Nanos,
        actions: &mut Vec<Action>,
    ) {
        self.phase = Phase::TakingOver;
        self.contested = false;
        self.wish = Wish::None;
        self.set_kernel_state(State::Active, lease_until, actions);
        actions.push(Action::TakeOver {
            reason,
            epoch: self.epoch,
            peer_silent_for: self.peer_silent_for(now),
        });
        actions.push(Action::Announce);
        self.dispatch_heartbeat(now, actions);
        actions.push(Action::Report(Fact::TookOver(reason, self.epoch)));
    }

    fn yield_to_peer(
        &mut self,
        reason: YieldReason,
        deadline: Nanos,
        now: Nanos,
        actions: &mut Vec<Action>,
    ) {
        self.phase = Phase::standby(Some(deadline));
        self.epoch = self.epoch.max(self.seen_epoch);
        self.double_active = false;
        self.set_kernel_state(State::Standby, 0, actions);
        actions.push(Action::Yield { reason });
        self.dispatch_heartbeat(now, actions);
        actions.push(Action::Report(Fact::Yielded(reason, self.epoch)));
    }

    fn fence(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        let lapsed = self.lease_until;
        self.phase = Phase::Fenced {
            since: now,
            first_sequence: self.session.own_sequence() + 1,
            lapsed,
            absence: if self.carrier {
                Absence::None
            } else {
                Absence::Away
            },
        };
        self.double_active = false;
        self.set_kernel_state(State::Fenced, 0, actions);
        self.dispatch_heartbeat(now, actions);
        let lapsed_for = Duration::from_nanos(now.saturating_sub(lapsed));
        actions.push(Action::Report(Fact::Fenced {
            lapsed_for,
            carrier: self.carrier,
        }));
    }

    /// The peer's answer promises no takeover until a takeover time after `since`.
    fn resume(&mut self, since: Nanos, lapsed: Nanos, now: Nanos, actions: &mut Vec<Action>) {
        let until = since.saturating_add(self.lease);
        if now >= until {
            return;
        }
        self.phase = Phase::Active;
        self.set_kernel_state(State::Active, until, actions);
        let closed_for = now.saturating_sub(lapsed);
        if closed_for > self.takeover_time {
            actions.push(Action::Announce);
        }
        self.dispatch_heartbeat(now, actions);
        let closed_for = Duration::from_nanos(closed_for);
        actions.push(Action::Report(Fact::Resumed { closed_for }));
    }

    fn begin_double_active(
        &mut self,
        heartbeat: &Heartbeat,
        now: Nanos,
        actions: &mut Vec<Action>,
    ) {
        if self.double_active {
            return;
        }
        self.double_active = true;
        self.dispatch_heartbeat(now, actions);
        actions.push(Action::Announce);
        actions.push(Action::Report(Fact::DoubleActive {
            own: self.epoch,
            peer: heartbeat.epoch,
        }));
    }

    /// The peer announced itself until now, so the neighbours must hear the winner last.
    fn end_double_active(&mut self, actions: &mut Vec<Action>) {
        if self.double_active {
            self.double_active = false;
            actions.push(Action::Announce);
            actions.push(Action::Report(Fact::DoubleActiveEnded));
        }
    }

    // ---- out -----------------------------------------------------------------------------------

    fn set_kernel_state(&mut self, state: State, lease_until: Nanos, actions: &mut Vec<Action>) {
        self.lease_until = lease_until;
        self.pending_lease = None;
        actions.push(Action::SetState {
            state,
            epoch: self.epoch,
            lease_until,
        });
    }

    fn dispatch_heartbeat(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        let (session, sequence, echo) = self.session.stamp();
        let heartbeat = Heartbeat {
            state: self.state(),
            role: self.config.role,
            node: self.config.node,
            mac: self.config.mac,
            tap_mac: self.config.tap_mac,
            epoch: self.epoch,
            session,
            sequence,
            sent_ns: now,
            echo,
            wish: self.wish,
            objection: self.objection,
            at_risk: self.at_risk,
        };
        let to = self.peer.filter(|_| self.peer_heard(now)).map(|p| p.mac);
        actions.push(Action::SendHeartbeat { heartbeat, to });
        self.pending_lease = (self.carrier && speaks(heartbeat.state)).then(|| PendingLease {
            sequence,
            until: now.saturating_add(self.lease),
        });
        // A late tick does not send what it missed; an extra heartbeat starts the interval anew.
        let slot = self.next_send.saturating_add(self.interval);
        self.next_send = if now >= self.next_send && slot > now {
            slot
        } else {
            now.saturating_add(self.interval)
        };
    }
}

/// Who is to be active, the greatest. At the same epoch it is who is already: who claims it then has not heard
/// of that, and its connections are from before. States only grow within an epoch, so of two that have not heard
/// all of each other at most one yields.
fn rank(epoch: u64, state: State, node: Ipv4Addr) -> (u64, bool, Ipv4Addr) {
    (epoch, state == State::Active, node)
}

/// States that count as speaking for the VIP, or being about to.
fn speaks(state: State) -> bool {
    matches!(state, State::Active | State::TakingOver)
}

fn nanos(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(Nanos::MAX)
}
