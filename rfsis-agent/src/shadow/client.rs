//! What the client sent: acknowledgements, bytes, holes, and what the handler makes of them.

use smoltcp::socket::tcp::{Socket, State};
use smoltcp::wire::TcpControl;

use super::{Context, DISBELIEF, FAR, FAR_AHEAD, Outgoing, REORDER_LIMIT, Shadow, Source, is_far};
use crate::heartbeat::Nanos;
use crate::lockstep::{before, clamp_ack, distance, later};
use crate::segment::Segment;

impl Shadow {
    /// A segment from the client.
    pub fn process_client(&mut self, segment: &Segment<'_>, cx: &mut Context<'_>) {
        self.last_activity = cx.now;
        if segment.rst {
            // RFC 5961 section 3.2: the exact number resets, any other is only answered.
            if segment.seq == self.held_next() {
                self.reset = true;
            } else {
                self.wants_ack = self.live;
            }
            return;
        }
        let Some(ack) = segment.ack.filter(|_| !segment.syn) else {
            // RFC 5961 section 4.2; in SYN-RECEIVED smoltcp repeats its SYN-ACK by itself.
            self.wants_ack = self.live && self.state() != State::SynReceived;
            return;
        };
        let start = self.client_offset(segment.seq);
        let end = start + segment.payload.len() as i64;
        let reach = distance(self.held_next(), self.active_edge).clamp(1 << 20, FAR);
        if end < self.taken as i64 - i64::from(FAR)
            || start > self.held as i64 + i64::from(reach)
            || self.is_incredible(ack, cx)
        {
            self.wants_ack = self.live;
            return;
        }
        self.take_timestamp(segment);
        let before_ack = (self.una, self.client_edge);
        let Some(ack) = self.take_ack(segment, ack, cx) else {
            return;
        };
        let has_bytes = !segment.payload.is_empty() || segment.fin;
        if has_bytes && !before(self.held_next(), segment.end()) {
            self.repeated = Some((segment.seq, segment.end()));
        }
        if !segment.payload.is_empty() && start < self.held as i64 {
            // It has not even heard of what is held: it will come to what is missing, however slowly.
            self.hole = None;
            self.ahead_since = None;
        }
        let (mut delivered, mut fresh) = (false, &[][..]);
        // In SYN-RECEIVED and with a closed window smoltcp would not look at an ACK behind data.
        if self.state() == State::SynReceived {
            self.feed(TcpControl::None, ack, &[], cx);
            delivered = true;
        }
        if !segment.payload.is_empty() {
            let before = self.taken;
            delivered |= self.take_payload(start, end, segment.payload, ack, cx);
            if self.taken > before {
                let at = |offset: u64| (offset as i64 - start) as usize;
                fresh = &segment.payload[at(before)..at(self.taken)];
            }
        }
        if segment.fin {
            if self.fin_at.is_none() && end >= self.held as i64 {
                self.fin_at = Some(end as u64);
            }
            self.wants_ack |= self.live;
        }
        if start < self.held as i64 && end <= self.held as i64 && !segment.fin {
            // A keep-alive, a window probe, or something that was held before: RFC 9293
            // section 3.10.7.4.
            self.wants_ack |= self.live;
        }
        // A third duplicate makes smoltcp repeat data at once (RFC 5681 section 3.2); where only the FIN
        // is unacknowledged it would instead forget to repeat that.
        let duplicate = self.live
            && segment.ack == Some(self.una)
            && segment.payload.is_empty()
            && !segment.fin
            && self.socket().send_queue() > 0;
        if !delivered && (duplicate || before_ack != (ack, self.client_edge)) {
            self.feed(TcpControl::None, ack, &[], cx);
        }
        self.pump(fresh, cx);
        if self.live && (self.ahead_stays(cx.now) || self.hole_stays(cx.now)) {
            self.give_up(cx);
        }
    }

    /// Whether an acknowledgement belongs to another life of the flow. Where all that the active copies is true,
    /// and of a guarded client that is live, it may be far ahead: copies of a fast download were lost.
    fn is_incredible(&self, ack: u32, cx: &Context<'_>) -> bool {
        let ahead = distance(self.una, ack);
        if self.handshake.guarded && (self.live || cx.acks_are_true) {
            !(-FAR..=FAR_AHEAD).contains(&ahead)
        } else {
            is_far(self.una, ack)
        }
    }

    /// The client goes on, or waits, behind a hole and never fills it: it was told, by the active, that the
    /// bytes had arrived.
    fn hole_stays(&mut self, now: Nanos) -> bool {
        let hole = self.reorder.is_held_behind(self.held) || self.is_behind();
        self.hole = match self.hole {
            Some((held, since)) if hole && held == self.held => Some((held, since)),
            _ => hole.then_some((self.held, now)),
        };
        let patience = self.hole_patience();
        self.hole
            .is_some_and(|(_, since)| now.saturating_sub(since) > patience)
    }

