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
mod pledging;
mod sweep;
mod takeover;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "simulation"))]
mod view;

use std::collections::{BTreeSet, VecDeque};
use std::net::Ipv4Addr;

use rfsis_common::maps::{Direction, FlowKey};

use self::adoption::Moves;
use self::handshake::{Habit, Opening, near};
use self::late::Arrival;
use crate::adopt::{Numbers, Unfinished};
use crate::collections::HashMap;
use crate::handler::HandlerKind;
use crate::heartbeat::Nanos;
use crate::lockstep::later;
use crate::metrics::{FlowCondition, FrameResult, ResetReason};
use crate::segment::{self, Segment};
use crate::shadow::{Context, Handshake, Outgoing, Shadow, learn_isn};
use crate::sync::Record;
use crate::wire::Wire;

pub(crate) const SECOND: Nanos = 1_000_000_000;

/// Handshakes under way at the most; at the bound the oldest is forgotten.
pub const MAX_OPENINGS: usize = 16_384;

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
    /// Takes a flow out of `LIVE_FLOWS`, at the latest before its service, or the kernel, is given anything.
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
        match segment::parse(packet, direction) {
            Ok((flow, segment)) => self.process(packet, direction, flow, &segment, now, fx),
            Err(error) => error.into(),
        }
    }

    /// The same of a SYN-ACK that the active's gate has held until this node's program has answered it.
    pub fn process_answered(
        &mut self,
        packet: &[u8],
        now: Nanos,
        fx: &mut impl Effects,
    ) -> FrameResult {
        let result = match segment::parse(packet, Direction::FromVip) {
            Ok((flow, segment)) => {
                let segment = Segment {
                    answered: true,
                    ..segment
                };
                self.process(packet, Direction::FromVip, flow, &segment, now, fx)
            }
            Err(error) => error.into(),
        };
        self.disclaim(packet);
        result
    }

    /// Says of a SYN-ACK which the program has answered that the connection is not followed, if it is not: the
    /// active's gate takes it for guarded.
    pub fn disclaim(&mut self, packet: &[u8]) {
        let Ok((flow, segment)) = segment::parse_headers(packet, Direction::FromVip) else {
            return;
        };
        let client_isn = segment.ack.unwrap_or(0).wrapping_sub(1);
        if !self.live && !self.guards(flow, client_isn, segment.seq) {
            self.tells.push(Record::Refuse { flow, client_isn });
        }
    }

    fn process(
        &mut self,
        packet: &[u8],
        direction: Direction,
        flow: FlowKey,
        segment: &Segment<'_>,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> FrameResult {
        let now = self.advance(now);
        if !self.config.services.contains_key(&flow.service_port) {
            return FrameResult::Outside;
        }
        if !self.arrivals.is_empty() {
            self.keep_frame(flow, packet, segment, direction, now);
        }
        let known = match direction {
            Direction::ToVip => self.process_client(flow, segment, now, fx),
            Direction::FromVip if self.live => false,
            Direction::FromVip => self.process_active(flow, segment, now, fx),
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

    /// Whether they speak for the VIP.
    pub fn is_live(&self) -> bool {
        self.live
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
