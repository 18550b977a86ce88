//! The ACK gate's maps. What decides is [`rfsis_common::ack_gate`], as in the kernel.

use std::sync::atomic::Ordering;

use rfsis_common::ack_gate::{
    AckGateVerdict, AckVerdict, Confirmation, Guarded, OpeningKind, Outgoing, Sent, ack_decide,
    note_open, note_release, release, syn_ack_decide,
};
use rfsis_common::agree::Pending;
use rfsis_common::frame::{TcpPart, tcp_flags};
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};
use rfsis_common::options::is_told;
use rfsis_common::pledge::{self, Held, Pledged, Room, confirmation, grown, is_due, is_plain};
use rfsis_common::prompt::{
    Delegated, PromptPeer, PromptSeen, acknowledgement, seal as prompt_seal,
};

use super::*;
use crate::fault::faulty;
use crate::guard::{Guard, GuardConfig, GuardEffects, slots};
use crate::pledge::{PledgeEffects, Words};
use crate::segment::{self, Options};
use crate::sync::{Confirm, Snapshot, prompt};

pub(crate) const SLOTS: usize = 64;

/// The gate's maps, and what the guard sends past it.
#[derive(Debug)]
pub(crate) struct Maps {
    pub(crate) guarding: bool,
    /// Somebody gets copies.
    pub(crate) copied: bool,
    pub(crate) guarded: HashMap<FlowKey, Guarded>,
    pub(crate) confirmed: Vec<Confirmation>,
    pub(crate) delegated: Vec<Delegated>,
    pub(crate) prompted_at: Nanos,
    /// From whom prompt datagrams are taken, and which came already.
    pub(crate) prompt_peer: PromptPeer,
    pub(crate) seen: PromptSeen,
    /// Prompt datagrams that are about to be taken, and when at the latest: between two looks of the agent's at
    /// these maps, if it is at work.
    pub(crate) incoming: VecDeque<(Nanos, Vec<u8>)>,
    /// Those that are for the agent.
    pub(crate) left: Vec<Vec<u8>>,
    pub(crate) sent: Vec<Sent>,
    pub(crate) now: Nanos,
    /// The gate that comes first is closed: nothing leaves.
    pub(crate) closed: bool,
    pub(crate) released: Vec<Vec<u8>>,
    /// Flows of which a snapshot is asked for.
    pub(crate) wanted: Vec<(FlowKey, u32)>,
    /// What the ring `OPENINGS` holds.
    pub(crate) openings: VecDeque<Opening>,
    /// Openings on which the kernels agree.
    pub(crate) agreement: Agreement,
    /// What the standby's program may confirm by itself.
    pub(crate) pledged: HashMap<FlowKey, Pledged>,
    pub(crate) pledges: Words,
    pub(crate) prompted: Words,
    /// How often each verdict was given.
    pub(crate) verdicts: [usize; AckGateVerdict::ALL.len()],
}

impl Default for Maps {
    fn default() -> Self {
        Self {
            guarding: false,
            copied: false,
            guarded: HashMap::default(),
            confirmed: vec![Confirmation::default(); slots(SLOTS)],
            delegated: vec![Delegated::default(); slots(SLOTS)],
            prompted_at: 0,
            prompt_peer: PromptPeer::default(),
            seen: PromptSeen::default(),
            incoming: VecDeque::new(),
            left: vec![],
            sent: vec![Sent::default(); slots(SLOTS)],
            now: 0,
            closed: false,
            released: vec![],
            wanted: vec![],
            openings: VecDeque::new(),
            agreement: Agreement::default(),
            pledged: HashMap::default(),
            pledges: Words::own(SLOTS * pledge::WORDS),
            prompted: Words::own(1),
            verdicts: [0; AckGateVerdict::ALL.len()],
        }
    }
}

impl PledgeEffects for Maps {
    fn pledge(&mut self, flow: FlowKey, pledged: Pledged) -> bool {
        self.pledged.insert(flow, pledged);
        true
    }

    fn retract(&mut self, flow: FlowKey) {
        self.pledged.remove(&flow);
    }
}