    /// The client has bytes that the handler did not write, because it lacks what the client had sent
    /// before. Of a guarded flow the client sends it again.
    fn ahead_stays(&mut self, now: Nanos) -> bool {
        let ahead = self.ahead.is_some() || self.disbelieved >= DISBELIEF;
        self.ahead_since = ahead.then(|| self.ahead_since.unwrap_or(now));
        let patience = if self.handshake.guarded {
            self.hole_patience()
        } else {
            0
        };
        self.ahead_since
            .is_some_and(|since| now.saturating_sub(since) >= patience)
    }

    /// The client has bytes that this shadow cannot write, or sends bytes behind some that it lacks:
    /// copies were lost on the way here. The client is told, instead of waiting for good.
    pub(super) fn give_up(&mut self, cx: &mut Context<'_>) {
        cx.out.push(Outgoing {
            packet: self.reset_packet(),
            closes: true,
        });
        self.reset = true;
        self.gave_up = true;
    }

    /// RFC 7323 section 4.3: only what does not lie behind a hole moves the echoed timestamp.
    fn take_timestamp(&mut self, segment: &Segment<'_>) {
        if let Some((tsval, _)) = segment.options.timestamp
            && !before(self.expected(), segment.seq)
            // 0 where a late join did not know one.
            && (self.client_tsval == 0 || !before(tsval, self.client_tsval))
        {
            self.client_tsval = tsval;
        }
    }

    /// The acknowledgement to deliver with this segment, or `None` if the segment is worthless.
    fn take_ack(&mut self, segment: &Segment<'_>, ack: u32, cx: &Context<'_>) -> Option<u32> {
        let clamped = clamp_ack(ack, self.una, self.max());
        if self.handshake.guarded && !self.live && cx.acks_are_true {
            self.active_next = later(self.active_next, ack);
        }
        if clamped
            .ahead
            .is_some_and(|ahead| before(self.active_next, ahead))
        {
            // Neither written here nor seen of the active: a copy was lost or comes late, or the
            // segment is forged. Its bytes count, its acknowledgement does not (RFC 5961 section 5.2).
            self.claimed = Some(ack);
            self.disbelieved = self.disbelieved.saturating_add(1);
            self.wants_ack |= self.live;
            if !(self.live && self.handshake.guarded && self.disbelieved >= DISBELIEF) {
                return Some(self.una);
            }
            // The client's own: the active answered data of which no copy came, and died. The client sends
            // that data again, and what the handler makes of it is acknowledged already.
            self.active_next = ack;
        }
        if clamped.stale && self.state() == State::SynReceived {
            return None;
        }
        if !clamped.stale {
            self.disbelieved = 0;
            self.claimed = None;
            self.note_exact(cx.now);
            if segment.payload.is_empty() {
                self.client_next = later(self.client_next, segment.seq);
            }
            // The furthest edge counts: a window does not shrink (RFC 9293 section 3.8.6), so one that
            // ends earlier is older. If it was meant, the bytes beyond it are repeated until they are
            // taken; a smoltcp that believes it while bytes are in flight would never repeat them.
            let edge = ack.wrapping_add(u32::from(segment.window) << self.client_shift());
            self.client_edge = later(self.client_edge, edge);
            if let Some(ahead) = clamped.ahead {
                self.ahead = Some(self.ahead.map_or(ahead, |known| later(known, ahead)));
            }
        }
        Some(clamped.now)
    }

    /// Takes the data of a segment; returns whether its ACK was delivered with it.
    fn take_payload(
        &mut self,
        start: i64,
        end: i64,
        payload: &[u8],
        ack: u32,
        cx: &mut Context<'_>,
    ) -> bool {
        let taken = self.taken as i64;
        if end <= taken || self.fin_at == Some(self.held) {
            return false;
        }
        let skip = (taken - start).max(0) as usize;
        let fresh = &payload[skip.min(payload.len())..];
        let start = start.max(taken) as u64;
        if start > self.taken {
            self.store(start, fresh, cx);
            // Out of order: the client wants to hear what is missing (RFC 5681 section 4.2).
            self.wants_ack = self.live;
            return false;
        }
        let accepted = self.feed_data(fresh, ack, cx);
        if accepted < fresh.len() {
            self.store(start + accepted as u64, &fresh[accepted..], cx);
            self.wants_ack = self.live;
        }
        accepted > 0
    }

    pub(super) fn store(&mut self, start: u64, data: &[u8], cx: &mut Context<'_>) {
        let before = self.reorder.bytes();
        let limit = REORDER_LIMIT.min(before + cx.room);
        if self.reorder.insert(start, data, limit) {
            cx.room -= (self.reorder.bytes() - before).min(cx.room);
            if start <= self.held {
                let end = self.held.max(start + data.len() as u64);
                self.held = self.reorder.contiguous(self.held, end);
            }
        }
    }

