//! The active's half of `protect: sync`: which flows the ACK gate guards, and what it may let them say.
//!
//! Sans-IO: [`Guard`] takes openings that the gate reports, records of the standby and the time, and acts
//! through [`GuardEffects`]. What it has to tell the standby is fetched by [`Guard::take_records`].
//!
//! ```text
//!  SYN-ACK held ──► OPENING ──(standby knows it)──► GUARDED ◄──────────────┐
//!                      │  OPEN, repeated               │                   │ confirmed all that
//!                      │                               │ standby silent    │ the client was told
//!                      │ refused: let go               ▼                   │
//!                      └─(standby silent)────────► EXPOSED ─────────► CLOSING
//!                                      the gate passes all of it      the client is told no more
//! ```
//!
//! A standby that was started anew knows none of them. It says so when it is asked, and gets them one after
//! the other: see `guard/late.rs`.
//!
//! A release may race with the gate: it reads the confirmation, and holds an ACK just after this module
//! has looked. So each flow is looked at once more, [`RECHECK`] later.

mod effects;
mod flow;
mod half_open;
mod late;
#[cfg(test)]
mod mock;
mod opening;
mod time;

use std::collections::{BTreeSet, VecDeque};
use std::net::Ipv4Addr;

use rfsis_common::ack_gate::{Confirmation, Release, Sent, release};
use rfsis_common::frame::tcp_flags;
use rfsis_common::maps::{Direction, FlowKey, HeldEvent};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber, TcpTimestampRepr};

pub use self::effects::GuardEffects;
use self::flow::{Flow, Phase, Syn};
use self::half_open::Handshakes;
pub use self::opening::slots;
use crate::collections::HashMap;
use crate::fault::faulty;
use crate::heartbeat::Nanos;
use crate::join::{Ended, Joins};
use crate::lockstep::before;
use crate::segment;
use crate::sync::{Confirm, Open, Record, Sack};
use crate::wire::{bare_repr, emit_packet};

const MS: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MS;

/// A flow that was confirmed is looked at once more about so much later, ns: all that are due at the same
/// multiple of it.
const RECHECK: Nanos = MS;
/// After this if the kernel had not yet wanted to say what was confirmed: at that very moment it may be
/// doing so, and find the older confirmation. Its client would wait, with a millisecond's worth of window.
const RECHECK_SOON: Nanos = MS / 10;

/// So many flows are looked at in each of these times, ns, whether they have ended: a look is two system
/// calls, and clients wait meanwhile. When all have been and nobody confirms, there is a longer pause: a thread that
/// wakes is felt by whoever transfers. Else it must wake for openings that the standby does not answer, too.
const SWEEP_AT_ONCE: usize = 128;
const SWEEP_PAUSE: Nanos = 20 * MS;
const SWEPT_PAUSE: Nanos = 200 * MS;

/// Bounds and surroundings.
#[derive(Clone, Copy, Debug)]
pub struct GuardConfig {
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// A standby that was not heard for so long protects nothing, ns.
    pub timeout: Nanos,
    /// Flows at the most; the gate's maps have more slots, see [`slots`].
    pub max_flows: usize,
    /// A flow that is silent for so long is forgotten, as its shadow is, ns.
    pub idle_timeout: Nanos,
    /// The standby gets a copy of a SYN-ACK that is held: it is told of it only if it does not answer.
    pub copied: bool,
}

/// How well what passes the gate is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A standby answers: what it has not confirmed is held.
    Guarding,
    /// The standby was silent for the time given, ns; the gate is open.
    Degraded {
        /// Flows that were guarded and are exposed now.
        exposed: usize,
    },
    /// The standby is heard, and confirms nothing of these: they are handed over anew.
    Stuck {
        /// How many.
        flows: usize,
    },
    /// The standby's agent is another: what the old one held is lost.
    StandbyForgot {
        /// Flows that the new one does not know yet.
        flows: usize,
    },
}

/// Flows by how they are protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardCensus {
    /// Their SYN-ACK is held.
    pub opening: usize,
    /// Every byte that the client was told of is on the standby.
    pub guarded: usize,
    /// Perhaps not.
    pub exposed: usize,
    /// Let go since the start because the standby did not take them.
    pub refused: u64,
    /// To be handed over to a standby that does not know them.
    pub joining: usize,
}

