//! Handshakes: what the gate reports of them, and SYN-ACKs that wait for the standby.

use rfsis_common::ack_gate::{Confirmation, OpeningKind, Sent};
use rfsis_common::maps::{Direction, FlowKey};

use super::{Flow, Guard, GuardEffects, MS, Phase, SECOND, Syn, window_of};
use crate::heartbeat::Nanos;
use crate::segment;
use crate::segment::Segment;
use crate::sync::{Open, Record};

/// An OPEN is repeated after this, and then ever more rarely up to the second, ns.
const REPEAT: Nanos = 2 * MS;
const REPEAT_MOST: Nanos = 64 * MS;

/// A standby that answers, but does not confirm a flow for so long, has no use for it, ns.
const OPENING_PATIENCE: Nanos = SECOND;

/// SYNs remembered until they are answered; at the bound the oldest is forgotten.
const MAX_SYNS: usize = 16_384;

impl Guard {
    /// The gate reports the headers of a SYN that came in, or of a SYN-ACK.
    pub fn process_opening(
        &mut self,
        packet: &[u8],
        kind: OpeningKind,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if !self.active {
            return;
        }
        let direction = match kind {
            OpeningKind::Syn => Direction::ToVip,
            OpeningKind::Held | OpeningKind::Passed => Direction::FromVip,
        };
        let Ok((flow, segment)) = segment::parse_headers(packet, direction) else {
            return;
        };
        match kind {
            OpeningKind::Syn => self.process_syn(flow, &segment),
            OpeningKind::Passed => self.process_passed(flow, &segment, now, fx),
            OpeningKind::Held => {
                let mut packet = packet.to_vec();
                segment::complete_checksum(&mut packet);
                self.process_syn_ack(flow, &segment, packet, now, fx);
            }
        }
    }

    pub(super) fn process_syn(&mut self, flow: FlowKey, segment: &Segment<'_>) {
        let syn = Syn {
            isn: segment.seq,
            window: segment.window,
            options: segment.options,
        };
        let known = self.syns.insert(flow, syn).map(|syn| syn.isn);
        if known != Some(segment.seq) {
            self.syn_order.push_back((flow, segment.seq));
        }
        while self.syn_order.len() > MAX_SYNS {
            if let Some((oldest, isn)) = self.syn_order.pop_front()
                && self.syns.get(&oldest).is_some_and(|syn| syn.isn == isn)
            {
                self.syns.remove(&oldest);
            }
        }
    }

    pub(super) fn process_syn_ack(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        packet: Vec<u8>,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if !self.guarding {
            // The gate was opened just after it had held this.
            self.process_passed(flow, segment, now, fx);
            fx.send(&packet);
            return;
        }
        // Without its SYN the client's options are not known: the client repeats it.
        let Some(open) = self.open_of(flow, segment) else {
            return;
        };
        if let Some(known) = self.flows.get_mut(&flow)
            && known.client_isn == open.client_isn
            && known.active_isn == open.active_isn
        {
            // The kernel repeats it; its timestamp is newer.
            if let Phase::Opening { answer, .. } = &mut known.phase {
                *answer = packet;
            }
            return;
        }
        self.forget(flow, fx);
        let Some(slot) = self.take_slot(fx) else {
            self.refused += 1;
            fx.send(&packet);
            return;
        };
        let phase = Phase::Opening {
            open: Box::new(open),
            answer: packet,
            since: now,
            pause: REPEAT,
        };
        self.flows.insert(flow, Flow::new(slot, &open, phase, now));
        self.note_handshake(&open, now, fx);
        if !self.config.copied {
            self.records.push(Record::Open(open));
        }
        self.repeats.insert((now + REPEAT, flow));
    }

    /// What both sides of a handshake have said, if the SYN that is answered was seen.
    pub(super) fn open_of(&self, flow: FlowKey, answer: &Segment<'_>) -> Option<Open> {
        let syn = self.syns.get(&flow)?;
        (answer.ack == Some(syn.isn.wrapping_add(1))).then_some(Open {
            flow,
            client_isn: syn.isn,
            active_isn: answer.seq,
            client_window: syn.window,
            client: syn.options,
            active: answer.options,
        })
    }

    /// A SYN-ACK left while the gate was open. The flow is noted from its first byte on, so that it can be
    /// guarded once the standby has caught up with what its client was told.
    pub(super) fn process_passed(
        &mut self,
        flow: FlowKey,
        segment: &Segment<'_>,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        let Some(open) = self.open_of(flow, segment) else {
            return;
        };
        self.syns.remove(&flow);
        let sent = Sent::new(open.client_isn, open.active_isn, segment.window).at(now);
        if self.note_exposed(&open, sent, now, fx)
            && let Some(flow) = self.flows.get_mut(&flow)
        {
            flow.spoke_unseen = true;
            self.note_handshake(&open, now, fx);
        }
    }

    /// Notes a flow that the kernel has, and the standby not. Returns whether there was room.
    pub(super) fn note_exposed(
        &mut self,
        open: &Open,
        sent: Sent,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) -> bool {
        let key = open.flow;
        self.forget(key, fx);
        let Some(slot) = self.take_slot(fx) else {
            self.refused += 1;
            return false;
        };
        let flow = Flow::new(slot, open, Phase::Exposed, now);
        let guarded = flow.guarded();
        self.flows.insert(key, flow);
        let ready = fx.start(slot, sent)
            && fx.confirm(slot, Confirmation::OPEN)
            && fx.publish(key, guarded);
        if !ready {
            self.refused += 1;
            self.forget(key, fx);
        }
        ready
    }

    pub(super) fn repeat(&mut self, key: FlowKey, now: Nanos, fx: &mut impl GuardEffects) {
        let Some(Flow {
            phase: Phase::Opening {
                open, since, pause, ..
            },
            ..
        }) = self.flows.get_mut(&key)
        else {
            return;
        };
        if now.saturating_sub(*since) > OPENING_PATIENCE {
            self.refused += 1;
            let client_isn = open.client_isn;
            self.records.push(Record::Close {
                flow: key,
                client_isn,
            });
            self.let_go(key, fx);
            self.forget(key, fx);
            return;
        }
        *pause = (*pause * 2).min(REPEAT_MOST);
        self.repeats.insert((now + *pause, key));
        self.records.push(Record::Open(**open));
    }

    /// Lets out the SYN-ACK of an opening: the flow goes on as one that was opened while the gate was open.
    pub(super) fn open_exposed(&mut self, key: FlowKey, now: Nanos, fx: &mut impl GuardEffects) {
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        let phase = std::mem::replace(&mut flow.phase, Phase::Exposed);
        let Phase::Opening { open, answer, .. } = phase else {
            return;
        };
        // The gate is open already: the kernel may have sent its SYN-ACK once more.
        flow.spoke_unseen = true;
        let sent = Sent::new(open.client_isn, open.active_isn, window_of(&answer)).at(now);
        let ready = fx.start(flow.slot, sent)
            && fx.confirm(flow.slot, Confirmation::OPEN)
            && fx.publish(key, flow.guarded());
        fx.send(&answer);
        self.syns.remove(&key);
        if !ready {
            self.refused += 1;
            self.forget(key, fx);
        }
    }
}
