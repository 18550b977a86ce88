//! All flows of the VIP: who gets a frame, how many there may be, what happens at takeover.
//!
//! Sans-IO: [`Flows::process_frame`], [`Flows::go_live`] and [`Flows::poll`] take what happened and
//! the time, and act through [`Effects`]. The agent and the tests run this same code.
//!
//! ```text
//!  SYN ──► opening ──(SYN-ACK of the active)──► opening, in LIVE_FLOWS
//!                          │
//!                          └─(client's ACK, or takeover)──► shadow ──► closed, reaped
//!                                                             └─(live)──► kernel socket
//!  segment of an unknown flow from the active ──► unprotected ──(its snapshot)──► shadow
//! ```
//!
//! Nothing is built for a connection before its handshake is complete, so a SYN flood costs an
//! entry of fixed size in a bounded table.

mod adoption;
mod handshake;
#[cfg(test)]
mod lab;
mod late;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "simulation"))]
mod view;

use std::cmp::Reverse;
use std::collections::{BTreeSet, VecDeque};
use std::net::Ipv4Addr;

use rfsis_common::frame::tcp_flags;
use rfsis_common::maps::{Direction, FlowKey, HeldEvent};
use smoltcp::socket::tcp::State;

use self::adoption::Moves;
use self::handshake::{Habit, Opening, near};
use self::late::Arrival;
use crate::adopt::{Numbers, Unfinished};
use crate::collections::{HashMap, HashSet};
use crate::handler::HandlerKind;
use crate::heartbeat::Nanos;
use crate::lockstep::{before, later};
use crate::metrics::{FlowCondition, FrameResult, ResetReason};
use crate::segment::{self, Segment};
use crate::shadow::{Context, Handshake, Outgoing, Shadow, learn_isn, probe_packet, reset_packet};
use crate::sync::Record;
use crate::wire::Wire;

pub(crate) const SECOND: Nanos = 1_000_000_000;

/// Handshakes under way at the most; at the bound the oldest is forgotten.
pub const MAX_OPENINGS: usize = 16_384;

/// A handshake that is not completed by then was given up by the client (RFC 6298, `tcp_syn_retries`).
const OPENING_TIMEOUT: Nanos = 130 * SECOND;

/// How long the last segments of a flow that was closed by both sides may be under way. Handed to the
/// kernel, which knows nothing of the flow, each would be answered by a reset.
const LINGER: Nanos = 2 * SECOND;

/// A reset is sent at takeover and again after these times, ns: no client answers it, so nobody knows
/// whether it was lost, and a client that only waits would wait for good.
const RESET_AGAIN: [Nanos; 2] = [200_000_000, SECOND];

/// Next hops of clients are refreshed so often.
const WARM: Nanos = 20 * SECOND;

/// How long a closed flow answers late segments (RFC 9293 section 3.10.8, Linux's 60 s).
const TIME_WAIT: Nanos = 60 * SECOND;

/// A live flow whose client acknowledges nothing for so long is gone (Linux `tcp_retries2`, 15 min).
const SILENT_CLIENT: Nanos = 924 * SECOND;

/// A live flow whose client does not complete the handshake is given up after this, ns, as by the kernel (five
/// repetitions, `tcp_synack_retries` of tcp(7)).
const HALF_OPEN: Nanos = 63 * SECOND;

/// A flow is not looked at more often than this without a frame, ns.
const MIN_TIMER: Nanos = 1_000_000;

/// Handlers see at most so much input at once, bytes.
const SCRATCH: usize = 16 * 1024;

/// Bounds and surroundings of the flows.
#[derive(Clone, Debug)]
pub struct FlowsConfig {
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// TCP services by port.
    pub services: std::collections::HashMap<u16, HandlerKind>,
    /// Shadows at the most.
    pub max_flows: usize,
    /// Bytes that all shadows may hold together.
    pub max_bytes: usize,
    /// A flow without a frame for so long is forgotten, ns.
    pub idle_timeout: Nanos,
    /// MTU of the interface, bytes.
    pub mtu: usize,
    /// The active guards flows by its ACK gate: one that it does not guard is not protected.
    pub guarded: bool,
    /// Frames are copies that the active makes: it copies no acknowledgement of what it did not send.
    pub copied: bool,
}