/// Guards the flows of an active node.
#[derive(Debug)]
pub struct Guard {
    config: GuardConfig,
    active: bool,
    guarding: bool,
    heard_at: Option<Nanos>,
    next_tick: Nanos,
    next_sweep: Nanos,
    /// Flows that are still to be looked at in this round.
    to_sweep: Vec<FlowKey>,
    ping: bool,
    /// When the first ping was sent that is not answered yet; 0 if none was.
    pinged_at: Nanos,
    syns: HashMap<FlowKey, Syn>,
    syn_order: VecDeque<(FlowKey, u32)>,
    flows: HashMap<FlowKey, Flow>,
    /// Slots that no flow has, longest free first: a segment on its way through the gate may still write
    /// to one that was just freed.
    free: VecDeque<u32>,
    /// How many more the gate has, for flows on which the kernels agree.
    lent: usize,
    /// When a standby was heard after none was, ns. What the kernels agreed on before was with another, or with one
    /// that has been silent since.
    guarding_since: Nanos,
    /// Handshakes, oldest first; some are completed.
    handshakes: Handshakes,
    /// Openings to be repeated.
    repeats: BTreeSet<(Nanos, FlowKey)>,
    rechecks: BTreeSet<(Nanos, FlowKey)>,
    /// Flows that are closing, and when they are to be looked at.
    closings: VecDeque<(Nanos, FlowKey)>,
    /// Exposed flows that the standby is still to be asked for.
    to_ask: Vec<FlowKey>,
    /// Flows that it does not know.
    joins: Joins,
    records: Vec<Record>,
    facts: Vec<Fact>,
    refused: u64,
}

impl Guard {
    /// Of a node that is standby; the gate's maps are empty.
    pub fn new(config: GuardConfig) -> Self {
        Self {
            config,
            active: false,
            guarding: false,
            heard_at: None,
            next_tick: 0,
            next_sweep: 0,
            to_sweep: Vec::new(),
            ping: false,
            pinged_at: 0,
            syns: HashMap::default(),
            syn_order: VecDeque::new(),
            flows: HashMap::default(),
            free: (0..slots(config.max_flows) as u32).collect(),
            lent: 0,
            guarding_since: 0,
            handshakes: Handshakes::default(),
            repeats: BTreeSet::new(),
            rechecks: BTreeSet::new(),
            closings: VecDeque::new(),
            to_ask: Vec::new(),
            joins: Joins::default(),
            records: Vec::new(),
            facts: Vec::new(),
            refused: 0,
        }
    }

    /// The node is active now: it asks for a standby.
    pub fn go_active(&mut self, now: Nanos) {
        self.active = true;
        self.next_sweep = now + SECOND;
        self.seek(now);
    }

    /// There may be a standby now that answers, where there was none.
    pub fn seek(&mut self, now: Nanos) {
        self.next_tick = now;
        self.pinged_at = 0;
    }

    /// The node is not active any more: nothing of what it guarded is its own.
    pub fn go_standby(&mut self, fx: &mut impl GuardEffects) {
        self.active = false;
        self.heard_at = None;
        self.set_guarding(false, fx);
        self.forget_all(fx);
        self.records.clear();
    }

    /// Whether every byte of which this flow's client is told is on the standby.
    pub fn guards(&self, flow: FlowKey) -> bool {
        let phase = self.flows.get(&flow).map(|flow| &flow.phase);
        self.guarding && matches!(phase, Some(Phase::Guarded))
    }

    /// Whether the gate holds what the standby has not confirmed.
    pub fn is_guarding(&self) -> bool {
        self.guarding
    }

    /// The standby's agent is another one than before, or has been active: what it held is lost.
    pub fn peer_changed(&mut self, now: Nanos, fx: &mut impl GuardEffects) {
        if faulty!(ForgetRestart) {
            return;
        }
        self.heard_at = None;
        self.seek(now);
        self.set_guarding(false, fx);
        self.expose_all(now, fx);
        self.joins.clear();
        self.to_ask.clear();
        for flow in self.flows.values_mut() {
            flow.confirmation = Confirmation::default();
            flow.closed_in_vain = 0;
        }
        let flows = self.flows.len();
        if flows > 0 {
            self.facts.push(Fact::StandbyForgot { flows });
        }
    }

