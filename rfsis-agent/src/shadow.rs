//! One flow in lockstep: a smoltcp socket that is fed what the client sent, in order, translated.
//!
//! ```text
//!  client's segment ──► process_client ─┬─ ACK: clamped to [una, max] ────────────────┐
//!                                       ├─ data in order and in window ──► feed ──► smoltcp
//!                                       └─ the rest ──► reorder ──► pump ──► feed ────┘ │ ▲
//!                                                                                       ▼ │
//!  active's segment ──► process_active: how far is it, same bytes?              handler: advance
//!
//!  live:  smoltcp ──► dispatch ──► translate ──► the client
//! ```
//!
//! While standby only smoltcp's ingress runs, never its egress or timers: nothing counts as sent,
//! so nothing backs off, and the first thing after a takeover is everything unacknowledged.
//!
//! smoltcp sees in-order bytes only. Holes and bytes beyond its window wait in [`Reorder`], which is
//! larger than any window that the active's kernel can have announced; the SACK blocks of a live
//! shadow are made from it.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use rfsis_common::maps::FlowKey;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp::{CongestionControl, Socket, SocketBuffer, State};
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpCidr, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    TcpTimestampRepr,
};

use crate::handler::{HandlerKind, Output, StreamHandler};
use crate::heartbeat::Nanos;
use crate::lockstep::{Lockstep, TimestampClock, before, clamp_ack, distance, later, window_field};
use crate::metrics::{FlowCondition, ResetReason};
use crate::reorder::Reorder;
use crate::segment::{Options, Segment};
use crate::wire::{Wire, bare_repr, emit_packet, instant};

/// Receive and send buffer of a shadow, bytes. One byte short of 64 KiB, so that smoltcp's own
/// window shift is 0. The pages are touched only when used.
pub const BUFFER: usize = 65_535;

/// Bytes that one flow may hold in [`Reorder`]: more than the bounded kernel sockets of the active
/// can hold (receive and send buffer, doubled by the kernel, and the handler's own two).
pub const REORDER_LIMIT: usize = 2 << 20;

/// A segment that lies so many bytes from what is expected belongs to another life of the flow.
pub const FAR: i32 = 16 << 20;

/// So many acknowledgements in a row of what nobody sent are the client's own: a forger would have
/// to guess each, and the client's true ones would come between.
const DISBELIEF: u8 = 3;

/// Both ends of a handshake, and what they agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// Initial sequence number of the client.
    pub client_isn: u32,
    /// Initial sequence number of the active: `P`.
    pub active_isn: u32,
    /// Window of the client's SYN, bytes.
    pub client_window: u16,
    /// Options of the client's SYN.
    pub client: Options,
    /// Options of the active's SYN-ACK. What it left out, the shadow must not use.
    pub active: Options,
    /// The SYN-ACK itself was not seen; all this is inferred from the client's first ACK.
    pub inferred: bool,
}

impl Handshake {
    /// Window scaling counts only where both announced it (RFC 7323 section 2.2).
    fn shifts(&self) -> Option<(u8, u8)> {
        self.client.window_scale.zip(self.active.window_scale)
    }

    fn timestamps(&self) -> bool {
        self.client.timestamp.is_some() && self.active.timestamp.is_some()
    }

    fn sack(&self) -> bool {
        self.client.sack_permitted && self.active.sack_permitted
    }
}

/// Where a shadow's output comes from.
enum Source {
    /// The handler, run on the client's bytes.
    Handler(Box<dyn StreamHandler>),
    /// The active, overheard. `complete` once its FIN was seen behind everything before.
    Active { complete: bool },
}

/// What a shadow borrows from its table for one call.
#[derive(Debug)]
pub struct Context<'a> {
    /// Device that all shadows share.
    pub wire: &'a mut Wire,
    /// Room for a handler's input.
    pub scratch: &'a mut [u8],
    /// CLOCK_MONOTONIC, ns.
    pub now: Nanos,
    /// Bytes that may be added to [`Reorder`] before the bound of all shadows is reached.
    pub room: usize,
    /// Where a live shadow puts what it sends.
    pub out: &'a mut Vec<Outgoing>,
}