/// What the flows do to the world.
pub trait Effects {
    /// A connected kernel socket.
    type Socket;
    /// Whether the services have begun with what they were given.
    fn may_adopt(&self) -> bool;
    /// Makes a kernel socket that goes on with these numbers; `None` if the kernel refuses. Sends nothing.
    fn restore(&mut self, numbers: &Numbers) -> Option<Self::Socket>;
    /// Gives a restored socket to its service. The flow was released before.
    fn adopt(&mut self, flow: FlowKey, socket: Self::Socket, unfinished: Unfinished);
    /// Sends a whole IPv4 packet from the VIP.
    fn send(&mut self, packet: &[u8]);
    /// Lets FIN and RST of this flow pass the gate. Always before such a packet is sent.
    fn approve(&mut self, flow: FlowKey);
    /// Puts a flow into `LIVE_FLOWS`; false if there is no room.
    fn protect(&mut self, flow: FlowKey) -> bool;
    /// Takes a flow out of `LIVE_FLOWS`.
    fn release(&mut self, flow: FlowKey);
    /// Keeps the way to this client resolved.
    fn warm(&mut self, client: Ipv4Addr);
}

#[derive(Debug)]
enum Flow {
    Shadow(Box<Shadow>),
    /// Older than this standby, or beyond a bound. Known so that it can be reset at takeover.
    Unprotected {
        client_ack: Option<u32>,
        /// Behind what the client has sent.
        client_next: Option<u32>,
        /// Behind what the active has sent, as far as is known: it may still be on its way.
        sent: Option<u32>,
        last_activity: Nanos,
        /// Which sides have closed: it is known for a moment more, for their last segments.
        closed: Closed,
        /// The active guards it, by this number of the client's, for a shadow that found no room: its client waits
        /// until the active has heard of that.
        refused: Option<u32>,
    },
}

/// Which sides of a flow have sent their FIN.
#[derive(Clone, Copy, Debug, Default)]
struct Closed {
    client: bool,
    active: bool,
}

impl Closed {
    fn both(self) -> bool {
        self.client && self.active
    }
}

/// Flows by condition, and what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Handshakes that the active has answered and the client has not completed.
    pub handshake: usize,
    /// In lockstep.
    pub lockstep: usize,
    /// Lost a copy.
    pub lagging: usize,
    /// Other bytes than the active's.
    pub diverged: usize,
    /// Without a shadow.
    pub unprotected: usize,
    /// Speaking for the VIP.
    pub live: usize,
    /// Bytes that active nodes acknowledged and shadows do not hold.
    pub lag_bytes: u64,
    /// Bytes that shadows hold.
    pub bytes: usize,
}

/// What a takeover did to the flows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakeoverReport {
    /// Flows that go on.
    pub live: usize,
    /// Of these, flows that had something to say at once.
    pub spoke: usize,
    /// Flows that were reset, by reason.
    pub resets: Vec<(ResetReason, usize)>,
    /// SYNs that the active has not answered, for the kernel to: the client would repeat each after a second. If
    /// one was answered, unseen here, its connection is lost either way.
    pub unanswered: Vec<Vec<u8>>,
}

/// All flows of the VIP.
#[derive(Debug)]
pub struct Flows {
    config: FlowsConfig,
    shadow_isn: u32,
    wire: Wire,
    scratch: Vec<u8>,
    out: Vec<Outgoing>,
    flows: HashMap<FlowKey, Flow>,
    openings: HashMap<FlowKey, Opening>,
    /// Flows whose snapshots are under way, the memory that takes, and of which it came more.
    arrivals: HashMap<FlowKey, Arrival>,
    arrival_bytes: usize,
    got: Vec<FlowKey>,
    opening_order: VecDeque<(FlowKey, u32)>,
    /// How the services' kernel sockets answer, for when a SYN-ACK's copy is lost.
    habits: HashMap<u16, Habit>,
    timers: BTreeSet<(Nanos, FlowKey)>,
    timer_of: HashMap<FlowKey, Nanos>,
    bytes: usize,
    live: bool,
    refused: u64,
    next_sweep: Nanos,
    next_warm: Nanos,
    /// Resets to be repeated, earliest first.
    resets: VecDeque<(Nanos, Vec<u8>)>,
    moves: Moves,
    /// Live flows that turned out to lack bytes, and were reset.
    gave_up: u64,
    /// Flows to be confirmed, and what else the active's ACK gate is to hear.
    touched: Vec<FlowKey>,
    tells: Vec<Record>,
    /// The latest time that was passed in: arrivals of several CPUs are not quite in order.
    clock: Nanos,
}