    /// Feeds in-order data as far as smoltcp has room; returns how much it took.
    pub(super) fn feed_data(&mut self, data: &[u8], ack: u32, cx: &mut Context<'_>) -> usize {
        let mut window = distance(self.expected(), self.window_end).max(0) as usize;
        if window < data.len() {
            self.ask_window(cx);
            window = distance(self.expected(), self.window_end).max(0) as usize;
        }
        let offered = &data[..window.min(data.len())];
        if offered.is_empty() {
            return 0;
        }
        let queued = self.socket().recv_queue();
        self.feed(TcpControl::Psh, ack, offered, cx);
        let accepted = self.socket().recv_queue() - queued;
        self.taken += accepted as u64;
        if self.taken > self.held {
            self.held = self.reorder.contiguous(self.held, self.taken);
        }
        accepted
    }

    /// Moves everything that can move: input to the handler, output to the send buffer, stored
    /// bytes and acknowledgements to smoltcp, until nothing does. `fresh`: what smoltcp has just been fed, last.
    pub(super) fn pump(&mut self, mut fresh: &[u8], cx: &mut Context<'_>) {
        loop {
            let mut moved = self.run_handler(&mut fresh, cx);
            moved |= self.catch_up(cx);
            while let Some((start, data)) = self.reorder.pop_until(self.taken) {
                cx.room += data.len();
                let skip = (self.taken - start).min(data.len() as u64) as usize;
                let stored = &data[skip..];
                if stored.is_empty() {
                    continue;
                }
                let accepted = self.feed_data(stored, self.una, cx);
                moved |= accepted > 0;
                if accepted < stored.len() {
                    // There was room for these bytes a moment ago.
                    self.reorder
                        .insert(self.taken, &stored[accepted..], usize::MAX);
                    break;
                }
            }
            // smoltcp hears of the client's FIN after its own: in LAST-ACK it ignores a window that opens,
            // and would wait for good. The client's FIN is acknowledged all the same.
            if self.fin_at == Some(self.taken) && self.closed_output && !self.fin_taken {
                self.feed(TcpControl::Fin, self.una, &[], cx);
                self.fin_taken = !matches!(
                    self.state(),
                    State::Established | State::SynReceived | State::FinWait1 | State::FinWait2
                );
                moved |= self.fin_taken;
            }
            if !moved {
                self.memory.note_use(self.taken.max(self.written));
                return;
            }
        }
    }

    /// Delivers what had to be cut off an acknowledgement, as far as the handler has come.
    pub(super) fn catch_up(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(ahead) = self.ahead else {
            return false;
        };
        let clamped = clamp_ack(ahead, self.una, self.max());
        self.ahead = clamped.ahead;
        let moved = before(self.una, clamped.now);
        if moved {
            self.feed(TcpControl::None, clamped.now, &[], cx);
        }
        moved
    }

    /// Runs the handler until it neither takes nor writes. Returns whether it did. `fresh`: the last bytes that were fed;
    /// where nothing else waits for the handler they need not be copied out of smoltcp.
    fn run_handler(&mut self, fresh: &mut &[u8], cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        if self.resting {
            return moved;
        }
        loop {
            let socket = self.sockets.get_mut::<Socket<'static>>(self.socket);
            let queued = socket.recv_queue();
            let input = if queued == fresh.len() {
                *fresh
            } else {
                *fresh = &[];
                let offered = socket.peek_slice(cx.scratch).unwrap_or(0);
                &cx.scratch[..offered]
            };
            let offered = input.len();
            let eof = self.fin_at == Some(self.taken) && offered == queued;
            let (consumed, produced) = match &mut self.source {
                Source::Handler(handler) if !self.closed_output => {
                    // Once live there is no active to compare with.
                    let proof = (!self.live).then_some(&mut self.proof);
                    let progress = socket
                        .send(|room| {
                            let progress = handler.advance(input, eof, room);
                            if let Some(proof) = proof {
                                proof.extend(&room[..progress.produced]);
                            }
                            (progress.produced, progress)
                        })
                        .unwrap_or_default();
                    if progress.finished {
                        socket.close();
                        self.closed_output = true;
                        self.closed_second = self.fin_at == Some(self.taken);
                        moved = true;
                    }
                    (progress.consumed, progress.produced)
                }
                _ => (offered, 0),
            };
            *fresh = fresh.get(consumed..).unwrap_or_default();
            let mut rest = consumed;
            while rest > 0 {
                let Ok(count) = socket.recv(|data| {
                    let count = data.len().min(rest);
                    (count, count)
                }) else {
                    break;
                };
                rest -= count;
            }
            self.written += produced as u64;
            if consumed == 0 && produced == 0 {
                return moved;
            }
            moved = true;
        }
    }
}