/// A packet that a live shadow wants to send.
#[derive(Debug)]
pub struct Outgoing {
    /// From the IPv4 header on.
    pub packet: Vec<u8>,
    /// It carries FIN or RST: the gate must let the flow pass first.
    pub closes: bool,
}

/// The shadow of one flow.
pub struct Shadow {
    flow: FlowKey,
    vip: Ipv4Addr,
    handshake: Handshake,
    lockstep: Lockstep,
    iface: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    kind: HandlerKind,
    source: Source,

    // What the client sent. Offsets count bytes of its stream.
    taken: u64,
    held: u64,
    fin_at: Option<u64>,
    fin_taken: bool,
    reorder: Reorder,
    /// smoltcp takes bytes up to this sequence number: what its last segment announced.
    window_end: u32,
    client_window: u16,
    client_window_seq: u32,
    client_tsval: u32,

    // What the shadow wrote. `una` is in wire units.
    una: u32,
    written: u64,
    closed_output: bool,
    /// An acknowledgement beyond what the handler wrote so far.
    ahead: Option<u32>,
    /// The latest acknowledgement of something that the active was not seen to send, and how many
    /// of this kind came since the last that could be believed.
    claimed: Option<u32>,
    disbelieved: u8,
    /// Written, and not yet seen in a segment of the active, from offset `proof_start` on.
    proof: VecDeque<u8>,
    proof_start: u64,

    // What the active said.
    active_ack: u32,
    active_next: u32,
    active_edge: u32,
    active_window: u32,
    clock: Option<TimestampClock>,
    diverged: bool,
    /// The numbers are inferred, and no byte of the active's has confirmed them yet.
    inferred: bool,
    lost_since: Option<Nanos>,

    live: bool,
    reset: bool,
    wants_ack: bool,
    last_activity: Nanos,
}

impl std::fmt::Debug for Shadow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shadow")
            .field("flow", &self.flow)
            .field("state", &self.state())
            .field("taken", &self.taken)
            .field("held", &self.held)
            .field("written", &self.written)
            .field("una", &self.una)
            .field("active_ack", &self.active_ack)
            .field("ahead", &self.ahead)
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

/// All shadows use the same seed, and so the same initial sequence number: it never reaches the
/// wire, and can be learned once instead of at every handshake. See [`learn_isn`].
fn interface(vip: Ipv4Addr, wire: &mut Wire, now: Nanos) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = 0x5246_5349;
    let mut iface = Interface::new(config, wire, instant(now));
    iface.update_ip_addrs(|addrs| {
        // The list was just made and holds one; a prefix of 0 makes every client on-link, because
        // routes are the kernel's business.
        let _ = addrs.push(IpCidr::new(IpAddress::Ipv4(vip), 0));
    });
    iface
}

fn new_socket() -> Socket<'static> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; BUFFER]),
        SocketBuffer::new(vec![0; BUFFER]),
    );
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    socket.set_congestion_control(CongestionControl::Cubic);
    socket
}

/// The shadow's own initial sequence number `S`, the same for all: that of a throw-away handshake.
///
/// Returns `None` if smoltcp does not answer a SYN as expected.
pub fn learn_isn(wire: &mut Wire) -> Option<u32> {
    let vip = Ipv4Addr::new(192, 0, 2, 1);
    let mut iface = interface(vip, wire, 0);
    let mut socket = new_socket();
    socket.listen((vip, 7)).ok()?;
    let mut sockets = SocketSet::new(vec![]);
    sockets.add(socket);
    let syn = bare_repr(9, 7, TcpControl::Syn);
    wire.load(Ipv4Addr::new(192, 0, 2, 2), vip, &syn);
    iface.poll(instant(0), wire, &mut sockets);
    let reply = wire.take_output()?;
    let ip = Ipv4Packet::new_checked(&reply[..]).ok()?;
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    tcp.syn().then(|| tcp.seq_number().0 as u32)
}

