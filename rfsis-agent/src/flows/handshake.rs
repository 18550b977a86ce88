//! Handshakes: from the SYN to the shadow.

use std::net::Ipv4Addr;

use rfsis_common::maps::FlowKey;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber, TcpTimestampRepr};

use super::{Effects, Flow, Flows, MAX_OPENINGS, SECOND};
use crate::fault::faulty;
use crate::heartbeat::Nanos;
use crate::lockstep::distance;
use crate::segment::{Options, Segment};
use crate::shadow::{FAR, Handshake};
use crate::sync::{Open, Record};
use crate::wire::{bare_repr, emit_packet};

/// A client repeats its SYN by itself after this, ns (RFC 6298 section 2.1).
const SYN_REPEATED: Nanos = SECOND;

/// A handshake under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub(super) client_isn: u32,
    pub(super) client_window: u16,
    pub(super) client: Options,
    /// Initial sequence number and options of the active.
    pub(super) answer: Option<(u32, Options)>,
    /// When that was first seen.
    pub(super) answered_at: Nanos,
    /// What the client acknowledged before the answer was seen.
    pub(super) acked: Option<u32>,
    pub(super) since: Nanos,
    /// The active holds its answer until this node has confirmed the flow.
    pub(super) guarded: bool,
}

impl Opening {
    /// What both sides have said with this SYN-ACK.
    fn open(&self, flow: FlowKey, answer: &Segment<'_>) -> Open {
        Open {
            flow,
            client_isn: self.client_isn,
            active_isn: answer.seq,
            client_window: self.client_window,
            client: self.client,
            active: answer.options,
        }
    }

    /// The SYN, as the client said it.
    fn syn(&self, flow: FlowKey, vip: Ipv4Addr) -> Vec<u8> {
        let repr = TcpRepr {
            seq_number: TcpSeqNumber(self.client_isn as i32),
            window_len: self.client_window,
            window_scale: self.client.window_scale,
            max_seg_size: self.client.mss,
            sack_permitted: self.client.sack_permitted,
            timestamp: self
                .client
                .timestamp
                .map(|(tsval, tsecr)| TcpTimestampRepr::new(tsval, tsecr)),
            ..bare_repr(flow.client_port, flow.service_port, TcpControl::Syn)
        };
        let mut packet = Vec::with_capacity(60);
        let caps = ChecksumCapabilities::default();
        emit_packet(&mut packet, flow.client_addr.into(), vip, &repr, &caps);
        packet
    }

    /// What the client says when it has got the SYN-ACK with this number.
    pub(super) fn acknowledgement(&self, active_isn: u32) -> Segment<'static> {
        Segment {
            seq: self.client_isn.wrapping_add(1),
            ack: Some(active_isn.wrapping_add(1)),
            window: self.client_window >> self.client.window_scale.unwrap_or(0),
            ..Segment::default()
        }
    }
}

