//! A shadow that speaks for the VIP: whether it can, and what it says.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use rfsis_common::maps::FlowKey;
use smoltcp::iface::PollResult;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{
    IpAddress, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, TcpTimestampRepr,
};

use super::{BUFFER, Context, FAR, Outgoing, REORDER_LIMIT, Shadow, Source, tcp_edge};
use crate::fault::faulty;
use crate::heartbeat::Nanos;
use crate::lockstep::{before, distance, later, window_field};
use crate::metrics::ResetReason;
use crate::services::RECEIVE_BUFFER;
use crate::wire::{bare_repr, emit_packet, instant};

/// How far beyond what is held here a kernel socket of a service can have promised to go, bytes: a whole
/// window that the standby lacks, and another. The kernel doubles SO_RCVBUF, socket(7).
const KERNEL_WINDOW: u32 = 2 * 2 * RECEIVE_BUFFER as u32;

impl Shadow {
    /// The numbers are inferred from what was perhaps not the client's first ACK: where the server speaks first it
    /// may have been of one of its later bytes.
    pub(super) fn is_guessed(&self) -> bool {
        self.inferred
            && matches!(self.source, Source::Handler(_))
            && self.written > 0
            && self.taken == 0
    }

    /// Whether the flow can go on at takeover, else why not.
    pub fn fate(&self) -> Result<(), ResetReason> {
        if self.diverged {
            Err(ResetReason::Diverged)
        } else if self.is_guessed() {
            Err(ResetReason::Lagging)
        } else if self.lacks_answer() {
            Err(ResetReason::Unpredictable)
        } else if self.lag() > 0
            || self.has_lost()
            || (self.ahead.is_some() && !self.handshake.guarded)
        {
            // A guarded flow lacks only what its client will send again.
            Err(ResetReason::Lagging)
        } else {
            Ok(())
        }
    }

    /// The answer has begun, not all of it was overheard, and nobody else can compute it.
    pub(super) fn lacks_answer(&self) -> bool {
        matches!(self.source, Source::Active { complete: false }) && !self.is_pristine()
    }

    /// Nothing was sent to the client yet, so a handler may still start from the beginning.
    pub(super) fn is_pristine(&self) -> bool {
        let first = self.handshake.active_isn.wrapping_add(1);
        self.una == first
            && self.active_next == first
            && self.ahead.is_none()
            && self.claimed.is_none()
    }

    /// The shadow speaks for the VIP from now on; [`Shadow::resume`] follows. Returns whether it has anything to say at once.
    pub fn go_live(&mut self, now: Nanos) -> bool {
        self.live = true;
        self.pledge = None;
        self.live_since = now;
        if let Some(clock) = &mut self.clock {
            clock.leap(now);
        }
        if self.handshake.guarded {
            // What was confirmed is more than the active's kernel can have promised of it.
            let most = self.held_next().wrapping_add(KERNEL_WINDOW);
            if before(most, self.active_edge) {
                self.active_edge = most;
            }
        }
        // Only a handler that was not run so far can have something to write.
        let starts = matches!(self.source, Source::Active { complete: false });
        if starts {
            self.source = Source::Handler(self.kind.stream());
        }
        self.proof = VecDeque::new();
        self.proof_start = self.written;
        self.tail.restart();
        let socket = self.socket();
        let unacknowledged = socket.send_queue() > 0
            || !matches!(
                socket.state(),
                State::Established | State::CloseWait | State::FinWait2 | State::TimeWait
            );
        // The client waits for an ACK, or for a window that the active had closed.
        let owed =
            self.active_ack != self.held_next() || (self.active_window as usize) < BUFFER / 8;
        self.wants_ack = owed && socket.state() != State::SynReceived;
        unacknowledged || owed || starts
    }

    /// Goes on where the standby stopped: whatever can move without a new segment.
    pub fn resume(&mut self, cx: &mut Context<'_>) {
        self.pump(&[], cx);
    }

    /// Collects everything that the live shadow has to send now.
    pub fn dispatch(&mut self, cx: &mut Context<'_>) {
        if self.probe_at().is_some_and(|at| at <= cx.now) {
            self.tail.repeated();
            self.force_retransmit(cx);
        }
        while self
            .iface
            .poll_egress(instant(cx.now), cx.wire, &mut self.sockets)
            != PollResult::None
        {}
        self.collect(cx);
        if std::mem::take(&mut self.wants_ack) && cx.out.is_empty() && !self.is_closed() {
            self.poke(cx);
        }
    }