    /// An authentic datagram of the standby came in.
    pub fn heard(&mut self, now: Nanos, fx: &mut impl GuardEffects) {
        if !self.active {
            return;
        }
        self.heard_at = Some(now);
        if !self.guarding {
            self.set_guarding(true, fx);
            self.guarding_since = now;
            self.lend_slots(fx);
            self.facts.push(Fact::Guarding);
            self.to_ask.clear();
            let exposed = self.flows.iter();
            self.to_ask.extend(
                exposed
                    .filter(|(_, flow)| matches!(flow.phase, Phase::Exposed))
                    .map(|(key, _)| *key),
            );
            self.next_tick = now;
        }
    }

    /// Whether an RST that the gate held is to be kept from the client: by it the kernel says that it does not
    /// have a connection (RFC 9293 section 3.10.7.1) which is known here.
    ///
    /// Of two segments on two CPUs one completes the handshake and the other may find neither the request nor the
    /// connection that replaces it (`inet_ehash_insert`, net/ipv4/inet_hashtables.c). A client that repeats itself
    /// finds it; when the kernel says so again it is true.
    pub fn doubts(&mut self, held: &HeldEvent) -> bool {
        const KIND: u8 = tcp_flags::RST | tcp_flags::ACK;
        match self.flows.get_mut(&held.flow) {
            Some(flow) if held.flags as u8 & KIND == tcp_flags::RST => {
                !std::mem::replace(&mut flow.denied, true)
            }
            _ => false,
        }
    }

    fn set_guarding(&mut self, on: bool, fx: &mut impl GuardEffects) {
        if self.guarding != on {
            self.guarding = on;
            fx.set_guarding(on);
        }
    }

    // ---- what the standby says -----------------------------------------------------------------

    /// Takes a record of the standby's.
    pub fn process_record(&mut self, record: &Record, now: Nanos, fx: &mut impl GuardEffects) {
        match record {
            Record::Known(open) => self.process_known(open, now, fx),
            Record::Confirm(confirm) => self.process_confirm(confirm, now, fx),
            Record::Refuse { flow, client_isn } if self.is(flow, *client_isn) => {
                if self.is_opening(flow) {
                    if self.claim(*flow, fx) {
                        self.refused += 1;
                        self.let_go(*flow, fx);
                        self.forget(*flow, fx);
                    }
                } else {
                    self.hand_over(*flow, now, fx);
                }
            }
            // An opening is none that the standby has forgotten: it is told of it until it answers.
            Record::Close { flow, client_isn }
                if self.is(flow, *client_isn) && !self.is_opening(flow) =>
            {
                self.tell_all(*flow, fx);
                self.forget(*flow, fx);
            }
            Record::Got { flow, join, next } => self.process_got(*flow, *join, *next, now, fx),
            Record::Decline { flow, join } => self.process_decline(*flow, *join, now, fx),
            Record::Lost { flow, join } => self.process_lost(*flow, *join, now, fx),
            _ => {}
        }
    }

    fn is(&self, flow: &FlowKey, client_isn: u32) -> bool {
        self.flows
            .get(flow)
            .is_some_and(|known| known.client_isn == client_isn)
    }

    fn is_opening(&self, flow: &FlowKey) -> bool {
        let phase = self.flows.get(flow).map(|flow| &flow.phase);
        matches!(phase, Some(Phase::Opening { .. }))
    }

    /// The standby follows a handshake: if it is the one whose SYN-ACK is held, that may leave.
    fn process_known(&mut self, open: &Open, now: Nanos, fx: &mut impl GuardEffects) {
        if self.is(&open.flow, open.client_isn) && !self.claim(open.flow, fx) {
            return;
        }
        let known = self.flows.get_mut(&open.flow);
        let Some(flow) = known.filter(|flow| flow.client_isn == open.client_isn) else {
            self.disown(open.flow, open.client_isn);
            return;
        };
        flow.known_at = now;
        let Phase::Opening {
            open: ours, answer, ..
        } = &flow.phase
        else {
            return;
        };
        // By an older copy, or a forged one: it will be told.
        if **ours != *open {
            return;
        }
        let sent = Sent::new(open.client_isn, open.active_isn, window_of(answer)).at(now);
        let promised = sent.everything();
        let ready = fx.start(flow.slot, sent)
            && fx.confirm(flow.slot, promised)
            && fx.publish(open.flow, flow.guarded());
        fx.send(answer);
        flow.confirmation = promised;
        flow.protect(fx);
        self.syns.remove(&open.flow);
        if !ready {
            self.refused += 1;
            self.forget(open.flow, fx);
        }
    }

