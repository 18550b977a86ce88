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
//! Read `client.rs` (what the client sent), `active.rs` (what the active sent), `live.rs` (what a live
//! shadow says), `adoption.rs` (when it becomes a kernel socket), `restored.rs` (one that begins in the
//! middle); here is what they share: the numbers, and the edge to smoltcp.
//!
//! While standby only smoltcp's ingress runs, never its egress or timers: nothing counts as sent,
//! so nothing backs off, and the first thing after a takeover is everything unacknowledged.
//!
//! smoltcp sees in-order bytes only. Holes and bytes beyond its window wait in [`Reorder`], which is
//! larger than any window that the active's kernel can have announced; the SACK blocks of a live
//! shadow are made from it.

mod active;
mod adoption;
mod client;
mod confirm;
mod live;
mod memory;
mod restored;

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use rfsis_common::maps::FlowKey;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{CongestionControl, Socket, SocketBuffer, State};
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpCidr, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    TcpTimestampRepr,
};

use crate::fault::faulty;
use crate::handler::{HandlerKind, Output, StreamHandler};
use crate::heartbeat::Nanos;
use crate::lockstep::{Lockstep, TimestampClock, before, distance, window_field};
use crate::metrics::FlowCondition;
use crate::pledge::Pledge;
use crate::reorder::Reorder;
use crate::segment::Options;
use crate::sync::Open;
use crate::tail::TailProbe;
use crate::wire::{Wire, bare_repr, instant};
use memory::Lent;

pub use adoption::{Readiness, Shell};
pub use live::{probe_packet, reset_packet};

/// Receive and send buffer of a shadow, bytes. One byte short of 64 KiB, so that smoltcp's own
/// window shift is 0. The pages are touched only when used.
pub const BUFFER: usize = 65_535;

/// Bytes that one flow may hold in [`Reorder`]: more than the bounded kernel sockets of the active
/// can hold (receive and send buffer, doubled by the kernel, and the handler's own two).
pub const REORDER_LIMIT: usize = 2 << 20;

/// A segment that lies so many bytes from what is expected belongs to another life of the flow.
pub const FAR: i32 = 16 << 20;

/// So many bytes may the client of a guarded flow have got that the shadow has not written: those of a second
/// at 8 Gbit/s.
const FAR_AHEAD: i32 = 1 << 30;

/// Whether two sequence numbers cannot belong to the same life of a flow.
fn is_far(a: u32, b: u32) -> bool {
    distance(a, b).unsigned_abs() > FAR as u32
}

/// A client that has lost packets fills the hole within some retransmission timeouts, ns.
const HOLE_PATIENCE: Nanos = 8_000_000_000;

/// The client of a guarded flow repeats what is missing, however far it has backed off by then, ns.
const GUARDED_PATIENCE: Nanos = 60_000_000_000;

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
    /// When the SYN-ACK was seen, ns.
    pub answered_at: Nanos,
    /// The active's ACK gate guards the flow: the client is told of no byte that this shadow lacks.
    pub guarded: bool,
}

impl Handshake {
    /// As the nodes tell each other of it.
    pub fn open(&self, flow: FlowKey) -> Open {
        Open {
            flow,
            client_isn: self.client_isn,
            active_isn: self.active_isn,
            client_window: self.client_window,
            client: self.client,
            active: self.active,
        }
    }

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
    /// The active copies no acknowledgement of what it did not send.
    pub acks_are_true: bool,
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
    /// Of the socket, which must go first: fields are dropped in this order.
    memory: Lent,
    kind: HandlerKind,
    source: Source,
    /// The late join that it came by.
    joined: Option<u32>,

    // What the client sent. Offsets count bytes of its stream.
    taken: u64,
    held: u64,
    fin_at: Option<u64>,
    fin_taken: bool,
    reorder: Reorder,
    /// smoltcp takes bytes up to this sequence number: what its last segment announced.
    window_end: u32,
    /// The client takes bytes up to this sequence number, in wire units.
    client_edge: u32,
    client_tsval: u32,

    // What the shadow wrote. `una` is in wire units.
    una: u32,
    written: u64,
    closed_output: bool,
    /// The client closed first, so there is no TIME-WAIT here (RFC 9293 section 3.6).
    closed_second: bool,
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
    /// Behind the last sequence number that this shadow sent.
    sent_next: u32,
    active_edge: u32,
    active_window: u32,
    clock: Option<TimestampClock>,
    diverged: bool,
    /// The numbers are inferred, and no byte of the active's has confirmed them yet.
    inferred: bool,
    lost_since: Option<Nanos>,