impl Flows {
    pub(super) fn process_syn(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> bool {
        if self.live {
            // Only flows that live on a shadow are mirrored now. A new connection on the ports of
            // one that has ended belongs to the kernel; the client's next try finds the way free.
            let ended = match self.flows.get(&flow) {
                Some(Flow::Shadow(shadow)) => shadow.has_ended(),
                Some(Flow::Unprotected { .. }) => true,
                None => return false,
            };
            if ended {
                self.remove(flow, fx);
            } else {
                self.with_shadow(flow, now, fx, |shadow, cx| {
                    shadow.process_client(segment, cx);
                });
            }
            return true;
        }
        // A handshake that the active has answered ends by the client's RST or in time, not by a SYN
        // that anybody can forge.
        if let Some(opening) = self.openings.get(&flow)
            && (opening.client_isn == segment.seq || opening.answer.is_some())
        {
            return true;
        }
        if let Some(Flow::Shadow(shadow)) = self.flows.get(&flow)
            && shadow.handshake().client_isn == segment.seq
        {
            return true;
        }
        while self.openings.len() >= MAX_OPENINGS {
            let Some((oldest, isn)) = self.opening_order.pop_front() else {
                break;
            };
            if self
                .openings
                .get(&oldest)
                .is_some_and(|o| o.client_isn == isn)
            {
                self.forget_opening(oldest, fx);
            }
        }
        self.opening_order.push_back((flow, segment.seq));
        self.openings.insert(
            flow,
            Opening {
                client_isn: segment.seq,
                client_window: segment.window,
                client: segment.options,
                answer: None,
                answered_at: now,
                acked: None,
                since: now,
                guarded: false,
            },
        );
        true
    }

    /// Whether a connection is known as one that the active's gate guards.
    pub(super) fn guards(&self, flow: FlowKey, client_isn: u32, active_isn: u32) -> bool {
        if let Some(opening) = self.openings.get(&flow) {
            let answer = opening.answer.map(|(isn, _)| isn);
            return opening.guarded
                && (opening.client_isn, answer) == (client_isn, Some(active_isn));
        }
        match self.flows.get(&flow) {
            Some(Flow::Shadow(shadow)) => {
                let handshake = shadow.handshake();
                handshake.guarded
                    && (handshake.client_isn, handshake.active_isn) == (client_isn, active_isn)
            }
            _ => false,
        }
    }

    /// Whether more flows can be followed, also those that open before this is asked again.
    pub fn has_room(&self) -> bool {
        const SPARE: usize = 8;
        const SPARE_LEAST: usize = 64;
        let flows = self.flows.len() + self.openings.len();
        let spare_flows = (self.config.max_flows / SPARE).max(SPARE_LEAST);
        !self.live
            && flows + spare_flows < self.config.max_flows
            && self.openings.len() < MAX_OPENINGS - MAX_OPENINGS / SPARE
            && self.bytes < self.config.max_bytes - self.config.max_bytes / SPARE
    }

    /// The active is about to answer a client, and waits until this node knows what both agreed on.
    ///
    /// Returns whether the flow is known now; at a bound it is not.
    pub fn process_open(&mut self, open: &Open, now: Nanos, fx: &mut impl Effects) -> bool {
        let known = self.follow(open, now, fx);
        if let Some(known) = known {
            self.tells.push(Record::Known(known));
        }
        known.is_some()
    }

    /// Follows a connection from its handshake on. Gives what is known of that; nothing at a bound.
    fn follow(&mut self, open: &Open, now: Nanos, fx: &mut impl Effects) -> Option<Open> {
        let now = self.advance(now);
        let flow = open.flow;
        if self.live || !self.config.services.contains_key(&flow.service_port) {
            return None;
        }
        match self.flows.get_mut(&flow) {
            Some(Flow::Shadow(shadow))
                if shadow.handshake().client_isn == open.client_isn
                    && shadow.handshake().active_isn == open.active_isn =>
            {
                shadow.guard();
                let known = shadow.handshake().open(flow);
                self.note_touched(flow);
                return Some(known);
            }
            _ => {}
        }
        if !self.openings.contains_key(&flow)
            && (self.flows.len() + self.openings.len() >= self.config.max_flows
                || self.bytes >= self.config.max_bytes)
        {
            self.refused += 1;
            return None;
        }
        if !fx.protect(flow) {
            self.refused += 1;
            return None;
        }
        fx.warm(Ipv4Addr::from(flow.client_addr));
        let known = self.openings.get(&flow);
        let since = known.map_or(now, |opening| opening.since);
        let acked = known
            .filter(|opening| opening.client_isn == open.client_isn)
            .and_then(|opening| opening.acked);
        // It is repeated until it is confirmed.
        let answered_at = known
            .filter(|opening| {
                opening
                    .answer
                    .is_some_and(|(isn, _)| isn == open.active_isn)
            })
            .map_or(now, |opening| opening.answered_at);
        if known.is_none_or(|opening| opening.client_isn != open.client_isn) {
            self.opening_order.push_back((flow, open.client_isn));
        }
        let opening = Opening {
            client_isn: open.client_isn,
            client_window: open.client_window,
            client: open.client,
            answer: Some((open.active_isn, open.active)),
            answered_at,
            acked,
            since,
            guarded: true,
        };
        self.openings.insert(flow, opening);
        // Whatever is there belongs to an earlier connection of the same ports.
        self.drop_arrival(&flow);
        self.drop_bytes_of(flow);
        self.flows.remove(&flow);
        if acked == Some(open.active_isn.wrapping_add(1)) {
            self.process_client(flow, &opening.acknowledgement(open.active_isn), now, fx);
        }
        Some(*open)
    }

    /// The active has told the client that everything before `ack` arrived, whether this node holds it
    /// or not. Answered by a confirmation; returns whether the flow is known.
    pub fn process_told(&mut self, flow: FlowKey, client_isn: u32, ack: u32) -> bool {
        match self.flows.get_mut(&flow) {
            Some(Flow::Shadow(shadow))
                if shadow.handshake().client_isn == client_isn && !shadow.handshake().inferred =>
            {
                // It may have been opened while nobody guarded it.
                shadow.guard();
                shadow.note_told(ack);
                self.note_touched(flow);
                true
            }
            _ => false,
        }
    }

    /// The flow has ended on the active.
    pub fn process_close(&mut self, flow: FlowKey, client_isn: u32, fx: &mut impl Effects) {
        if let Some(opening) = self.openings.get(&flow)
            && opening.client_isn == client_isn
        {
            self.forget_opening(flow, fx);
        }
        let ended = match self.flows.get(&flow) {
            Some(Flow::Shadow(shadow)) => shadow.handshake().client_isn == client_isn,
            // Of these the number is not known.
            Some(Flow::Unprotected { .. }) => true,
            None => false,
        };
        if ended && !self.live {
            self.remove(flow, fx);
        }
    }

    /// Puts a guarded flow on the list of those to be confirmed.
    pub(super) fn note_touched(&mut self, flow: FlowKey) {
        if !self.live
            && let Some(Flow::Shadow(shadow)) = self.flows.get_mut(&flow)
            && shadow.touch()
        {
            self.touched.push(flow);
        }
    }

    /// What is to be told to the active's ACK gate since the last call.
    pub fn take_confirmations(&mut self, mut tell: impl FnMut(Record)) {
        self.tells.drain(..).for_each(&mut tell);
        self.take_got(&mut tell);
        let room = self.config.max_bytes.saturating_sub(self.bytes);
        for flow in self.touched.drain(..) {
            if let Some(Flow::Shadow(shadow)) = self.flows.get_mut(&flow) {
                let client_isn = shadow.handshake().client_isn;
                shadow.confirm(room, |confirm| tell(Record::Confirm(confirm)));
                if shadow.is_closed() {
                    tell(Record::Close { flow, client_isn });
                }
            }
        }
    }

    pub(super) fn forget_opening(&mut self, flow: FlowKey, fx: &mut impl Effects) {
        let Some(opening) = self.openings.remove(&flow) else {
            return;
        };
        if opening.guarded && !self.live {
            let client_isn = opening.client_isn;
            self.tells.push(Record::Close { flow, client_isn });
        }
        if opening.answer.is_some() && !self.flows.contains_key(&flow) {
            fx.release(flow);
        }
    }

    pub(super) fn process_syn_ack(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> bool {
        let Some(opening) = self.openings.get_mut(&flow) else {
            return match self.flows.get_mut(&flow) {
                Some(Flow::Shadow(shadow)) => {
                    shadow.process_syn_ack(segment);
                    true
                }
                Some(Flow::Unprotected { .. }) => true,
                None => false,
            };
        };
        if segment.ack != Some(opening.client_isn.wrapping_add(1)) {
            return true;
        }
        let habit = self.habits.entry(flow.service_port).or_default();
        habit.learn(&opening.client, &segment.options);
        if opening.guarded {
            // A copy may be late, and what OPEN said is later than any that it was said after.
            return true;
        }
        if segment.held {
            let open = opening.open(flow, segment);
            if segment.answered {
                // The active knows by now, or hears that it is not so.
                self.follow(&open, now, fx);
            } else if !self.process_open(&open, now, fx) {
                let client_isn = open.client_isn;
                self.tells.push(Record::Refuse { flow, client_isn });
            }
            return true;
        }
        let first = opening.answer.is_none();
        opening.answer = Some((segment.seq, segment.options));
        if first {
            opening.answered_at = now;
            // At the bound of the map the flow stays an opening, and is refused when it completes.
            fx.protect(flow);
            fx.warm(Ipv4Addr::from(flow.client_addr));
        }
        let opening = *opening;
        if opening.acked == Some(segment.seq.wrapping_add(1)) {
            self.process_client(flow, &opening.acknowledgement(segment.seq), now, fx);
        }
        true
    }

    /// The handshake of `flow` is complete: the client sent `segment`, which acknowledges `ack`.
    pub(super) fn complete(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        ack: u32,
        now: Nanos,
        fx: &mut impl Effects,
    ) {
        let Some(opening) = self.openings.get(&flow).copied() else {
            return;
        };
        let inferred = opening.answer.is_none();
        let first = opening.client_isn.wrapping_add(1);
        if !inferred && !opening.guarded && self.heard_beyond(flow, first) {
            // The copy of the SYN-ACK came late: a shadow would lack what came before.
            self.openings.remove(&flow);
            return;
        }
        let (active_isn, active) = match opening.answer {
            Some((isn, options)) if near(isn.wrapping_add(1), ack) => (isn, options),
            Some(_) => return,
            None if segment.seq != first => return,
            None => match self.flows.get(&flow) {
                // A SYN that the active did not answer must not end a flow that runs.
                Some(Flow::Shadow(shadow)) if !shadow.has_ended() => return,
                // The active was heard already, so this is not the first ACK.
                Some(Flow::Unprotected { .. }) => return,
                _ => match self
                    .habits
                    .get(&flow.service_port)
                    .and_then(|habit| habit.infer(&opening.client, &segment.options))
                {
                    // The copy of the SYN-ACK was lost.
                    Some(active) => (ack.wrapping_sub(1), active),
                    // The copy may also come late.
                    None if segment.payload.is_empty() && !segment.fin => {
                        self.openings
                            .entry(flow)
                            .and_modify(|opening| opening.acked = Some(ack));
                        return;
                    }
                    None => {
                        self.openings.remove(&flow);
                        self.leave_unprotected(flow, Some(ack), now);
                        return;
                    }
                },
            },
        };
        self.openings.remove(&flow);
        self.drop_bytes_of(flow);
        self.flows.remove(&flow);
        // One that is guarded has got its place when it was called known: its client may have been told of it.
        let is_full =
            self.flows.len() >= self.config.max_flows || self.bytes >= self.config.max_bytes;
        if (is_full && !opening.guarded) || !fx.protect(flow) {
            self.refused += 1;
            fx.release(flow);
            self.leave_unprotected(flow, Some(ack), now);
            let client_isn = opening.client_isn;
            if opening.guarded && !self.live {
                self.tells.push(Record::Refuse { flow, client_isn });
                if let Some(Flow::Unprotected { refused, .. }) = self.flows.get_mut(&flow) {
                    *refused = Some(client_isn);
                }
            }
            return;
        }
        let handshake = Handshake {
            client_isn: opening.client_isn,
            active_isn,
            client_window: opening.client_window,
            client: opening.client,
            active,
            inferred,
            answered_at: opening.answered_at,
            guarded: opening.guarded,
        };
        self.insert_shadow(flow, handshake, now);
    }

    /// Whether more than the handshake was heard of a client whose first byte is `first`, and not kept.
    fn heard_beyond(&self, flow: FlowKey, first: u32) -> bool {
        match self.flows.get(&flow) {
            Some(Flow::Unprotected {
                client_next: Some(next),
                ..
            }) => *next != first && near(first, *next),
            _ => false,
        }
    }

    /// Handshakes that the active answered go on from there. The others, of those that are not too old,
    /// are returned: this node answers them.
    pub(super) fn adopt_openings(&mut self, now: Nanos, fx: &mut impl Effects) -> Vec<Vec<u8>> {
        self.opening_order.clear();
        let mut unanswered = Vec::new();
        if faulty!(ForgetOpenings) {
            self.openings.clear();
        }
        for (flow, opening) in std::mem::take(&mut self.openings) {
            let Some((active_isn, active)) = opening.answer else {
                if self.flows.contains_key(&flow) {
                    continue;
                }
                if opening.acked.is_some() {
                    self.leave_unprotected(flow, opening.acked, now);
                } else if now.saturating_sub(opening.since) < SYN_REPEATED {
                    unanswered.push(opening.syn(flow, self.config.vip));
                }
                continue;
            };
            // More was heard than its handshake: a shadow cannot start there.
            if let Some(Flow::Unprotected { .. }) = self.flows.get(&flow) {
                continue;
            }
            self.drop_bytes_of(flow);
            self.flows.remove(&flow);
            if self.flows.len() >= self.config.max_flows || !fx.protect(flow) {
                self.refused += 1;
                fx.release(flow);
                continue;
            }
            let handshake = Handshake {
                client_isn: opening.client_isn,
                active_isn,
                client_window: opening.client_window,
                client: opening.client,
                active,
                inferred: false,
                answered_at: opening.answered_at,
                guarded: opening.guarded,
            };
            self.insert_shadow(flow, handshake, now);
        }
        unanswered
    }
}

/// Whether `number` may be one of the first of a connection whose very first is `first`.
pub(super) fn near(first: u32, number: u32) -> bool {
    (0..FAR).contains(&distance(first, number))
}

/// How a service's kernel socket answers SYNs: the same to all, as far as each client asks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Habit {
    mss: Option<u16>,
    window_scale: Option<Option<u8>>,
    sack_permitted: Option<bool>,
}

impl Habit {
    /// Learns from one answer what its client had asked for.
    fn learn(&mut self, client: &Options, answer: &Options) {
        self.mss = answer.mss;
        if client.window_scale.is_some() {
            self.window_scale = Some(answer.window_scale);
        }
        if client.sack_permitted {
            self.sack_permitted = Some(answer.sack_permitted);
        }
    }

    /// The answer to this client, of which only its `acknowledgement` was seen; `None` if nobody
    /// asked for the same before. Timestamps, once agreed on, are in every segment (RFC 7323
    /// section 3.2), and the first echoes the one of the SYN-ACK.
    fn infer(&self, client: &Options, acknowledgement: &Options) -> Option<Options> {
        let asked = client.timestamp.and(acknowledgement.timestamp);
        Some(Options {
            mss: self.mss,
            window_scale: match client.window_scale {
                Some(_) => self.window_scale?,
                None => None,
            },
            sack_permitted: client.sack_permitted && self.sack_permitted?,
            timestamp: asked.map(|(_, echoed)| (echoed, 0)),
        })
    }
}