/// smoltcp does not answer a handshake: a version that this code does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shadow stack does not answer a SYN; this build and its smoltcp do not fit")]
pub struct NoShadow;

impl Flows {
    /// No flows yet, standby.
    pub fn new(config: FlowsConfig) -> Result<Self, NoShadow> {
        let mut wire = Wire::new(config.mtu);
        let shadow_isn = learn_isn(&mut wire).ok_or(NoShadow)?;
        Ok(Self {
            shadow_isn,
            wire,
            scratch: vec![0; SCRATCH],
            out: Vec::new(),
            flows: HashMap::default(),
            openings: HashMap::default(),
            arrivals: HashMap::default(),
            arrival_bytes: 0,
            got: Vec::new(),
            opening_order: VecDeque::new(),
            habits: HashMap::default(),
            timers: BTreeSet::new(),
            timer_of: HashMap::default(),
            bytes: 0,
            live: false,
            refused: 0,
            next_sweep: 0,
            next_warm: 0,
            resets: VecDeque::new(),
            moves: Moves::default(),
            gave_up: 0,
            touched: Vec::new(),
            tells: Vec::new(),
            clock: 0,
            config,
        })
    }

    /// The virtual IP.
    pub fn vip(&self) -> Ipv4Addr {
        self.config.vip
    }

    /// Live flows that turned out to lack bytes and were reset, since the start.
    pub fn gave_up(&self) -> u64 {
        self.gave_up
    }

    fn advance(&mut self, now: Nanos) -> Nanos {
        self.clock = self.clock.max(now);
        self.clock
    }