    /// When the oldest unacknowledged segment is to be repeated; a closed window has its own probes.
    fn probe_at(&self) -> Option<Nanos> {
        let waiting = before(self.una, self.client_edge)
            && self.socket().send_queue() > 0
            && self.state() != State::SynReceived;
        self.tail.due_at().filter(|_| waiting)
    }

    /// Three duplicate acknowledgements make smoltcp repeat its oldest segment (RFC 5681 section 3.2).
    /// A changed window makes it forget those that it has counted before.
    fn force_retransmit(&mut self, cx: &mut Context<'_>) {
        let edge = self.client_edge;
        let unit = 1 << self.client_shift();
        let widest = u32::from(u16::MAX) << self.client_shift();
        self.client_edge = if distance(self.una, edge) >= widest as i32 {
            edge.wrapping_sub(unit)
        } else {
            edge.wrapping_add(unit)
        };
        for _ in 0..4 {
            self.feed_at(self.expected(), TcpControl::None, self.una, &[], cx);
        }
        self.client_edge = edge;
        self.feed_at(self.expected(), TcpControl::None, self.una, &[], cx);
    }

    /// When `dispatch` is due without a frame before, ns; `None` if never.
    pub fn next_wakeup(&mut self, now: Nanos) -> Option<Nanos> {
        let stack = self.iface.poll_at(instant(now), &self.sockets);
        let stack = stack.map(|at| (at.total_micros().max(0) as u64) * 1000);
        match (stack, self.probe_at()) {
            (Some(stack), Some(probe)) => Some(stack.min(probe)),
            (stack, probe) => stack.or(probe),
        }
    }

    /// A packet of the shadow's, as the active would have sent it.
    pub(super) fn translate(&mut self, packet: &[u8], now: Nanos) -> Option<Outgoing> {
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
        let (from, to) = (
            IpAddress::Ipv4(ip.src_addr()),
            IpAddress::Ipv4(ip.dst_addr()),
        );
        let mut repr = TcpRepr::parse(&tcp, &from, &to, &ChecksumCapabilities::ignored()).ok()?;
        let start = self.lockstep.to_wire(repr.seq_number.0 as u32);
        if !repr.payload.is_empty() {
            self.tail
                .sent(start.wrapping_add(repr.payload.len() as u32), now);
        }
        // smoltcp repeats its oldest segment whole though the window has become smaller than that, with the FIN
        // behind it, and takes the rest for sent: the tail probe comes back to it. One byte may always be sent
        // (RFC 9293 section 3.8.6.1).
        let room = distance(start, self.client_edge).max(1) as usize;
        if repr.payload.len() > room {
            repr.payload = &repr.payload[..room];
            if repr.control == TcpControl::Fin {
                repr.control = TcpControl::None;
            }
        }
        self.sent_next = later(
            self.sent_next,
            start.wrapping_add(repr.segment_len() as u32),
        );
        // smoltcp knows nothing of what the active sent, and rewinds when it retransmits. An ACK from
        // before what the client has received is not acceptable to it (RFC 9293 section 3.10.7.4).
        let seq = match repr.control {
            TcpControl::None if repr.payload.is_empty() => self.acceptable_seq(),
            _ => start.wrapping_add(faulty!(SpeakOneOff).into()),
        };
        repr.seq_number = TcpSeqNumber(seq as i32);
        repr.timestamp = self
            .clock
            .map(|clock| TcpTimestampRepr::new(clock.read(now), self.client_tsval));
        repr.sack_ranges = [None; 3];
        // What waits in `reorder` without a hole before it is held as safely as what smoltcp has.
        repr.ack_number = Some(TcpSeqNumber(self.held_next() as i32));
        let own_edge = tcp_edge(&tcp);
        let shifts = self.handshake.shifts();
        if repr.control == TcpControl::Syn {
            repr.max_seg_size = self.handshake.active.mss;
            repr.window_scale = shifts.map(|(_, active)| active);
            repr.sack_permitted = self.handshake.sack();
        } else {
            let shift = shifts.map_or(0, |(_, active)| active);
            repr.window_len = window_field(self.open_window(own_edge), shift);
            if repr.payload.is_empty() && self.handshake.sack() && !self.reorder.is_empty() {
                repr.sack_ranges = self.sack_ranges();
            }
        }
        let closes = matches!(repr.control, TcpControl::Fin | TcpControl::Rst);
        let mut bytes = Vec::with_capacity(packet.len() + 40);
        let caps = ChecksumCapabilities::default();
        emit_packet(&mut bytes, ip.src_addr(), ip.dst_addr(), &repr, &caps);
        Some(Outgoing {
            packet: bytes,
            closes,
        })
    }

