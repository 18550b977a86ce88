//! What the active hears of a shadow: what it holds, and how much more it takes.

use super::{BUFFER, REORDER_LIMIT, Shadow};
use crate::fault::faulty;
use crate::lockstep::later;
use crate::pledge::Pledge;
use crate::sync::{Confirm, Sack};

impl Shadow {
    /// The client was told, by the active, that everything before `ack` had arrived.
    pub fn note_told(&mut self, ack: u32) {
        self.active_ack = later(self.active_ack, ack);
        if let Some(pledge) = &mut self.pledge {
            pledge.note_asked();
        }
    }

    /// What this node's programs may confirm of it by themselves.
    pub fn pledge(&mut self) -> &mut Option<Pledge> {
        &mut self.pledge
    }

    /// Bytes that the client has sent, without holes.
    pub fn held_bytes(&self) -> u64 {
        self.held
    }

    /// Whether the client has sent its FIN: there is nothing behind it.
    pub fn has_fin(&self) -> bool {
        self.fin_at.is_some()
    }

    /// Bytes that it can store out of order, or while the handler takes none.
    pub fn storable(&self) -> usize {
        REORDER_LIMIT.saturating_sub(self.reorder.bytes())
    }

    /// Notes that the flow is to be confirmed; returns whether that is news.
    pub fn touch(&mut self) -> bool {
        self.handshake.guarded && !std::mem::replace(&mut self.touched, true)
    }

    /// What this shadow holds, for the active's ACK gate: one confirmation, or as many as it takes to name
    /// the ranges that grew behind holes since the last time, latest first (RFC 2018 section 4). Before them the
    /// one that the client has sent again: it has not heard that it arrived (RFC 2883 section 4).
    ///
    /// `room`: bytes that it may still store.
    pub fn confirm(&mut self, room: usize, mut tell: impl FnMut(Confirm)) {
        self.touched = false;
        let room = REORDER_LIMIT
            .saturating_sub(self.reorder.bytes())
            .min(room)
            .max(BUFFER);
        // What was promised once stays promised: smoltcp's own buffer is behind it.
        let edge = self.held_next().wrapping_add(room as u32);
        self.active_edge = later(self.active_edge, edge);
        let first = self.handshake.client_isn.wrapping_add(1);
        let grown = self.reorder.take_grown(self.held);
        let grown = grown
            .iter()
            .map(|(l, r)| (first.wrapping_add(*l as u32), first.wrapping_add(*r as u32)));
        let blocks: Vec<_> = self.repeated.take().into_iter().chain(grown).collect();
        let confirm = Confirm {
            flow: self.flow,
            client_isn: self.handshake.client_isn,
            ack: self
                .held_next()
                .wrapping_add(faulty!(ConfirmTooMuch).into()),
            edge: self.active_edge,
            sack: Sack::default(),
        };
        if blocks.is_empty() {
            tell(confirm);
        }
        for blocks in blocks.chunks(3) {
            let sack = blocks.iter().copied().collect();
            tell(Confirm { sack, ..confirm });
        }
    }

    /// Up to which sequence number the active may let the client send.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn confirmed_edge(&self) -> u32 {
        self.active_edge
    }
}