    /// Let go, or forgotten: the standby must not take it for guarded.
    ///
    /// A node that is not active has nothing to say of it: its agent was perhaps started anew, and the standby
    /// is about to take over what the old one guarded.
    fn disown(&mut self, flow: FlowKey, client_isn: u32) {
        if self.active {
            self.records.push(Record::Close { flow, client_isn });
        }
    }

    fn process_confirm(&mut self, confirm: &Confirm, now: Nanos, fx: &mut impl GuardEffects) {
        let known = self.flows.get_mut(&confirm.flow);
        let Some(flow) = known.filter(|flow| flow.client_isn == confirm.client_isn) else {
            self.disown(confirm.flow, confirm.client_isn);
            return;
        };
        // The client cannot have said more: a word of an older connection. Or of a shadow that an offer has ended.
        if matches!(flow.phase, Phase::Opening { .. }) || self.joins.is_empty_handed(&confirm.flow)
        {
            return;
        }
        flow.known_at = now;
        let fresh = Confirmation::new(confirm.ack, confirm.edge);
        if matches!(flow.phase, Phase::Guarded) {
            flow.confirmation = fx.confirm_more(flow.slot, fresh);
        } else {
            flow.confirmation = flow.confirmation.with(fresh);
            if matches!(flow.phase, Phase::Exposed) {
                self.protect_again(confirm.flow, now, fx);
                return;
            }
            fx.confirm(flow.slot, flow.confirmation);
        }
        let caught_up = Self::release(self.config.vip, confirm.flow, flow, &confirm.sack, fx);
        if matches!(flow.phase, Phase::Closing { .. }) && flow.is_all_confirmed(fx) {
            flow.protect(fx);
        }
        let soon = now + RECHECK_SOON;
        let at = if caught_up {
            soon.next_multiple_of(RECHECK)
        } else {
            soon
        };
        if flow.recheck.is_none_or(|planned| at < planned) {
            if let Some(planned) = flow.recheck.replace(at) {
                self.rechecks.remove(&(planned, confirm.flow));
            }
            self.rechecks.insert((at, confirm.flow));
        }
    }

    /// Tells the client what it may know by now. Returns whether the kernel has wanted to say all that is
    /// confirmed.
    fn release(
        vip: Ipv4Addr,
        key: FlowKey,
        flow: &Flow,
        sack: &Sack,
        fx: &mut impl GuardEffects,
    ) -> bool {
        let Some(sent) = fx.sent(flow.slot) else {
            return false;
        };
        let caught_up = !before(sent.ack, flow.confirmation.ack());
        let due = release(&sent, flow.confirmation, flow.shift.into());
        let behind = before(flow.confirmation.ack(), sent.ack);
        let is_held = |(_, end): &(u32, u32)| !before(flow.confirmation.ack(), *end);
        // The standby lacks what the kernel has, or knows better than the kernel may say what is held. Or the client
        // repeats what it was told of: the word was lost, and what the kernel answers is ahead and held.
        let hole = sack
            .blocks()
            .iter()
            .any(|block| behind || (flow.sack_permitted && !is_held(block)));
        let due = match due {
            Some(due) => due,
            None if hole => Release::again(&sent, flow.shift.into()),
            None => return caught_up,
        };
        let ranges = if flow.sack_permitted {
            first_three(sack)
        } else {
            [None; 3]
        };
        fx.send(&acknowledgement(vip, key, &due, ranges));
        caught_up
    }

    // ---- exposure ------------------------------------------------------------------------------

    /// Nobody confirms: the clients must not wait for it.
    fn degrade(&mut self, now: Nanos, fx: &mut impl GuardEffects) {
        self.set_guarding(false, fx);
        let exposed = self.expose_all(now, fx);
        self.facts.push(Fact::Degraded { exposed });
    }

    /// Opens the gate for all flows; returns how many were guarded until now.
    fn expose_all(&mut self, now: Nanos, fx: &mut impl GuardEffects) -> usize {
        let mut exposed = 0;
        for key in self.flows.keys().copied().collect::<Vec<_>>() {
            match self.flows.get(&key).map(|flow| &flow.phase) {
                Some(Phase::Opening { .. }) => self.open_exposed(key, now, fx),
                Some(Phase::Guarded) => {
                    exposed += 1;
                    self.expose(key, fx);
                }
                Some(Phase::Closing { .. }) => self.expose(key, fx),
                Some(Phase::Exposed) | None => {}
            }
        }
        exposed
    }