/// The timestamp is written when a segment is translated; smoltcp only has to leave room.
fn no_timestamp() -> u32 {
    0
}

impl Shadow {
    /// A shadow that has just seen the active's SYN-ACK. `shadow_isn` is that of [`learn_isn`].
    pub fn new(
        flow: FlowKey,
        vip: Ipv4Addr,
        handshake: Handshake,
        kind: HandlerKind,
        shadow_isn: u32,
        cx: &mut Context<'_>,
    ) -> Self {
        let mut iface = interface(vip, cx.wire, cx.now);
        let mut socket = new_socket();
        if handshake.timestamps() {
            socket.set_tsval_generator(Some(no_timestamp));
        }
        // `listen` fails for port 0 only, which no service has, and on an open socket.
        let _ = socket.listen((vip, flow.service_port));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);

        let client_tsval = handshake.client.timestamp.map_or(0, |(tsval, _)| tsval);
        let syn = TcpRepr {
            seq_number: TcpSeqNumber(handshake.client_isn as i32),
            window_len: handshake.client_window,
            window_scale: handshake.shifts().map(|(client, _)| client),
            max_seg_size: handshake.client.mss,
            sack_permitted: handshake.sack(),
            timestamp: handshake
                .timestamps()
                .then(|| TcpTimestampRepr::new(client_tsval, 0)),
            ..bare_repr(flow.client_port, flow.service_port, TcpControl::Syn)
        };
        cx.wire.load(Ipv4Addr::from(flow.client_addr), vip, &syn);
        iface.poll_ingress_single(instant(cx.now), cx.wire, &mut sockets);