    tail: TailProbe,
    /// Behind what the client has said to have sent, by segments without data.
    client_next: u32,
    /// A hole before which nothing moved: bytes held, and since when.
    hole: Option<(u64, Nanos)>,
    /// An acknowledgement of what the handler has not written, and since when.
    ahead_since: Option<Nanos>,
    /// The client was heard since the last confirmation.
    touched: bool,
    /// What this node's programs may confirm of it by themselves.
    pledge: Option<Pledge>,
    /// What it has sent again since then, though all of that is held.
    repeated: Option<(u32, u32)>,
    exposed: bool,
    live: bool,
    /// When it went live, ns.
    live_since: Nanos,
    /// The client has said what it has got since all that the active had sent must have arrived.
    exact: bool,
    /// The handler rests until everything is acknowledged.
    resting: bool,
    gave_up: bool,
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

fn new_socket([receive, send]: [SocketBuffer<'static>; 2]) -> Socket<'static> {
    let mut socket = Socket::new(receive, send);
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
    let mut socket = new_socket([(); 2].map(|()| SocketBuffer::new(vec![0; BUFFER])));
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
        let mut memory = Lent::take();
        // SAFETY: the socket stays in `sockets`, which a shadow and its shell drop before `memory`.
        let mut socket = new_socket(unsafe { memory.buffers() });
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
            memory,
            kind,
            source,
            joined: None,
            taken: 0,
            held: 0,
            fin_at: None,
            fin_taken: false,
            reorder: Reorder::default(),
            window_end: first,
            client_edge: handshake
                .active_isn
                .wrapping_add(1)
                .wrapping_add(u32::from(handshake.client_window)),
            client_tsval,
            una: handshake.active_isn.wrapping_add(1),
            written: 0,
            closed_output: false,
            closed_second: false,
            ahead: None,
            claimed: None,
            disbelieved: 0,
            proof: VecDeque::new(),
            proof_start: 0,
            active_ack: first,
            active_next: handshake.active_isn.wrapping_add(1),
            sent_next: handshake.active_isn.wrapping_add(1),
            // No kernel opens with a small window, and none with one that is larger: in a SYN-ACK it is not scaled.
            active_edge: first.wrapping_add(BUFFER as u32),
            active_window: BUFFER as u32,
            clock: handshake
                .active
                .timestamp
                .filter(|_| handshake.timestamps())
                .map(|(tsval, _)| TimestampClock::new(tsval, handshake.answered_at)),
            diverged: false,
            inferred: handshake.inferred,
            lost_since: None,
            tail: TailProbe::default(),
            client_next: handshake.client_isn.wrapping_add(1),
            hole: None,
            ahead_since: None,
            touched: false,
            pledge: None,
            repeated: None,
            exposed: false,
            live: false,
            live_since: 0,
            exact: false,
            resting: false,
            gave_up: false,
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
        self.reset
            || self.state() == State::Closed
            || (self.closed_second && self.state() == State::TimeWait)
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
        if self.live && self.state() != State::SynReceived {
            FlowCondition::Live
        } else if self.diverged {
            FlowCondition::Diverged
        } else if (!self.live && (self.lag() > 0 || self.has_lost())) || self.is_guessed() {
            FlowCondition::Lagging
        } else if self.lacks_answer() {
            FlowCondition::Unprotected
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

    /// The active may have opened its gate, unheard: the client may have been told of bytes that this
    /// shadow lacks, and never repeat them.
    pub fn expose(&mut self) {
        self.exposed = true;
        self.pledge = None;
    }

    /// The client may have been told of bytes that this shadow lacks.
    fn is_doubtful(&self) -> bool {
        self.exposed || !self.handshake.guarded
    }

    /// The client has sent bytes that are not held here, of which it was perhaps told that they are: then it
    /// waits for an answer, and repeats nothing.
    fn is_behind(&self) -> bool {
        self.is_doubtful() && before(self.held_next(), self.client_next)
    }

    /// How long the client of a live flow may take to repeat what is missing, ns.
    fn hole_patience(&self) -> Nanos {
        if self.is_doubtful() {
            HOLE_PATIENCE
        } else {
            GUARDED_PATIENCE
        }
    }

    /// Whether a copy is missing that nobody will send again: what the client was not told of it
    /// repeats.
    fn has_lost(&self) -> bool {
        self.lost_since.is_some() && !self.handshake.guarded
    }

    /// The active's ACK gate guards this flow from its first byte on.
    pub fn guard(&mut self) {
        self.handshake.guarded = true;
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
    pub(crate) fn held_next(&self) -> u32 {
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

    /// Whether either side has reset the connection: then nothing of it is left to be answered.
    pub fn was_reset(&self) -> bool {
        self.reset
    }

    /// Whether this shadow has just told its client that it lacks bytes.
    pub fn has_given_up(&self) -> bool {
        self.gave_up
    }

    /// Window shift of the client.
    fn client_shift(&self) -> u8 {
        self.handshake.shifts().map_or(0, |(client, _)| client)
    }

    /// Hands one normalised segment to smoltcp, at the sequence number that it expects.
    fn feed(&mut self, control: TcpControl, ack: u32, payload: &[u8], cx: &mut Context<'_>) {
        self.feed_at(self.expected(), control, ack, payload, cx);
        if before(self.una, ack) {
            self.una = ack;
            self.tail.acknowledged(ack, cx.now);
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
            window_len: window_field(
                distance(ack, self.client_edge).max(0) as u32,
                self.client_shift(),
            ),
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
        let seq = self.expected().wrapping_sub((!faulty!(PokeAhead)).into());
        self.feed_at(seq, TcpControl::Psh, self.una, &[0], cx);
    }

    /// Makes smoltcp open its window as far as it can. What it says goes to the client with what is
    /// held after the segment under way, not before.
    fn ask_window(&mut self, cx: &mut Context<'_>) {
        let live = std::mem::take(&mut self.live);
        self.poke(cx);
        self.live = live;
        self.wants_ack |= live;
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
}

/// The right edge of the window that a segment of smoltcp's announces; its shift is 0.
fn tcp_edge(tcp: &TcpPacket<&[u8]>) -> u32 {
    (tcp.ack_number().0 as u32).wrapping_add(u32::from(tcp.window_len()))
}