    /// Opens the gate for one flow, which has been opened before.
    fn expose(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.expose(fx);
            self.tell_all(key, fx);
        }
    }

    /// Lets out whatever is held of a flow.
    fn let_go(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        match self.flows.get(&key) {
            Some(Flow {
                phase: Phase::Opening { answer, .. },
                ..
            }) => fx.send(answer),
            Some(_) => self.tell_all(key, fx),
            None => {}
        }
    }

    /// Tells the client all that the kernel wanted to say.
    fn tell_all(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        let Some(flow) = self.flows.get(&key) else {
            return;
        };
        if let Some(sent) = fx.sent(flow.slot)
            && let Some(due) = release(&sent, sent.everything(), flow.shift.into())
        {
            fx.send(&acknowledgement(self.config.vip, key, &due, [None; 3]));
        }
    }

    fn forget(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        self.claim(key, fx);
        if let Some(flow) = self.flows.remove(&key) {
            if !matches!(flow.phase, Phase::Opening { .. }) {
                fx.withdraw(key);
            }
            self.free.push_back(flow.slot);
            self.joins.forget(&key);
        }
    }

    fn forget_all(&mut self, fx: &mut impl GuardEffects) {
        for key in self.flows.keys().copied().collect::<Vec<_>>() {
            self.forget(key, fx);
        }
        self.handshakes.clear();
        self.syns.clear();
        self.syn_order.clear();
        self.repeats.clear();
        self.rechecks.clear();
        self.closings.clear();
        self.to_ask.clear();
        self.joins.clear();
    }

    // ---- out -----------------------------------------------------------------------------------

    /// What the standby is to be told since the last call. Returns whether a datagram is due even
    /// without records.
    pub fn take_records(&mut self, records: &mut Vec<Record>) -> bool {
        records.append(&mut self.records);
        std::mem::take(&mut self.ping)
    }

    /// What is to be logged since the last call.
    pub fn take_facts(&mut self) -> Vec<Fact> {
        std::mem::take(&mut self.facts)
    }

    /// Counts the flows. Costs time in proportion to their number.
    pub fn census(&self) -> GuardCensus {
        let mut census = GuardCensus {
            refused: self.refused,
            joining: self.joins.waiting(),
            ..GuardCensus::default()
        };
        for flow in self.flows.values() {
            *match flow.phase {
                Phase::Opening { .. } => &mut census.opening,
                Phase::Guarded => &mut census.guarded,
                Phase::Exposed | Phase::Closing { .. } => &mut census.exposed,
            } += 1;
        }
        census
    }
}

/// As many blocks as a TCP header has room for beside timestamps (RFC 2018 section 3).
fn first_three(sack: &Sack) -> [Option<(u32, u32)>; 3] {
    let blocks = sack.blocks();
    std::array::from_fn(|i| blocks.get(i).copied())
}

/// The window field of a SYN-ACK's headers.
fn window_of(packet: &[u8]) -> u16 {
    segment::parse_headers(packet, Direction::FromVip).map_or(0, |(_, segment)| segment.window)
}

/// A pure ACK from the VIP.
fn acknowledgement(
    vip: Ipv4Addr,
    flow: FlowKey,
    release: &Release,
    sack_ranges: [Option<(u32, u32)>; 3],
) -> Vec<u8> {
    let repr = TcpRepr {
        seq_number: TcpSeqNumber(release.seq as i32),
        ack_number: Some(TcpSeqNumber(release.ack as i32)),
        window_len: release.window,
        timestamp: release
            .timestamp
            .map(|(tsval, tsecr)| TcpTimestampRepr::new(tsval, tsecr)),
        sack_ranges,
        ..bare_repr(flow.service_port, flow.client_port, TcpControl::None)
    };
    let mut bytes = Vec::with_capacity(80);
    let to = Ipv4Addr::from(flow.client_addr);
    let caps = ChecksumCapabilities::default();
    emit_packet(&mut bytes, vip, to, &repr, &caps);
    if release.ece {
        // Behind an IPv4 header without options; smoltcp knows no ECN (RFC 3168 section 6.1.3).
        bytes[20 + 13] |= tcp_flags::ECE;
        segment::complete_checksum(&mut bytes);
    }
    bytes
}