    /// The sequence number of an ACK: behind all that was sent, but inside the client's window, which a
    /// window probe is not (Linux `tcp_acceptable_seq`).
    ///
    /// What the active sent is not all known here where the tap does not show it; the client says what it
    /// has got, and ignores every ACK from before that.
    pub(super) fn acceptable_seq(&self) -> u32 {
        let next = later(self.active_next, self.sent_next);
        let got = self
            .claimed
            .or(self.ahead)
            .filter(|_| self.handshake.guarded);
        let next = later(next, got.unwrap_or(next));
        if before(self.client_edge, next) {
            self.client_edge
        } else {
            next
        }
    }

    /// The window to announce, bytes: up to smoltcp's own edge, but never less than what the active
    /// had promised, because a window must not shrink (RFC 9293 section 3.8.6) and [`Reorder`] takes
    /// what smoltcp cannot.
    pub(super) fn open_window(&self, own_edge: u32) -> u32 {
        let edge = later(own_edge, self.active_edge);
        distance(self.held_next(), edge).clamp(0, REORDER_LIMIT as i32) as u32
    }

    pub(super) fn sack_ranges(&self) -> [Option<(u32, u32)>; 3] {
        let first = self.handshake.client_isn.wrapping_add(1);
        self.reorder.ranges_behind(self.held).map(|range| {
            range.map(|(l, r)| (first.wrapping_add(l as u32), first.wrapping_add(r as u32)))
        })
    }

    /// A reset that the client accepts: at the number that it expects next, as far as is known.
    pub fn reset_packet(&self) -> Vec<u8> {
        reset_packet(self.flow, self.vip, self.told(), Some(self.held_next()))
    }

    /// What the client has got, as far as is known.
    fn told(&self) -> u32 {
        self.ahead.or(self.claimed).unwrap_or(self.una)
    }

    /// A reset for a client of which copies may be missing. One that has got more than is known here does not
    /// believe it, but answers the probe, and the kernel, which does not know the flow, resets it by the answer.
    pub fn last_words(&self) -> Vec<Vec<u8>> {
        let probe = probe_packet(self.flow, self.vip, self.told(), self.held_next());
        vec![self.reset_packet(), probe]
    }
}

/// A segment from long before `seq`: the client looks no further, and answers with what it expects (RFC 9293
/// section 3.10.7.4).
pub fn probe_packet(flow: FlowKey, vip: Ipv4Addr, seq: u32, ack: u32) -> Vec<u8> {
    let repr = TcpRepr {
        seq_number: TcpSeqNumber(seq.wrapping_sub(FAR as u32) as i32),
        ack_number: Some(TcpSeqNumber(ack as i32)),
        ..bare_repr(flow.service_port, flow.client_port, TcpControl::None)
    };
    let mut bytes = Vec::new();
    let to = Ipv4Addr::from(flow.client_addr);
    emit_packet(&mut bytes, vip, to, &repr, &ChecksumCapabilities::default());
    bytes
}

/// An RST (with ACK, if there is a number for it) from the VIP to the client of a flow.
pub fn reset_packet(flow: FlowKey, vip: Ipv4Addr, seq: u32, ack: Option<u32>) -> Vec<u8> {
    let repr = TcpRepr {
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: ack.map(|ack| TcpSeqNumber(ack as i32)),
        ..bare_repr(flow.service_port, flow.client_port, TcpControl::Rst)
    };
    let mut bytes = Vec::new();
    let caps = ChecksumCapabilities::default();
    emit_packet(
        &mut bytes,
        vip,
        Ipv4Addr::from(flow.client_addr),
        &repr,
        &caps,
    );
    bytes
}