        let first = handshake.client_isn.wrapping_add(1);
        let source = match kind.output() {
            Output::Replicated => Source::Handler(kind.stream()),
            Output::Observed => Source::Active { complete: false },
        };
        Self {
            flow,
            vip,
            handshake,
            lockstep: Lockstep::new(handshake.active_isn, shadow_isn),
            iface,
            sockets,
            socket: handle,
            kind,
            source,
            taken: 0,
            held: 0,
            fin_at: None,
            fin_taken: false,
            reorder: Reorder::default(),
            window_end: first,
            client_window: handshake.client_window,
            client_window_seq: first,
            client_tsval,
            una: handshake.active_isn.wrapping_add(1),
            written: 0,
            closed_output: false,
            ahead: None,
            claimed: None,
            disbelieved: 0,
            proof: VecDeque::new(),
            proof_start: 0,
            active_ack: first,
            active_next: handshake.active_isn.wrapping_add(1),
            active_edge: first,
            active_window: 0,
            clock: handshake
                .active
                .timestamp
                .filter(|_| handshake.timestamps())
                .map(|(tsval, _)| TimestampClock::new(tsval, cx.now)),
            diverged: false,
            inferred: handshake.inferred,
            lost_since: None,
            live: false,
            reset: false,
            wants_ack: false,
            last_activity: cx.now,
        }
    }

    fn socket(&self) -> &Socket<'static> {
        self.sockets.get(self.socket)
    }

    /// State of the TCP connection, as the shadow sees it.
    pub fn state(&self) -> State {
        self.socket().state()
    }

    /// When the last frame of the flow arrived, ns.
    pub fn last_activity(&self) -> Nanos {
        self.last_activity
    }

    /// The numbers of its handshake.
    pub fn handshake(&self) -> &Handshake {
        &self.handshake
    }

    /// Whether both directions are closed and acknowledged, so that a new connection may follow.
    pub fn has_ended(&self) -> bool {
        self.is_closed() || self.state() == State::TimeWait
    }

    /// Whether nothing is left to protect: closed, or reset by either side.
    pub fn is_closed(&self) -> bool {
        self.reset || self.state() == State::Closed
    }

    /// Memory that the flow's bytes take, without what every flow takes.
    pub fn bytes(&self) -> usize {
        let socket = self.socket();
        socket.recv_queue() + socket.send_queue() + self.reorder.bytes() + self.proof.len()
    }

    /// Bytes that the active acknowledged and that the shadow does not hold.
    pub fn lag(&self) -> u32 {
        distance(self.held_next(), self.active_ack).max(0) as u32
    }

    /// How well the flow is protected now.
    pub fn condition(&self) -> FlowCondition {
        if self.live {
            FlowCondition::Live
        } else if self.diverged {
            FlowCondition::Diverged
        } else if self.lag() > 0 || self.lost_since.is_some() {
            FlowCondition::Lagging
        } else if self.state() == State::SynReceived {
            FlowCondition::Handshake
        } else {
            FlowCondition::Lockstep
        }
    }

    /// A frame of this flow found the ring full at `at` (ns).
    pub fn mark_lost(&mut self, at: Nanos) {
        self.lost_since = Some(at);
    }

    /// Gives back what an idle flow need not hold.
    pub fn relax(&mut self) {
        if self.proof.is_empty() {
            self.proof = VecDeque::new();
        }
    }

    // Sequence space of the client.

    /// What the client is to send next, as smoltcp knows it.
    fn expected(&self) -> u32 {
        self.handshake
            .client_isn
            .wrapping_add(1)
            .wrapping_add(self.taken as u32)
            .wrapping_add(u32::from(self.fin_taken))
    }

    /// Behind the last sequence number that is held without a hole before it.
    fn held_next(&self) -> u32 {
        let fin_held = self.fin_taken || self.fin_at == Some(self.held);
        self.handshake
            .client_isn
            .wrapping_add(1)
            .wrapping_add(self.held as u32)
            .wrapping_add(u32::from(fin_held))
    }

    /// Offset in the client's stream of a sequence number near the expected one. Negative before
    /// the first byte.
    fn client_offset(&self, seq: u32) -> i64 {
        let expected_offset = self.taken as i64 + i64::from(self.fin_taken);
        expected_offset + i64::from(distance(self.expected(), seq))
    }

    // Sequence space of the server, wire units.

    /// Behind everything that the shadow could have sent.
    fn max(&self) -> u32 {
        self.handshake
            .active_isn
            .wrapping_add(1)
            .wrapping_add(self.written as u32)
            .wrapping_add(u32::from(self.closed_output))
    }

    /// Offset in the server's stream of a sequence number near what was written.
    fn server_offset(&self, seq: u32) -> i64 {
        let written_seq = self
            .handshake
            .active_isn
            .wrapping_add(1)
            .wrapping_add(self.written as u32);
        self.written as i64 + i64::from(distance(written_seq, seq))
    }

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
            || distance(self.una, ack).abs() > FAR
        {
            self.wants_ack = self.live;
            return;
        }
        self.take_timestamp(segment);
        let before_ack = (self.una, self.client_window);
        let Some(ack) = self.take_ack(segment, ack) else {
            return;
        };
        let mut delivered = false;
        // In SYN-RECEIVED and with a closed window smoltcp would not look at an ACK behind data.
        if self.state() == State::SynReceived {
            self.feed(TcpControl::None, ack, &[], cx);
            delivered = true;
        }
        if !segment.payload.is_empty() {
            delivered |= self.take_payload(start, end, segment.payload, ack, cx);
        }
        if segment.fin && self.fin_at.is_none() && end >= self.held as i64 {
            self.fin_at = Some(end as u64);
        } else if segment.fin {
            self.wants_ack = self.live;
        }
        if start < self.held as i64 && end <= self.held as i64 && !segment.fin {
            // A keep-alive, a window probe, or something that was held before: RFC 9293
            // section 3.10.7.4.
            self.wants_ack |= self.live;
        }
        if !delivered && (self.live || before_ack != (ack, self.client_window)) {
            self.feed(TcpControl::None, ack, &[], cx);
        }
        self.pump(cx);
        if self.live && (self.ahead.is_some() || self.disbelieved >= DISBELIEF) {
            self.give_up(cx);
        }
    }

    /// The client has bytes that this shadow cannot write, because it lacks those they answer: copies
    /// were lost on the way here. The client is told, instead of waiting for good.
    fn give_up(&mut self, cx: &mut Context<'_>) {
        cx.out.push(Outgoing {
            packet: self.reset_packet(),
            closes: true,
        });
        self.reset = true;
    }

    /// RFC 7323 section 4.3: only what does not lie behind a hole moves the echoed timestamp.
    fn take_timestamp(&mut self, segment: &Segment<'_>) {
        if let Some((tsval, _)) = segment.options.timestamp
            && !before(self.expected(), segment.seq)
            && !before(tsval, self.client_tsval)
        {
            self.client_tsval = tsval;
        }
    }

    /// The acknowledgement to deliver with this segment, or `None` if the segment is worthless.
    fn take_ack(&mut self, segment: &Segment<'_>, ack: u32) -> Option<u32> {
        let clamped = clamp_ack(ack, self.una, self.max());
        if clamped
            .ahead
            .is_some_and(|ahead| before(self.active_next, ahead))
        {
            // Neither written here nor seen of the active: a copy was lost or comes late, or the
            // segment is forged. Its bytes count, its acknowledgement does not (RFC 5961 section 5.2).
            self.claimed = Some(ack);
            self.disbelieved = self.disbelieved.saturating_add(1);
            self.wants_ack |= self.live;
            return Some(self.una);
        }
        if clamped.stale && self.state() == State::SynReceived {
            return None;
        }
        if !clamped.stale {
            self.disbelieved = 0;
            self.claimed = None;
            // RFC 9293 section 3.10.7.4: an older segment's window is not believed, unless it
            // reaches further: a window does not shrink (section 3.8.6), so it is not older.
            if before(self.una, ack)
                || !before(segment.seq, self.client_window_seq)
                || segment.window > self.client_window
            {
                self.client_window = segment.window;
                self.client_window_seq = later(self.client_window_seq, segment.seq);
            }
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
        if end <= taken || self.fin_taken {
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

    fn store(&mut self, start: u64, data: &[u8], cx: &mut Context<'_>) {
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
    fn feed_data(&mut self, data: &[u8], ack: u32, cx: &mut Context<'_>) -> usize {
        let mut window = distance(self.expected(), self.window_end).max(0) as usize;
        if window < data.len() {
            self.poke(cx);
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

    /// Hands one normalised segment to smoltcp, at the sequence number that it expects.
    fn feed(&mut self, control: TcpControl, ack: u32, payload: &[u8], cx: &mut Context<'_>) {
        self.feed_at(self.expected(), control, ack, payload, cx);
        if before(self.una, ack) {
            self.una = ack;
            self.forget_proof();
        }
    }

    fn feed_at(
        &mut self,
        seq: u32,
        control: TcpControl,
        ack: u32,
        payload: &[u8],
        cx: &mut Context<'_>,
    ) {
        let repr = TcpRepr {
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: Some(TcpSeqNumber(self.lockstep.to_shadow(ack) as i32)),
            window_len: self.client_window,
            timestamp: self
                .clock
                .map(|_| TcpTimestampRepr::new(self.client_tsval, 0)),
            payload,
            ..bare_repr(self.flow.client_port, self.flow.service_port, control)
        };
        cx.wire
            .load(Ipv4Addr::from(self.flow.client_addr), self.vip, &repr);
        self.iface
            .poll_ingress_single(instant(cx.now), cx.wire, &mut self.sockets);
        self.collect(cx);
    }

    /// Makes smoltcp state its window and acknowledgement: one byte that it has long acknowledged
    /// always gets an answer. It must be the shadow's own number: built on the client's, the byte
    /// would fall into a hole and be kept.
    fn poke(&mut self, cx: &mut Context<'_>) {
        let seq = self.expected().wrapping_sub(1);
        self.feed_at(seq, TcpControl::Psh, self.una, &[0], cx);
    }

    /// Takes what smoltcp sent: translated if the shadow is live, else only read.
    fn collect(&mut self, cx: &mut Context<'_>) {
        while let Some(packet) = cx.wire.take_output() {
            self.note_window(&packet);
            if self.live
                && let Some(outgoing) = self.translate(&packet, cx.now)
            {
                cx.out.push(outgoing);
            }
            cx.wire.recycle(packet);
        }
    }

    /// Reads acknowledgement and window off a packet of smoltcp's.
    fn note_window(&mut self, packet: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else {
            return;
        };
        let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else {
            return;
        };
        if tcp.ack() {
            self.window_end = tcp_edge(&tcp);
        }
    }

    /// Moves everything that can move: input to the handler, output to the send buffer, stored
    /// bytes and acknowledgements to smoltcp, until nothing does.
    fn pump(&mut self, cx: &mut Context<'_>) {
        loop {
            let mut moved = self.run_handler(cx);
            moved |= self.catch_up(cx);
            while let Some((start, data)) = self.reorder.pop_until(self.taken) {
                cx.room += data.len();
                let skip = (self.taken - start).min(data.len() as u64) as usize;
                let fresh = &data[skip..];
                if fresh.is_empty() {
                    continue;
                }
                let accepted = self.feed_data(fresh, self.una, cx);
                moved |= accepted > 0;
                if accepted < fresh.len() {
                    // There was room for these bytes a moment ago.
                    self.reorder
                        .insert(self.taken, &fresh[accepted..], usize::MAX);
                    break;
                }
            }
            if self.fin_at == Some(self.taken) && !self.fin_taken {
                self.feed(TcpControl::Fin, self.una, &[], cx);
                self.fin_taken = !matches!(
                    self.state(),
                    State::Established | State::SynReceived | State::FinWait1 | State::FinWait2
                );
                // smoltcp acknowledges by itself only once it has announced a window.
                self.wants_ack |= self.fin_taken && self.live;
                moved |= self.fin_taken;
            }
            if !moved {
                return;
            }
        }
    }

    /// Delivers what had to be cut off an acknowledgement, as far as the handler has come.
    fn catch_up(&mut self, cx: &mut Context<'_>) -> bool {
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

    /// Runs the handler until it neither takes nor writes. Returns whether it did.
    fn run_handler(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        loop {
            let socket = self.sockets.get_mut::<Socket<'static>>(self.socket);
            let queued = socket.recv_queue();
            let offered = socket.peek_slice(cx.scratch).unwrap_or(0);
            let input = &cx.scratch[..offered];
            let eof = self.fin_taken && offered == queued;
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
                        moved = true;
                    }
                    (progress.consumed, progress.produced)
                }
                _ => (offered, 0),
            };
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

    /// A segment from the active, overheard.
    pub fn process_active(&mut self, segment: &Segment<'_>, cx: &mut Context<'_>) {
        self.last_activity = cx.now;
        if distance(self.active_next, segment.seq).abs() > FAR {
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
        if let Some(claimed) = self.claimed
            && !before(self.active_next, claimed)
        {
            self.claimed = None;
            self.disbelieved = 0;
            self.ahead = Some(self.ahead.map_or(claimed, |known| later(known, claimed)));
            self.pump(cx);
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
        if self.closed_output && end > self.written as i64 {
            // The active sends bytes where the shadow's stream has ended.
            self.diverged = true;
        }
    }

    /// What the client acknowledged need not be compared any more.
    fn forget_proof(&mut self) {
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
            self.source = Source::Active { complete: true };
        }
        self.pump(cx);
    }

    // Live.

    /// Whether the flow can go on at takeover, else why not.
    pub fn fate(&self) -> Result<(), ResetReason> {
        if self.diverged {
            Err(ResetReason::Diverged)
        } else if self.inferred && self.written > 0 && self.taken == 0 {
            // The server speaks first: the "first" ACK may have been one of its later bytes.
            Err(ResetReason::Lagging)
        } else if matches!(self.source, Source::Active { complete: false }) && !self.is_pristine() {
            Err(ResetReason::Unpredictable)
        } else if self.lag() > 0 || self.lost_since.is_some() || self.ahead.is_some() {
            Err(ResetReason::Lagging)
        } else {
            Ok(())
        }
    }

    /// Nothing was sent to the client yet, so a handler may still start from the beginning.
    fn is_pristine(&self) -> bool {
        let first = self.handshake.active_isn.wrapping_add(1);
        self.una == first && self.active_next == first && self.ahead.is_none() && self.claimed.is_none()
    }

    /// The shadow speaks for the VIP from now on; [`Shadow::resume`] follows. Returns whether it has anything to say at once.
    pub fn go_live(&mut self) -> bool {
        self.live = true;
        if matches!(self.source, Source::Active { complete: false }) {
            self.source = Source::Handler(self.kind.stream());
        }
        self.proof = VecDeque::new();
        self.proof_start = self.written;
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
        let starts = !self.closed_output && self.is_pristine();
        unacknowledged || owed || starts
    }

    /// Goes on where the standby stopped: whatever can move without a new segment.
    pub fn resume(&mut self, cx: &mut Context<'_>) {
        self.pump(cx);
    }

    /// Collects everything that the live shadow has to send now.
    pub fn dispatch(&mut self, cx: &mut Context<'_>) {
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

    /// When `dispatch` is due without a frame before, ns; `None` if never.
    pub fn next_wakeup(&mut self, now: Nanos) -> Option<Nanos> {
        let at = self.iface.poll_at(instant(now), &self.sockets)?;
        Some((at.total_micros().max(0) as u64) * 1000)
    }

    /// A packet of the shadow's, as the active would have sent it.
    fn translate(&self, packet: &[u8], now: Nanos) -> Option<Outgoing> {
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
        let (from, to) = (
            IpAddress::Ipv4(ip.src_addr()),
            IpAddress::Ipv4(ip.dst_addr()),
        );
        let mut repr = TcpRepr::parse(&tcp, &from, &to, &ChecksumCapabilities::ignored()).ok()?;
        repr.seq_number = TcpSeqNumber(self.lockstep.to_wire(repr.seq_number.0 as u32) as i32);
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

    /// The window to announce, bytes: up to smoltcp's own edge, but never less than what the active
    /// had promised, because a window must not shrink (RFC 9293 section 3.8.6) and [`Reorder`] takes
    /// what smoltcp cannot.
    fn open_window(&self, own_edge: u32) -> u32 {
        let edge = later(own_edge, self.active_edge);
        distance(self.held_next(), edge).clamp(0, REORDER_LIMIT as i32) as u32
    }

    fn sack_ranges(&self) -> [Option<(u32, u32)>; 3] {
        let first = self.handshake.client_isn.wrapping_add(1);
        self.reorder.ranges_behind(self.held).map(|range| {
            range.map(|(l, r)| (first.wrapping_add(l as u32), first.wrapping_add(r as u32)))
        })
    }

    /// A reset that the client accepts: at the number that it expects next, as far as is known.
    pub fn reset_packet(&self) -> Vec<u8> {
        let seq = self.ahead.or(self.claimed).unwrap_or(self.una);
        reset_packet(self.flow, self.vip, seq, Some(self.held_next()))
    }
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

/// The right edge of the window that a segment of smoltcp's announces; its shift is 0.
fn tcp_edge(tcp: &TcpPacket<&[u8]>) -> u32 {
    (tcp.ack_number().0 as u32).wrapping_add(u32::from(tcp.window_len()))
}

/// Whether `deque[at..]` starts with `bytes`.
fn equals(deque: &VecDeque<u8>, at: usize, bytes: &[u8]) -> bool {
    let (front, back) = deque.as_slices();
    let split = front.len().saturating_sub(at).min(bytes.len());
    let back_at = (at + split).saturating_sub(front.len());
    front.get(at..at + split).unwrap_or(&[]) == &bytes[..split]
        && back.get(back_at..back_at + bytes.len() - split) == Some(&bytes[split..])
}
