//! What the active sent: how far it is, and whether it sends the same bytes.

use std::collections::VecDeque;

use smoltcp::socket::tcp::Socket;

use super::{Context, Shadow, Source, is_far};
use crate::lockstep::{before, later};
use crate::segment::Segment;

impl Shadow {
    /// A SYN-ACK of the active that comes after the shadow was made without it.
    pub fn process_syn_ack(&mut self, segment: &Segment<'_>) {
        let first = self.handshake.client_isn.wrapping_add(1);
        if !self.inferred || segment.ack != Some(first) {
            return;
        }
        self.inferred = false;
        self.diverged |= segment.seq != self.handshake.active_isn
            || segment.options.window_scale != self.handshake.active.window_scale
            || segment.options.timestamp.is_some() != self.handshake.active.timestamp.is_some()
            || segment.options.sack_permitted != self.handshake.active.sack_permitted;
    }

    /// A segment from the active, overheard.
    pub fn process_active(&mut self, segment: &Segment<'_>, cx: &mut Context<'_>) {
        self.last_activity = cx.now;
        if is_far(self.active_next, segment.seq) {
            return;
        }
        if segment.rst {
            self.reset = true;
            return;
        }
        if segment.syn {
            return;
        }
        if let Some(ack) = segment.ack {
            let shift = self.handshake.shifts().map_or(0, |(_, active)| active);
            self.active_window = u32::from(segment.window) << shift;
            self.active_ack = later(self.active_ack, ack);
            self.active_edge = later(self.active_edge, ack.wrapping_add(self.active_window));
        }
        if let (Some((tsval, _)), Some(clock)) = (segment.options.timestamp, &mut self.clock) {
            clock.observe(tsval, cx.now);
        }
        self.active_next = later(self.active_next, segment.end());
        if !segment.payload.is_empty() {
            self.tail.sent(segment.end(), cx.now);
        }
        if let Some(claimed) = self.claimed
            && !before(self.active_next, claimed)
        {
            self.claimed = None;
            self.disbelieved = 0;
            self.ahead = Some(self.ahead.map_or(claimed, |known| later(known, claimed)));
            self.pump(&[], cx);
        }
        if self.lost_since.is_some_and(|since| since < cx.now)
            && self.active_ack == self.held_next()
            && self.reorder.is_empty()
        {
            // The active acknowledged exactly what is held, after the loss: nothing is missing.
            self.lost_since = None;
        }
        let start = self.server_offset(segment.seq);
        match &mut self.source {
            Source::Handler(_) => self.compare(start, segment.payload),
            Source::Active { .. } => self.adopt_output(start, segment, cx),
        }
    }

    /// Compares bytes of the active with those that the shadow wrote.
    fn compare(&mut self, start: i64, payload: &[u8]) {
        let end = start + payload.len() as i64;
        let from = start.max(self.proof_start as i64);
        let to = end.min(self.written as i64);
        if from < to {
            let theirs = &payload[(from - start) as usize..(to - start) as usize];
            let at = (from - self.proof_start as i64) as usize;
            let same = equals(&self.proof, at, theirs);
            self.diverged |= !same;
            self.inferred &= !same;
            if start <= self.proof_start as i64 {
                let seen = (to - self.proof_start as i64) as usize;
                self.proof.drain(..seen);
                self.proof_start = to as u64;
            }
        }
        if self.closed_output && !payload.is_empty() && end > self.written as i64 {
            // The active sends bytes where the shadow's stream has ended.
            self.diverged = true;
        }
    }

    /// What the client acknowledged need not be compared any more.
    pub(super) fn forget_proof(&mut self) {
        let acknowledged = self.server_offset(self.una).min(self.written as i64);
        if acknowledged > self.proof_start as i64 {
            let count = (acknowledged - self.proof_start as i64) as usize;
            self.proof.drain(..count.min(self.proof.len()));
            self.proof_start = acknowledged as u64;
        }
    }

    /// Keeps what the active sent for a handler that cannot be run twice.
    fn adopt_output(&mut self, start: i64, segment: &Segment<'_>, cx: &mut Context<'_>) {
        let written = self.written as i64;
        let end = start + segment.payload.len() as i64;
        if start <= written && written < end && !self.closed_output {
            let fresh = &segment.payload[(written - start) as usize..];
            let socket = self.sockets.get_mut::<Socket<'static>>(self.socket);
            let kept = socket.send_slice(fresh).unwrap_or(0);
            self.written += kept as u64;
        }
        if segment.fin && end == self.written as i64 && !self.closed_output {
            self.sockets.get_mut::<Socket<'static>>(self.socket).close();
            self.closed_output = true;
            self.closed_second = self.fin_at == Some(self.taken);
            self.source = Source::Active { complete: true };
        }
        self.pump(&[], cx);
    }
}

/// Whether `deque[at..]` starts with `bytes`.
fn equals(deque: &VecDeque<u8>, at: usize, bytes: &[u8]) -> bool {
    let (front, back) = deque.as_slices();
    let split = front.len().saturating_sub(at).min(bytes.len());
    let back_at = (at + split).saturating_sub(front.len());
    front.get(at..at + split).unwrap_or(&[]) == &bytes[..split]
        && back.get(back_at..back_at + bytes.len() - split) == Some(&bytes[split..])
}