    /// New flows that were left unprotected at a bound, since the start.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Takes a mirrored IPv4 packet. `now` is its arrival.
    pub fn process_frame(
        &mut self,
        packet: &[u8],
        direction: Direction,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> FrameResult {
        let now = self.advance(now);
        let (flow, segment) = match segment::parse(packet, direction) {
            Ok(parsed) => parsed,
            Err(error) => return error.into(),
        };
        if !self.config.services.contains_key(&flow.service_port) {
            return FrameResult::Outside;
        }
        if !self.arrivals.is_empty() {
            self.keep_frame(flow, packet, &segment, direction, now);
        }
        let known = match direction {
            Direction::ToVip => self.process_client(flow, &segment, now, fx),
            Direction::FromVip if self.live => false,
            Direction::FromVip => self.process_active(flow, &segment, now, fx),
        };
        match (known, direction) {
            (false, _) => FrameResult::UnknownFlow,
            (true, Direction::ToVip) => FrameResult::Ok,
            (true, Direction::FromVip) => FrameResult::FromActive,
        }
    }

    fn process_client(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> bool {
        if segment.syn && segment.ack.is_none() && !segment.rst {
            return self.process_syn(flow, segment, now, fx);
        }
        if let Some(opening) = self.openings.get(&flow) {
            let first = opening.client_isn.wrapping_add(1);
            if segment.rst && segment.seq == first {
                self.forget_opening(flow, fx);
                return true;
            }
            if !segment.rst
                && let Some(ack) = segment.ack
                && near(first, segment.seq)
            {
                self.complete(flow, segment, ack, now, fx);
            }
        }
        match self.flows.get_mut(&flow) {
            Some(Flow::Unprotected {
                client_ack,
                client_next,
                last_activity,
                closed,
                refused,
                ..
            }) => {
                if let Some(client_isn) = *refused
                    && !self.live
                {
                    self.tells.push(Record::Refuse { flow, client_isn });
                }
                // An older ACK that comes late would make for an RST that the client ignores.
                *client_ack = match (*client_ack, segment.ack) {
                    (Some(known), Some(ack)) => Some(later(known, ack)),
                    (known, ack) => known.or(ack),
                };
                *client_next = Some(client_next.map_or(segment.end(), |n| later(n, segment.end())));
                *last_activity = now;
                closed.client |= segment.fin;
                if segment.rst {
                    self.flows.remove(&flow);
                }
                true
            }
            Some(Flow::Shadow(_)) => {
                self.with_shadow(flow, now, fx, |shadow, cx| {
                    shadow.process_client(segment, cx);
                });
                self.note_touched(flow);
                true
            }
            None => false,
        }
    }

    fn process_active(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> bool {
        if segment.syn {
            return self.process_syn_ack(flow, segment, now, fx);
        }
        // The active sends data: the client's ACK reached it, if not its copy this standby.
        if !segment.rst
            && let Some(&opening) = self.openings.get(&flow)
            && let Some((active_isn, _)) = opening.answer
            && near(active_isn.wrapping_add(1), segment.seq)
            && segment
                .ack
                .is_some_and(|ack| near(opening.client_isn.wrapping_add(1), ack))
        {
            // Completes it.
            self.process_client(flow, &opening.acknowledgement(active_isn), now, fx);
        }
        match self.flows.get_mut(&flow) {
            Some(Flow::Shadow(_)) => {
                self.with_shadow(flow, now, fx, |shadow, cx| {
                    shadow.process_active(segment, cx);
                });
                true
            }
            Some(Flow::Unprotected {
                sent,
                client_next,
                last_activity,
                closed,
                ..
            }) => {
                *sent = Some(sent.map_or(segment.end(), |sent| later(sent, segment.end())));
                *client_next = client_next.or(segment.ack);
                *last_activity = now;
                closed.active |= segment.fin;
                if segment.rst {
                    self.flows.remove(&flow);
                }
                true
            }
            // Only what the active confirms is worth an entry: a client alone could invent flows.
            None if segment.rst || segment.fin => false,
            None => {
                self.leave_unprotected(flow, None, now);
                if let Some(Flow::Unprotected {
                    sent, client_next, ..
                }) = self.flows.get_mut(&flow)
                {
                    (*sent, *client_next) = (Some(segment.end()), segment.ack);
                }
                true
            }
        }
    }

    fn insert_shadow(&mut self, flow: FlowKey, handshake: Handshake, now: Nanos) {
        let Some(&kind) = self.config.services.get(&flow.service_port) else {
            return;
        };
        let mut cx = Context {
            wire: &mut self.wire,
            scratch: &mut self.scratch,
            now,
            room: 0,
            out: &mut self.out,
            acks_are_true: self.config.copied,
        };
        let shadow = Shadow::new(
            flow,
            self.config.vip,
            handshake,
            kind,
            self.shadow_isn,
            &mut cx,
        );
        self.flows.insert(flow, Flow::Shadow(Box::new(shadow)));
    }

    fn leave_unprotected(&mut self, flow: FlowKey, client_ack: Option<u32>, now: Nanos) {
        if self.flows.len() < self.config.max_flows.saturating_mul(2) {
            self.flows.insert(
                flow,
                Flow::Unprotected {
                    client_ack,
                    client_next: None,
                    sent: None,
                    last_activity: now,
                    closed: Closed::default(),
                    refused: None,
                },
            );
        }
    }

    /// Runs `f` on a flow's shadow, then sends what a live one has to say, and removes it if it is
    /// closed.
    fn with_shadow(
        &mut self,
        flow: FlowKey,
        now: Nanos,
        fx: &mut impl Effects,
        f: impl FnOnce(&mut Shadow, &mut Context<'_>),
    ) {
        let Some(Flow::Shadow(shadow)) = self.flows.get_mut(&flow) else {
            return;
        };
        if shadow.is_closed() {
            // It lingers: the client's last segments are nobody's any more.
            return;
        }
        let before = shadow.bytes();
        let mut cx = Context {
            wire: &mut self.wire,
            scratch: &mut self.scratch,
            now,
            room: self.config.max_bytes.saturating_sub(self.bytes),
            out: &mut self.out,
            acks_are_true: self.config.copied,
        };
        f(shadow, &mut cx);
        if self.live {
            shadow.dispatch(&mut cx);
        }
        self.bytes = self.bytes + shadow.bytes() - before;
        self.gave_up += u64::from(shadow.has_given_up());
        let closed = shadow.is_closed();
        let reset = shadow.was_reset();
        let rested = shadow.has_rested();
        let wakeup = (self.live && !closed)
            .then(|| shadow.next_wakeup(now))
            .flatten()
            .map(|at| at.max(now + MIN_TIMER));
        for outgoing in self.out.drain(..) {
            if outgoing.closes {
                fx.approve(flow);
            }
            fx.send(&outgoing.packet);
        }
        if rested {
            self.moves.hurry(flow);
        }
        if self.live {
            self.set_timer(flow, wakeup);
        }
        if reset {
            self.remove(flow, fx);
        }
    }

    fn set_timer(&mut self, flow: FlowKey, at: Option<Nanos>) {
        let known = match at {
            Some(at) => self.timer_of.insert(flow, at),
            None => self.timer_of.remove(&flow),
        };
        if known != at {
            if let Some(known) = known {
                self.timers.remove(&(known, flow));
            }
            if let Some(at) = at {
                self.timers.insert((at, flow));
            }
        }
    }

    fn drop_bytes_of(&mut self, flow: FlowKey) {
        if let Some(Flow::Shadow(shadow)) = self.flows.get(&flow) {
            self.bytes -= shadow.bytes();
        }
    }

    fn remove(&mut self, flow: FlowKey, fx: &mut impl Effects) {
        if let Some(Flow::Shadow(shadow)) = self.flows.get(&flow)
            && shadow.handshake().guarded
            && !self.live
        {
            let client_isn = shadow.handshake().client_isn;
            self.tells.push(Record::Close { flow, client_isn });
        }
        self.drop_bytes_of(flow);
        self.flows.remove(&flow);
        self.set_timer(flow, None);
        self.moves.remove(flow);
        fx.release(flow);
    }

    /// A frame of this flow found the ring full at `at` (ns).
    pub fn mark_lost(&mut self, flow: FlowKey, at: Nanos) {
        if let Some(Flow::Shadow(shadow)) = self.flows.get_mut(&flow) {
            shadow.mark_lost(at);
        }
    }

    /// The active may have opened its gate without this node's hearing of it.
    pub fn expose(&mut self) {
        for entry in self.flows.values_mut() {
            if let Flow::Shadow(shadow) = entry {
                shadow.expose();
            }
        }
    }

    /// Whether they speak for the VIP.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// The node has taken over: every shadow that can goes live, the others' clients are told.
    /// Call after every frame that was mirrored before has been processed.
    pub fn go_live(&mut self, now: Nanos, fx: &mut impl Effects) -> TakeoverReport {
        let now = self.advance(now);
        self.live = true;
        self.drop_arrivals();
        let mut report = TakeoverReport {
            unanswered: self.adopt_openings(now, fx),
            ..TakeoverReport::default()
        };
        let mut resets: HashMap<ResetReason, usize> = HashMap::default();
        let mut doomed = Vec::new();
        let mut speakers = Vec::new();
        for (&flow, entry) in &mut self.flows {
            match entry {
                Flow::Unprotected { closed, .. } if closed.both() => {}
                Flow::Unprotected {
                    client_ack,
                    client_next,
                    sent,
                    ..
                } => {
                    // Either number may be the exact one. If none is, the client answers the last packet,
                    // and the kernel knows from the answer how to reset it.
                    let vip = self.config.vip;
                    let beyond =
                        sent.filter(|sent| client_ack.is_none_or(|ack| before(ack, *sent)));
                    let numbers = client_ack.iter().copied().chain(beyond);
                    let resets = numbers.map(|seq| reset_packet(flow, vip, seq, None));
                    let known = client_ack.or(*sent).zip(*client_next);
                    let probe = known.map(|(seq, ack)| probe_packet(flow, vip, seq, ack));
                    let packets = resets.chain(probe).collect();
                    doomed.push((
                        flow,
                        ResetReason::Unprotected,
                        packets,
                        client_next.is_some(),
                    ));
                }
                Flow::Shadow(shadow) if shadow.is_closed() => {}
                Flow::Shadow(shadow) if is_exposed(&self.config, shadow) => {
                    let packets = shadow.last_words();
                    doomed.push((flow, ResetReason::Unprotected, packets, true));
                }
                Flow::Shadow(shadow) => match shadow.fate() {
                    Err(reason) => doomed.push((flow, reason, shadow.last_words(), true)),
                    Ok(()) => {
                        report.live += 1;
                        let before = shadow.bytes();
                        self.moves.add(flow, now);
                        if shadow.go_live(now) {
                            let half_open = shadow.state() == State::SynReceived;
                            speakers.push((half_open, Reverse(shadow.last_activity()), flow));
                        }
                        self.bytes -= before - shadow.bytes();
                    }
                },
            }
        }
        // Most recently active first; but of half-open ones a SYN flood makes as many as it likes.
        speakers.sort_unstable();
        report.spoke = speakers.len();
        for (.., flow) in speakers {
            self.with_shadow(flow, now, fx, Shadow::resume);
        }
        let mut told = Vec::new();
        for (flow, reason, packets, heard) in doomed {
            *resets.entry(reason).or_default() += 1;
            // The kernel answers whatever the client sends next: let that pass as well.
            fx.approve(flow);
            for packet in packets {
                fx.send(&packet);
                // Whoever was never heard may still be opening its connection, and then the kernel has it.
                if heard {
                    told.push(packet);
                }
            }
            self.remove(flow, fx);
        }
        for pause in RESET_AGAIN {
            let again = told.iter().map(|packet| (now + pause, packet.clone()));
            self.resets.extend(again);
        }
        report.resets = resets.into_iter().collect();
        report
    }

    /// The node is standby again: what lived here belongs to an epoch that is over.
    pub fn go_standby(&mut self, fx: &mut impl Effects) {
        self.live = false;
        self.drop_arrivals();
        self.timers.clear();
        self.timer_of.clear();
        self.opening_order.clear();
        self.resets.clear();
        self.moves.clear();
        self.touched.clear();
        self.tells.clear();
        self.bytes = 0;
        let openings = std::mem::take(&mut self.openings);
        let flows = std::mem::take(&mut self.flows);
        for flow in openings.into_keys().chain(flows.into_keys()) {
            fx.release(flow);
        }
    }

    /// The gate held back a FIN or RST of the kernel's. The agent is alive, so it is no crash that
    /// speaks: unless the flow lives on a shadow here, let it go.
    ///
    /// Returns whether it was let go.
    pub fn process_held(&mut self, held: &HeldEvent, fx: &mut impl Effects) -> bool {
        let flow = held.flow;
        if !self.live || self.flows.contains_key(&flow) {
            return false;
        }
        fx.approve(flow);
        let flags = held.flags as u8;
        if flags & tcp_flags::RST != 0 {
            // The kernel repeats a FIN, never an RST.
            let ack = (flags & tcp_flags::ACK != 0).then_some(held.ack);
            fx.send(&reset_packet(flow, self.config.vip, held.seq, ack));
        }
        true
    }

    /// When [`Flows::poll`] and [`Flows::adopt_some`] are due, ns.
    pub fn next_wakeup(&self) -> Nanos {
        let timer = self.timers.first().map_or(Nanos::MAX, |(at, _)| *at);
        let reset = self.resets.front().map_or(Nanos::MAX, |(at, _)| *at);
        let moves = self.moves.next_wakeup();
        timer.min(reset).min(self.next_sweep).min(moves)
    }

    /// Time has passed: timers of live flows, and once a second what has ended is reaped.
    pub fn poll(&mut self, now: Nanos, fx: &mut impl Effects) {
        let now = self.advance(now);
        // A timer that is due again at once waits for the next call, so this ends.
        let mut due = Vec::new();
        while let Some(&(at, flow)) = self.timers.first()
            && at <= now
        {
            self.timers.remove(&(at, flow));
            self.timer_of.remove(&flow);
            due.push(flow);
        }
        for flow in due {
            self.with_shadow(flow, now, fx, |_, _| {});
        }
        while let Some((_, packet)) = self.resets.pop_front_if(|(at, _)| *at <= now) {
            fx.send(&packet);
        }
        if now >= self.next_sweep {
            self.next_sweep = now + SECOND;
            self.sweep(now, fx);
            self.sweep_arrivals(now);
        }
    }

    fn sweep(&mut self, now: Nanos, fx: &mut impl Effects) {
        let idle = self.config.idle_timeout;
        let live = self.live;
        let mut ended = Vec::new();
        for (&flow, entry) in &mut self.flows {
            let quiet = match entry {
                Flow::Unprotected {
                    last_activity,
                    closed,
                    ..
                } => {
                    // Of a flow on a shadow of the active's only the active's half is copied.
                    let patience = if closed.active { LINGER } else { idle };
                    now.saturating_sub(*last_activity) > patience
                }
                Flow::Shadow(shadow) => {
                    shadow.relax();
                    let quiet = now.saturating_sub(shadow.last_activity());
                    (shadow.is_closed() && quiet > LINGER)
                        || quiet > idle
                        || (shadow.state() == State::TimeWait && quiet > TIME_WAIT)
                        || (live && shadow.bytes() > 0 && quiet > SILENT_CLIENT)
                        || (live && shadow.state() == State::SynReceived && quiet > HALF_OPEN)
                }
            };
            if quiet {
                ended.push(flow);
            }
        }
        for flow in ended {
            if live && let Some(Flow::Shadow(shadow)) = self.flows.get(&flow) {
                // The standby may know of it by what it has said.
                let client_isn = shadow.handshake().client_isn;
                self.tells.push(Record::Close { flow, client_isn });
            }
            self.remove(flow, fx);
        }
        if !live && now >= self.next_warm {
            self.next_warm = now + WARM;
            let clients: HashSet<u32> = self.flows.keys().map(|flow| flow.client_addr).collect();
            for client in clients {
                fx.warm(Ipv4Addr::from(client));
            }
        }
        while let Some(&(flow, isn)) = self.opening_order.front() {
            match self.openings.get(&flow) {
                Some(o) if o.client_isn == isn && now.saturating_sub(o.since) < OPENING_TIMEOUT => {
                    break;
                }
                Some(o) if o.client_isn == isn => self.forget_opening(flow, fx),
                _ => {}
            }
            self.opening_order.pop_front();
        }
    }

    /// Counts the flows. Costs time in proportion to their number.
    pub fn census(&self) -> Census {
        let mut census = Census {
            handshake: self
                .openings
                .values()
                .filter(|opening| opening.answer.is_some())
                .count(),
            bytes: self.bytes,
            ..Census::default()
        };
        for entry in self.flows.values() {
            match entry {
                Flow::Unprotected { closed, .. } if closed.both() => {}
                Flow::Unprotected { .. } => census.unprotected += 1,
                // Nothing of it can be lost any more.
                Flow::Shadow(shadow) if shadow.has_ended() => {}
                Flow::Shadow(shadow) if !self.live && is_exposed(&self.config, shadow) => {
                    census.unprotected += 1;
                }
                Flow::Shadow(shadow) => {
                    census.lag_bytes += u64::from(shadow.lag());
                    *match shadow.condition() {
                        FlowCondition::Handshake => &mut census.handshake,
                        FlowCondition::Lockstep => &mut census.lockstep,
                        FlowCondition::Lagging => &mut census.lagging,
                        FlowCondition::Diverged => &mut census.diverged,
                        FlowCondition::Unprotected => &mut census.unprotected,
                        FlowCondition::Live => &mut census.live,
                    } += 1;
                }
            }
        }
        census
    }
}

/// The active does not guard this flow, so it may have told the client of bytes that the shadow lacks.
fn is_exposed(config: &FlowsConfig, shadow: &Shadow) -> bool {
    config.guarded && !shadow.handshake().guarded
}