impl Maps {
    /// What the standby's program says to a segment that is in its ring.
    pub(crate) fn confirm_pledged(&self, tcp: &TcpPart, now: Nanos) -> Option<Vec<u8>> {
        if !is_plain(tcp) || now >= self.agreement.promise || self.agreement.peer.port == 0 {
            return None;
        }
        let pledged = *self.pledged.get(&tcp.flow)?;
        let word = |place| {
            self.pledges
                .get(pledged.slot as usize * pledge::WORDS + place)
        };
        let (held, told) = (word(pledge::HELD)?, word(pledge::TOLD)?);
        let taken = word(pledge::TAKEN)?;
        let order = Ordering::SeqCst;
        let room = Room::from_word(word(pledge::ROOM)?.load(order));
        let grown = grown(pledged, Held::from_word(held.load(order)), room, tcp)?;
        held.store(grown.word(), order);
        let since = now - taken.swap(now, order);
        let last = Confirmation::from_word(told.load(order));
        if !is_due(grown, last, tcp, since) {
            return None;
        }
        let record = confirmation(grown, room, tcp);
        told.store(record.confirmation.word(), order);
        let sequence = self.prompted.get(0)?.fetch_add(1, order) + 1;
        let words = prompt_seal(&record, sequence, false, self.agreement.peer.prompting);
        Some(words.into_iter().flat_map(u64::to_ne_bytes).collect())
    }
}

impl GuardEffects for Maps {
    fn set_guarding(&mut self, on: bool) {
        self.guarding = on;
    }

    fn start(&mut self, slot: u32, sent: Sent) -> bool {
        self.sent[slot as usize] = sent;
        self.delegated[slot as usize] = Delegated::default();
        true
    }

    fn publish(&mut self, flow: FlowKey, guarded: Guarded) -> bool {
        self.guarded.insert(flow, guarded);
        true
    }

    fn withdraw(&mut self, flow: FlowKey) {
        self.guarded.remove(&flow);
    }

    fn lend(&mut self, slot: u32) -> bool {
        self.agreement.spare.push_back(slot);
        true
    }

    fn kept(&mut self, flow: FlowKey) -> Option<Pending> {
        self.agreement.pending.get(&flow).copied()
    }

    fn claim(&mut self, flow: FlowKey) -> bool {
        self.agreement.pending.remove(&flow).is_some()
    }

    fn confirm(&mut self, slot: u32, confirmation: Confirmation) -> bool {
        self.confirmed[slot as usize] = confirmation;
        true
    }

    fn confirm_more(&mut self, slot: u32, confirmation: Confirmation) -> Confirmation {
        let known = &mut self.confirmed[slot as usize];
        *known = known.with(confirmation);
        let all = *known;
        self.take_one();
        all
    }

    fn confirmed(&mut self, slot: u32) -> Confirmation {
        let found = self.confirmed[slot as usize];
        self.take_one();
        found
    }

    fn delegate(&mut self, slot: u32, delegated: Delegated) -> bool {
        self.delegated[slot as usize] = delegated;
        true
    }

    fn prompted_at(&mut self) -> u64 {
        self.prompted_at
    }

    fn sent(&mut self, slot: u32) -> Option<Sent> {
        let found = self.sent[slot as usize];
        self.take_one();
        Some(found)
    }

    fn send(&mut self, packet: &[u8]) {
        if self.closed {
            return;
        }
        let (flow, segment) = parse(packet, Direction::FromVip).expect("a sound packet");
        if let Some(guarded) = self.guarded.get(&flow)
            && !segment.syn
        {
            let sent = &mut self.sent[guarded.slot as usize];
            note_release(&outgoing(&segment), sent, guarded.shift);
            sent.at_ns = self.now;
        }
        self.released.push(packet.to_vec());
    }

    fn runs(&mut self, _flow: FlowKey) -> bool {
        true
    }

    fn take_snapshot(&mut self, flow: FlowKey, join: u32) {
        self.wanted.push((flow, join));
    }
}

impl Maps {
    /// A prompt datagram came in.
    pub(crate) fn receive_prompt(&mut self, until: Nanos, datagram: Vec<u8>) {
        self.incoming.push_back((until, datagram));
    }

    /// Takes those whose time has come.
    pub(crate) fn take_incoming(&mut self, now: Nanos) {
        while self
            .incoming
            .front()
            .is_some_and(|(until, _)| *until <= now)
        {
            self.take_one();
        }
    }

    /// Takes a datagram as the programs do, or leaves it to the agent.
    fn take_one(&mut self) {
        let Some((_, datagram)) = self.incoming.pop_front() else {
            return;
        };
        let Some((confirms, seen)) = self.read(&datagram) else {
            return self.left.push(datagram);
        };
        if !confirms.iter().all(|confirm| self.note(confirm)) {
            return self.left.push(datagram);
        }
        self.seen = seen;
        self.prompted_at = self.now;
        for confirm in confirms {
            self.tell(confirm.flow);
        }
    }

    /// As [`Maps::take_one`] takes what a datagram says of one flow; `false` if it is for the guard to hear.
    #[cfg(test)]
    pub(crate) fn take(&mut self, confirm: &Confirm) -> bool {
        let taken = self.guarding && confirm.sack.blocks().is_empty() && self.note(confirm);
        if taken {
            self.prompted_at = self.now;
            self.tell(confirm.flow);
        }
        taken
    }

