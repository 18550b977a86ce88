//! Openings on which the kernels agree. What decides is [`rfsis_common::agree`], as in the programs.

use rfsis_common::ack_gate::{Agreed, Guarded, OpeningKind, Sent};
use rfsis_common::agree::{
    AgreePeer, Answer, AnswerWords, MAGIC, Pending, SYN_ACK_MAX, TcpHeader, digest, write_checksum,
};
use rfsis_common::prompt::Delegated;

use super::*;

/// The maps of both halves.
#[derive(Debug, Default)]
pub(crate) struct Agreement {
    pub(crate) peer: AgreePeer,
    /// Until when the standby's program may answer.
    pub(crate) promise: Nanos,
    syns: HashMap<FlowKey, u64>,
    pub(crate) pending: HashMap<FlowKey, Pending>,
    pub(crate) spare: VecDeque<u32>,
}

/// An entry of the ring `OPENINGS`.
#[derive(Debug)]
pub(crate) enum Opening {
    Packet(OpeningKind, Vec<u8>),
    Agreed(FlowKey, Agreed, Nanos),
}

/// The TCP header of a packet whose IPv4 header has no options.
fn header(packet: &[u8]) -> TcpHeader {
    let len = usize::from(packet[32] >> 4) * 4;
    words(&packet[20..20 + len])
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

impl Agreement {
    /// A SYN was noted for the agent, on either node.
    pub(crate) fn note_syn(&mut self, packet: &[u8], is_standby: bool) {
        if let Ok((flow, _)) = parse(packet, Direction::ToVip)
            && self.peer.port != 0
        {
            let digest = digest(self.key(is_standby), 0, &header(packet));
            self.syns.insert(flow, digest);
        }
    }

    fn key(&self, is_standby: bool) -> [u64; 2] {
        if is_standby {
            self.peer.giving
        } else {
            self.peer.taking
        }
    }

    /// Keeps a SYN-ACK that is held; `false` where the agent is to let it go.
    pub(crate) fn keep(&mut self, packet: &[u8]) -> bool {
        let Ok((flow, _)) = parse(packet, Direction::FromVip) else {
            return false;
        };
        self.pending.remove(&flow);
        let Some(&syn) = self.syns.get(&flow) else {
            return false;
        };
        let pending = Pending {
            syn,
            len: packet.len() as u32,
            addresses: [0; 3],
            packet: words::<{ SYN_ACK_MAX / 4 }>(packet),
        };
        self.pending.insert(flow, pending);
        true
    }

    /// What the standby's program says to the copy of a SYN-ACK that is in its ring.
    pub(crate) fn answer(&mut self, packet: &[u8], now: Nanos) -> Option<Vec<u8>> {
        let (flow, segment) = parse(packet, Direction::FromVip).ok()?;
        if !segment.held || now >= self.promise || self.peer.port == 0 {
            return None;
        }
        let before = self.syns.remove(&flow)?;
        let answer = Answer {
            flow,
            client_isn: segment.ack?.wrapping_sub(1),
            active_isn: segment.seq,
            digest: digest(self.key(true), before, &header(packet)),
            unfinished: false,
        };
        let words = answer.seal(self.key(true));
        Some(words.into_iter().flat_map(u64::to_ne_bytes).collect())
    }
}

impl Maps {
    /// Takes an answer as the program does; `false` if it is left to the agent.
    pub(crate) fn take_answer(&mut self, datagram: &[u8], now: Nanos) -> bool {
        debug_assert!(datagram.starts_with(&MAGIC));
        let mut words = AnswerWords::default();
        for (word, bytes) in words.iter_mut().zip(datagram.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let answer = Answer::open(&words, self.agreement.key(false));
        let Some(answer) = answer.filter(|_| self.guarding && self.agreement.peer.port != 0) else {
            return false;
        };
        let key = self.agreement.key(false);
        let Some(mut pending) = self.agreement.pending.get(&answer.flow).copied() else {
            return false;
        };
        if !pending.is_answered_by(&answer, key) {
            return false;
        }
        let Some(slot) = self.agreement.spare.pop_front() else {
            return false;
        };
        self.agreement.pending.remove(&answer.flow);
        write_checksum(&mut pending.packet, pending.len, false);
        let bytes = pending.packet.into_iter().flat_map(u32::to_ne_bytes);
        let packet: Vec<u8> = bytes.take(pending.len as usize).collect();
        // smoltcp orders its options otherwise than Linux.
        let shift = parse(&packet, Direction::FromVip)
            .ok()
            .and_then(|(_, segment)| segment.options.window_scale)
            .map_or(0, u32::from);
        let begun = Sent::new(answer.client_isn, answer.active_isn, pending.window()).at(now);
        let index = slot as usize;
        self.sent[index] = begun;
        self.confirmed[index] = begun.everything();
        self.delegated[index] = Delegated::of(answer.client_isn);
        let guarded = Guarded {
            slot,
            client_isn: answer.client_isn,
            shift,
        };
        self.guarded.insert(answer.flow, guarded);
        let agreed = Agreed {
            slot,
            client_isn: answer.client_isn,
            shift,
            guarded: 1,
        };
        self.openings
            .push_back(Opening::Agreed(answer.flow, agreed, now));
        self.released.push(packet);
        true
    }
}
