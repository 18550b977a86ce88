//! Handshakes: what the gate reports of them, and SYN-ACKs that wait for the standby.

use rfsis_common::ack_gate::{Agreed, Confirmation, OpeningKind, Sent};
use rfsis_common::agree::{Answer, SPARE_SLOTS_MAX};
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

/// For so many flows one slot is lent to the gate.
const LENT_SHARE: usize = 16;

/// Slots for so many flows, of which some are lent to the gate.
pub const fn slots(max_flows: usize) -> usize {
    max_flows + lent(max_flows)
}

const fn lent(max_flows: usize) -> usize {
    let share = max_flows / LENT_SHARE;
    if share > SPARE_SLOTS_MAX as usize {
        SPARE_SLOTS_MAX as usize
    } else {
        share
    }
}

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
            _ => Direction::FromVip,
        };
        let Ok((flow, segment)) = segment::parse_headers(packet, direction) else {
            return;
        };
        match kind {
            OpeningKind::Syn => self.process_syn(flow, &segment),
            OpeningKind::Passed => self.process_passed(flow, &segment, now, fx),
            OpeningKind::Held | OpeningKind::Kept => {
                let mut packet = packet.to_vec();
                segment::complete_checksum(&mut packet);
                let kept = kind == OpeningKind::Kept;
                self.process_syn_ack(flow, &segment, packet, kept, now, fx);
            }
            // Names no packet.
            OpeningKind::Agreed => {}
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
        kept: bool,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if !self.guarding && (!kept || fx.claim(flow)) {
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
            if let Phase::Opening {
                answer,
                kept: known,
                ..
            } = &mut known.phase
            {
                (*answer, *known) = (packet, kept);
            }
            return;
        }
        self.end_older(flow, fx);
        let Some(slot) = self.take_slot(fx) else {
            if !kept || fx.claim(flow) {
                self.refused += 1;
                fx.send(&packet);
            }
            return;
        };
        let phase = Phase::Opening {
            open: Box::new(open),
            answer: packet,
            kept,
            since: now,
            pause: REPEAT,
            repeat_at: now + REPEAT,
        };
        self.flows.insert(flow, Flow::new(slot, &open, phase, now));
        self.note_handshake(&open, now, fx);
        if !self.config.copied {
            self.records.push(Record::Open(open));
        }
        self.repeats.insert((now + REPEAT, flow));
    }

    /// The kernels have agreed on an opening, at `at` (ns): its SYN-ACK has left, and the gate guards the flow.
    pub fn process_agreed(
        &mut self,
        key: FlowKey,
        agreed: Agreed,
        at: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        self.lent = self.lent.saturating_sub(1);
        if self.guarding && self.to_lend() > self.lent {
            self.lend_slots(fx);
        }
        let stale = !self.guarding || at < self.guarding_since;
        let is_current = self.is(&key, agreed.client_isn) && self.is_opening(&key);
        let Some(flow) = self.flows.get_mut(&key).filter(|_| is_current) else {
            // Given up meanwhile, or this node is standby.
            self.free.push_back(agreed.slot);
            if !self.flows.contains_key(&key) {
                fx.withdraw(key);
            }
            self.disown(key, agreed.client_isn);
            return;
        };
        let phase = std::mem::replace(&mut flow.phase, Phase::Guarded);
        let Phase::Opening {
            open,
            answer,
            repeat_at,
            ..
        } = phase
        else {
            return;
        };
        // It would wake the thread for nothing.
        self.repeats.remove(&(repeat_at, key));
        self.free
            .push_back(std::mem::replace(&mut flow.slot, agreed.slot));
        let sent = Sent::new(open.client_isn, open.active_isn, window_of(&answer));
        flow.confirmation = sent.everything();
        flow.known_at = at;
        // Options that no Linux writes may have misled the program.
        let is_right = agreed.guarded != 0 && agreed.shift == u32::from(flow.shift);
        let ready = is_right || fx.publish(key, flow.guarded());
        self.syns.remove(&key);
        if stale {
            self.expose(key, fx);
        }
        if !ready {
            self.refused += 1;
            self.forget(key, fx);
        }
    }

    /// The standby's kernel has answered for a SYN-ACK, by digests with this key, and the gate has left it to this guard, which has let it go by
    /// now if this returns `true`.
    pub fn process_answer(
        &mut self,
        answer: &Answer,
        key: [u64; 2],
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) -> bool {
        let isns = (answer.client_isn, answer.active_isn);
        let open = match self.flows.get(&answer.flow).map(|flow| &flow.phase) {
            Some(Phase::Opening { open, .. }) if (open.client_isn, open.active_isn) == isns => {
                **open
            }
            _ => return false,
        };
        let kept = fx.kept(answer.flow);
        let is_known = kept.is_some_and(|kept| kept.is_answered_by(answer, key));
        if is_known {
            self.process_known(&open, now, fx);
        }
        is_known
    }

    /// How many slots more the gate is to have.
    pub(super) fn to_lend(&self) -> usize {
        lent(self.config.max_flows).saturating_sub(self.lent)
    }

    /// Gives the gate slots for flows on which the kernels agree.
    pub(super) fn lend_slots(&mut self, fx: &mut impl GuardEffects) {
        while self.to_lend() > 0
            && let Some(slot) = self.free.pop_front()
        {
            if !fx.lend(slot) {
                self.free.push_front(slot);
                return;
            }
            self.lent += 1;
        }
    }

    /// Whether the SYN-ACK of a flow, if it is held, is this guard's to let go from now on: else the gate has done so,
    /// and is about to say it.
    pub(super) fn claim(&mut self, key: FlowKey, fx: &mut impl GuardEffects) -> bool {
        match self.flows.get_mut(&key).map(|flow| &mut flow.phase) {
            Some(Phase::Opening { kept, .. }) if *kept => {
                *kept = !fx.claim(key);
                !*kept
            }
            _ => true,
        }
    }

    /// Forgets an older connection of the same addresses and ports. What the gate keeps of them is the new one's.
    fn end_older(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        if let Some(Flow {
            phase: Phase::Opening { kept, .. },
            ..
        }) = self.flows.get_mut(&key)
        {
            *kept = false;
        }
        self.forget(key, fx);
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
            phase:
                Phase::Opening {
                    open,
                    since,
                    pause,
                    repeat_at,
                    ..
                },
            ..
        }) = self.flows.get_mut(&key)
        else {
            return;
        };
        if now.saturating_sub(*since) > OPENING_PATIENCE {
            let client_isn = open.client_isn;
            // Else the gate has lost it long ago, and the kernel will send another.
            if self.claim(key, fx) {
                self.refused += 1;
                self.let_go(key, fx);
            }
            self.records.push(Record::Close {
                flow: key,
                client_isn,
            });
            self.forget(key, fx);
            return;
        }
        *pause = (*pause * 2).min(REPEAT_MOST);
        *repeat_at = now + *pause;
        self.repeats.insert((*repeat_at, key));
        self.records.push(Record::Open(**open));
    }

    /// Lets out the SYN-ACK of an opening: the flow goes on as one that was opened while the gate was open.
    pub(super) fn open_exposed(&mut self, key: FlowKey, now: Nanos, fx: &mut impl GuardEffects) {
        if !self.claim(key, fx) {
            return;
        }
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