    fn read(&self, datagram: &[u8]) -> Option<(Vec<Confirm>, PromptSeen)> {
        let from = Ipv4Addr::from(self.prompt_peer.peer);
        let read = prompt::open(&self.prompt_peer, datagram, from, self.seen);
        read.ok().filter(|_| self.guarding)
    }

    fn note(&mut self, confirm: &Confirm) -> bool {
        let Some(guarded) = self.guarded.get(&confirm.flow) else {
            return false;
        };
        let slot = guarded.slot as usize;
        let fresh = Confirmation::new(confirm.ack, confirm.edge);
        let (known, all) = (self.confirmed[slot], self.confirmed[slot].with(fresh));
        if !self.delegated[slot].takes(confirm.client_isn)
            || known == Confirmation::default()
            || all.is_open()
        {
            return false;
        }
        self.confirmed[slot] = all;
        true
    }

    fn tell(&mut self, flow: FlowKey) {
        let Some(guarded) = self.guarded.get(&flow) else {
            return;
        };
        let slot = guarded.slot as usize;
        let confirmed = self.confirmed[slot];
        if confirmed.is_open() {
            return;
        }
        if let Some(due) = release(&self.sent[slot], confirmed, guarded.shift) {
            let words = acknowledgement(VIP.into(), flow, &due, false);
            let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_be_bytes).collect();
            self.send(&bytes[..usize::from(u16::from_be_bytes([bytes[2], bytes[3]]))]);
        }
    }

    /// What was sent past the gate since the last call.
    pub(crate) fn take_released(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.released)
    }

    /// Behind what the kernel sent, where that is known.
    pub(crate) fn sent_next(&self, flow: &FlowKey) -> Option<u32> {
        let guarded = self.guarded.get(flow)?;
        Some(self.sent[guarded.slot as usize].next)
    }

    /// The gate holds an acknowledgement of the kernel's.
    #[cfg(test)]
    pub(crate) fn holds(&mut self, flow: FlowKey, ack: u32, flags: u32) {
        let sent = &mut self.sent[self.guarded[&flow].slot as usize];
        (sent.ack, sent.flags) = (ack, flags);
    }

    /// The kernel has acknowledged this, and the client was told of it.
    #[cfg(test)]
    pub(crate) fn speaks(&mut self, flow: FlowKey, ack: u32) {
        let sent = &mut self.sent[self.guarded[&flow].slot as usize];
        (sent.ack, sent.told) = (ack, ack);
        sent.version += 2;
    }

    /// What becomes of a packet that a kernel with an ACK gate sends, and the packet that leaves.
    pub(crate) fn judge(&mut self, packet: Vec<u8>) -> (AckGateVerdict, Option<Vec<u8>>) {
        let (flow, segment) = parse(&packet, Direction::FromVip).expect("a sound packet");
        let known = self.guarded.get(&flow).copied();
        let (verdict, packet) = if segment.syn {
            self.open(flow, segment.ack.unwrap_or(0), known, packet)
        } else if let Some(guarded) = known {
            self.judge_guarded(guarded, &segment, &packet)
        } else {
            (AckGateVerdict::Unguarded, Some(packet))
        };
        self.verdicts[verdict as usize] += 1;
        (verdict, packet)
    }

    fn open(
        &mut self,
        flow: FlowKey,
        ack: u32,
        known: Option<Guarded>,
        packet: Vec<u8>,
    ) -> (AckGateVerdict, Option<Vec<u8>>) {
        let verdict = syn_ack_decide(ack, known, self.guarding);
        if known.is_some() && verdict != AckGateVerdict::Passed {
            self.guarded.remove(&flow);
        }
        match verdict {
            AckGateVerdict::Opening => {
                let kind = if self.copied && self.agreement.keep(&packet) {
                    OpeningKind::Kept
                } else {
                    OpeningKind::Held
                };
                self.openings
                    .push_back(Opening::Packet(kind, packet.clone()));
                (verdict, faulty!(ReleaseUnknown).then_some(packet))
            }
            AckGateVerdict::Open => {
                self.openings
                    .push_back(Opening::Packet(OpeningKind::Passed, packet.clone()));
                (verdict, Some(packet))
            }
            _ => (verdict, Some(packet)),
        }
    }

    fn judge_guarded(
        &mut self,
        guarded: Guarded,
        segment: &Segment<'_>,
        packet: &[u8],
    ) -> (AckGateVerdict, Option<Vec<u8>>) {
        let slot = guarded.slot as usize;
        let confirmation = self.confirmed[slot];
        let sent = &mut self.sent[slot];
        sent.at_ns = self.now;
        sent.version = sent.version.wrapping_add(2);
        let outgoing = outgoing(segment);
        if !self.guarding || confirmation.is_open() {
            note_open(&outgoing, sent, guarded.shift);
            return (AckGateVerdict::Open, Some(packet.to_vec()));
        }
        let decision = ack_decide(&outgoing, sent, confirmation, guarded.shift);
        let verdict = match decision.verdict {
            AckVerdict::Held if faulty!(HoldNothing) => {
                return (AckGateVerdict::Passed, Some(packet.to_vec()));
            }
            AckVerdict::Held => return (AckGateVerdict::Held, None),
            AckVerdict::Lowered => AckGateVerdict::Lowered,
            AckVerdict::Passed => AckGateVerdict::Passed,
        };
        let packet = rewrite(packet, |repr| {
            if !faulty!(LowerNoAck) {
                repr.ack_number = repr.ack_number.map(|_| seq(decision.ack));
            }
            if !faulty!(LowerNoWindow) {
                repr.window_len = decision.window;
            }
            let [first, ..] = repr.sack_ranges;
            let twice = first.filter(|(_, right)| is_told(decision.ack, *right));
            repr.sack_ranges = [twice, None, None];
        });
        (verdict, Some(packet))
    }
}

/// The copy of a SYN-ACK that is held.
pub(crate) fn held(mut packet: Vec<u8>) -> Vec<u8> {
    // Behind an IPv4 header without options.
    packet[20 + URGENT_OFFSET..][..2].copy_from_slice(&HELD_URGENT.to_be_bytes());
    segment::complete_checksum(&mut packet);
    packet
}

/// TCP flags, low byte.
pub(crate) fn flags_of(segment: &Segment<'_>) -> u8 {
    let flag = |set, bit| if set { bit } else { 0 };
    flag(segment.syn, tcp_flags::SYN)
        | flag(segment.fin, tcp_flags::FIN)
        | flag(segment.rst, tcp_flags::RST)
        | flag(segment.ack.is_some(), tcp_flags::ACK)
}

fn outgoing(segment: &Segment<'_>) -> Outgoing {
    let (tsval, tsecr) = segment.options.timestamp.unwrap_or((0, 0));
    Outgoing {
        flags: flags_of(segment),
        seq: segment.seq,
        ack: segment.ack.unwrap_or(0),
        window: segment.window,
        payload: segment.payload.len() as u32,
        has_timestamp: segment.options.timestamp.is_some(),
        tsval,
        tsecr,
    }
}

/// The guard of an active with these maps, whose standby gets copies if `copied`.
pub(crate) fn guard(timeout: Nanos, copied: bool) -> Guard {
    Guard::new(GuardConfig {
        vip: VIP,
        timeout,
        max_flows: SLOTS,
        idle_timeout: 3600 * SECOND,
        copied,
    })
}

/// What a kernel's stack and the connection's server know of it. `track` is of this kernel's making.
pub(crate) fn snapshot(track: &Track, host: &mut Host, server: &Server) -> Option<Snapshot> {
    let socket = host.socket(server.handle);
    if !socket.may_send() || server.done {
        return None;
    }
    let mut waiting = vec![0; socket.recv_queue()];
    socket.peek_slice(&mut waiting).ok()?;
    let input = [&server.input[..], &waiting].concat();
    let next = track.client_isn.wrapping_add(1 + server.taken as u32);
    let fin = socket.state() == State::CloseWait;
    let ack = next.wrapping_add(input.len() as u32 + u32::from(fin));
    let una = track.una?;
    let acknowledged = distance(track.active_isn.wrapping_add(1), una) as usize;
    let stamp = |ticks: u32| track.timestamps.then_some((ticks, 0));
    Some(Snapshot {
        next,
        ack,
        edge: later(track.kernel_edge, ack),
        unacknowledged: una,
        sent: 0,
        window: distance(una, track.client_edge).max(0) as u32,
        client: Options {
            mss: Some(track.mss as u16),
            window_scale: track.client_shift.filter(|_| track.scaled),
            sack_permitted: track.sack,
            timestamp: stamp(client_ticks()),
        },
        active: Options {
            mss: Some(1460),
            window_scale: track.scaled.then_some(track.shift),
            sack_permitted: track.sack,
            timestamp: stamp(active_ticks().wrapping_add(track.ticks_ahead)),
        },
        fin,
        handler: server.handler.snapshot(),
        input,
        output: server.wrote.get(acknowledged..)?.to_vec(),
    })
}
