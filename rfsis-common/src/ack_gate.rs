//! The ACK gate: a client never gets an acknowledgement for a byte that the standby does not hold.
//!
//! Pure functions over three values of a flow: what the standby confirmed ([`Confirmation`], written by
//! the agent), what the kernel sent and what of that the client was told ([`Sent`], written by the gate),
//! and the segment at hand. Nothing else decides, in the kernel, in the agent and in the tests.
//!
//! - A pure ACK ahead of the confirmation is **held**: dropped, its values kept in [`Sent`]. Lowered
//!   instead it would be a duplicate that makes the client retransmit.
//! - Segments with data or FIN, and window probes, are **lowered**: they must get through.
//! - The window's right edge is the nearer of the kernel's and the standby's. The *field* is computed
//!   anew from it, so that an edge never shrinks because the ACK was lowered. A scaled field counts in
//!   units: the edge is rounded **down**, so it falls short by less than one unit (`1 << shift` bytes)
//!   and may seem to shrink by as much from one segment to the next, which RFC 7323 section 2.4 expects.
//! - What was held or lowered is **released** by the confirmation: a pure ACK made of [`Sent`]'s latest
//!   values. Nothing needs a flag: something is pending exactly while more could be told than was.
//! - What the client was told while the gate was open stays told, though it be more than is confirmed:
//!   to say it again adds nothing, to say less would be an old ACK or a shrunk window.

use crate::frame::{TcpPart, tcp_flags};
use crate::maps::{FlowKey, u32_at, u64_at};
use crate::options::TcpOptions;

/// `skb->mark` of what the agent sends to release a flow: the gate lets it pass as it is.
pub const RELEASE_MARK: u32 = 0x5246_5349;

/// What the standby holds of a flow, and up to where it can take more.
///
/// One word, so that a program never sees half of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Confirmation(u64);

impl Confirmation {
    /// The gate passes all of the flow and goes on noting it: the standby is not to be waited for. As a
    /// confirmation it would leave no room, so none is lost.
    pub const OPEN: Confirmation = Confirmation(u64::MAX);

    /// Whether it is [`Confirmation::OPEN`].
    #[inline(always)]
    pub const fn is_open(self) -> bool {
        self.0 == u64::MAX
    }

    /// The standby holds every byte before `ack`, and takes bytes before `edge`.
    #[inline(always)]
    pub const fn new(ack: u32, edge: u32) -> Self {
        Self((ack as u64) << 32 | edge as u64)
    }

    /// Everything before this sequence number is held; a FIN counts one.
    #[inline(always)]
    pub const fn ack(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Bytes from this sequence number on cannot be taken.
    #[inline(always)]
    pub const fn edge(self) -> u32 {
        self.0 as u32
    }

    /// The word as it stands in the map.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// From the map.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// What both say together. One that is all zeros says nothing, and to one that is open none adds anything.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, other: Confirmation) -> Confirmation {
        if self.is_open() || other.0 == 0 {
            return self;
        }
        if self.0 == 0 {
            return other;
        }
        Confirmation::new(
            later(self.ack(), other.ack()),
            later(self.edge(), other.edge()),
        )
    }
}

/// Value of map `GUARDED`: a flow that the standby knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Guarded {
    /// Index into `CONFIRMED` and `SENT`.
    pub slot: u32,
    /// Initial sequence number of the client: tells this connection from another of the same ports.
    pub client_isn: u32,
    /// Window shift that the active announced; 0 without scaling.
    pub shift: u32,
}

impl Guarded {
    /// Whether a SYN-ACK that acknowledges `ack` opens this connection, and not a later one of the same
    /// addresses and ports.
    #[inline(always)]
    pub const fn is_opened_by(&self, ack: u32) -> bool {
        self.client_isn.wrapping_add(1) == ack
    }
}

/// Value of map `SENT`: what the kernel sent of a flow, and what the client was told.
///
/// The agent writes it once, before the flow is published; from then on the gate alone does. Segments of
/// the kernel come one at a time, by its lock on the socket; `version` is odd while one is being noted.
/// A released ACK may pass on another CPU meanwhile: it writes `told` and `told_edge` only. One of two
/// values told at once may be lost that way, and is told again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Sent {
    /// When the last segment left or was held, `bpf_ktime_get_ns`.
    pub at_ns: u64,
    /// Counts writes, two each.
    pub version: u32,
    /// Behind the last sequence number that the kernel sent.
    pub next: u32,
    /// The furthest acknowledgement that the kernel wanted to send.
    pub ack: u32,
    /// The right edge of the window that the kernel offered last.
    pub edge: u32,
    /// The furthest acknowledgement that left.
    pub told: u32,
    /// The furthest right edge that left.
    pub told_edge: u32,
    /// Timestamp value of the latest segment, 0 without timestamps.
    pub tsval: u32,
    /// Timestamp echo of the latest segment, 0 without timestamps.
    pub tsecr: u32,
    /// `sent_flags`.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// Bits of [`Sent::flags`].
pub mod sent_flags {
    /// Segments carry timestamps.
    pub const TIMESTAMPS: u32 = 1;
    /// The kernel sent a FIN.
    pub const FIN_SENT: u32 = 2;
    /// The kernel sent an RST.
    pub const RST_SENT: u32 = 4;
    /// The latest segment echoed congestion (RFC 3168 section 6.1.3): it is told until the client reacts.
    pub const ECE: u32 = 8;
}

impl Sent {
    /// Of a flow whose SYN-ACK is about to leave. Its version is even: nobody is writing.
    ///
    /// `window` is that of the SYN-ACK, bytes: never scaled (RFC 7323 section 2.2).
    pub const fn new(client_isn: u32, active_isn: u32, window: u16) -> Self {
        let first = client_isn.wrapping_add(1);
        let edge = first.wrapping_add(window as u32);
        Self {
            at_ns: 0,
            version: 0,
            next: active_isn.wrapping_add(1),
            ack: first,
            edge,
            told: first,
            told_edge: edge,
            tsval: 0,
            tsecr: 0,
            flags: 0,
            reserved: 0,
        }
    }

    /// Of a flow that is established: the kernel begins with these numbers, and has told the client as much
    /// before. `timestamp`: its clock and the client's, if segments carry them.
    pub const fn established(
        next: u32,
        ack: u32,
        edge: u32,
        timestamp: Option<(u32, u32)>,
    ) -> Self {
        let (tsval, tsecr, flags) = match timestamp {
            Some((tsval, tsecr)) => (tsval, tsecr, sent_flags::TIMESTAMPS),
            None => (0, 0, 0),
        };
        Self {
            at_ns: 0,
            version: 0,
            next,
            ack,
            edge,
            told: ack,
            told_edge: edge,
            tsval,
            tsecr,
            flags,
            reserved: 0,
        }
    }

    /// A confirmation of all that the kernel wanted to say.
    pub const fn everything(&self) -> Confirmation {
        Confirmation::new(self.ack, self.edge)
    }

    /// The same, of this time: without one the flow would seem to have been silent since the machine
    /// started. `at_ns` by the clock of `bpf_ktime_get_ns`.
    #[must_use]
    pub const fn at(self, at_ns: u64) -> Self {
        Self { at_ns, ..self }
    }
}

/// What the gate reads of a segment that the kernel sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outgoing {
    /// TCP flags, low byte.
    pub flags: u8,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Window field, unscaled.
    pub window: u16,
    /// Bytes of data; of a super-frame, all of them.
    pub payload: u32,
    /// There is a timestamp option.
    pub has_timestamp: bool,
    /// Its value.
    pub tsval: u32,
    /// Its echo.
    pub tsecr: u32,
}

impl Outgoing {
    /// From the headers.
    #[inline(always)]
    pub const fn new(tcp: &TcpPart, options: &TcpOptions) -> Self {
        Self {
            flags: tcp.flags,
            seq: tcp.seq,
            ack: tcp.ack,
            window: tcp.window,
            payload: tcp.payload,
            has_timestamp: options.has_timestamp,
            tsval: options.tsval,
            tsecr: options.tsecr,
        }
    }

    #[inline(always)]
    const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Behind its last sequence number.
    #[inline(always)]
    const fn end(&self) -> u32 {
        let bounds = self.has(tcp_flags::SYN) as u32 + self.has(tcp_flags::FIN) as u32;
        self.seq.wrapping_add(self.payload).wrapping_add(bounds)
    }

    /// Right edge of the window that it offers; that of a SYN is not scaled (RFC 7323 section 2.2).
    #[inline(always)]
    const fn edge(&self, shift: u32) -> u32 {
        let shift = if self.has(tcp_flags::SYN) { 0 } else { shift };
        edge_of(self.ack, self.window, shift)
    }

    /// More than a pure ACK: data, FIN or RST, or a window probe or keep-alive, which wants an answer.
    /// The latter are sent from before the next sequence number (`tcp_xmit_probe_skb`,
    /// net/ipv4/tcp_output.c).
    #[inline(always)]
    const fn must_leave(&self, sent: &Sent) -> bool {
        self.payload != 0
            || self.has(tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST)
            || after(sent.next, self.seq)
    }
}

/// What became of a packet from a service's port, `protect: sync`; index into `ACK_GATE_COUNTERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum AckGateVerdict {
    /// Left with its own ACK.
    Passed = 0,
    /// Left with an ACK lowered to the confirmation.
    Lowered = 1,
    /// A pure ACK ahead of the confirmation: dropped, to be released.
    Held = 2,
    /// A released ACK of the agent's: left as it was.
    Released = 3,
    /// A SYN-ACK of a flow that the standby does not know: dropped and reported, to be sent again by the
    /// agent.
    Opening = 4,
    /// Of a flow that the standby does not know: left as it was.
    Unguarded = 5,
    /// The gate is open because the standby is silent: left as it was.
    Open = 6,
    /// A SYN or SYN-ACK that found the ring `OPENINGS` full. The SYN-ACK is dropped; the kernel sends
    /// another.
    OpeningLost = 7,
    /// No packet of the kernel's: an answer of the standby's kernel, upon which a SYN-ACK leaves that was held.
    Agreed = 8,
}

impl AckGateVerdict {
    /// All, in the order of their numbers.
    pub const ALL: [AckGateVerdict; 9] = [
        AckGateVerdict::Passed,
        AckGateVerdict::Lowered,
        AckGateVerdict::Held,
        AckGateVerdict::Released,
        AckGateVerdict::Opening,
        AckGateVerdict::Unguarded,
        AckGateVerdict::Open,
        AckGateVerdict::OpeningLost,
        AckGateVerdict::Agreed,
    ];

    /// Value of the metrics label `verdict`.
    pub const fn as_str(self) -> &'static str {
        match self {
            AckGateVerdict::Passed => "passed",
            AckGateVerdict::Lowered => "lowered",
            AckGateVerdict::Held => "held",
            AckGateVerdict::Released => "released",
            AckGateVerdict::Opening => "opening",
            AckGateVerdict::Unguarded => "unguarded",
            AckGateVerdict::Open => "open",
            AckGateVerdict::OpeningLost => "opening_lost",
            AckGateVerdict::Agreed => "agreed",
        }
    }
}

/// What becomes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AckVerdict {
    /// It leaves with its own ACK; the window may be another.
    Passed = 0,
    /// It leaves with an ACK lowered to the confirmation.
    Lowered = 1,
    /// A pure ACK ahead of the confirmation: dropped, to be released.
    Held = 2,
}

/// What the gate is to do with a segment. Flat, for the verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckDecision {
    /// What becomes of it.
    pub verdict: AckVerdict,
    /// The ACK field it leaves with.
    pub ack: u32,
    /// The window field it leaves with.
    pub window: u16,
}

/// The pure ACK that tells a client what it may know now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Window field, unscaled.
    pub window: u16,
    /// Timestamp value and echo, if the flow has timestamps.
    pub timestamp: Option<(u32, u32)>,
    /// It is to carry ECE, as the kernel's latest did.
    pub ece: bool,
}

/// Whether sequence number `a` is after `b` (RFC 9293 section 3.4).
#[inline(always)]
pub const fn after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

#[inline(always)]
const fn later(a: u32, b: u32) -> u32 {
    if after(a, b) { a } else { b }
}

#[inline(always)]
const fn earlier(a: u32, b: u32) -> u32 {
    if after(a, b) { b } else { a }
}

impl Release {
    const fn new(sent: &Sent, ack: u32, window: u16) -> Self {
        let has_timestamps = sent.flags & sent_flags::TIMESTAMPS != 0;
        Self {
            seq: sent.next,
            ack,
            window,
            timestamp: if has_timestamps {
                Some((sent.tsval, sent.tsecr))
            } else {
                None
            },
            ece: sent.flags & sent_flags::ECE != 0,
        }
    }

    /// What the client was told last, once more: to carry SACK blocks (RFC 5681 section 4.2).
    pub const fn again(sent: &Sent, shift: u32) -> Self {
        let window = window_up_to(sent.told, sent.told_edge, shift);
        Self::new(sent, sent.told, window)
    }
}

/// The greatest shift (RFC 7323 section 2.3).
const SHIFT_MAX: u32 = 14;

#[inline(always)]
const fn bounded(shift: u32) -> u32 {
    if shift > SHIFT_MAX { SHIFT_MAX } else { shift }
}

/// The right edge that a window field promises.
#[inline(always)]
const fn edge_of(ack: u32, window: u16, shift: u32) -> u32 {
    ack.wrapping_add((window as u32) << bounded(shift))
}

/// The window field that promises as much as it can up to `edge`, and nothing beyond.
#[inline(always)]
const fn window_up_to(ack: u32, edge: u32, shift: u32) -> u16 {
    if !after(edge, ack) {
        return 0;
    }
    let units = edge.wrapping_sub(ack) >> bounded(shift);
    if units > u16::MAX as u32 {
        u16::MAX
    } else {
        units as u16
    }
}

/// The furthest acknowledgement and right edge that the client may know: what is confirmed, and what it
/// was told before.
#[inline(always)]
const fn limits(sent: &Sent, confirmation: Confirmation) -> (u32, u32) {
    (
        later(confirmation.ack(), sent.told),
        later(confirmation.edge(), sent.told_edge),
    )
}

/// Notes that the kernel sent a segment, whatever becomes of it. `at_ns` and `version` are the caller's.
#[inline(always)]
const fn note_sent(segment: &Outgoing, sent: &mut Sent, shift: u32) {
    if segment.has(tcp_flags::RST) {
        sent.flags |= sent_flags::RST_SENT;
    }
    // An RST without ACK answers a stray segment, by that segment's numbers.
    if !segment.has(tcp_flags::ACK) {
        return;
    }
    sent.next = later(segment.end(), sent.next);
    sent.ack = later(segment.ack, sent.ack);
    sent.edge = segment.edge(shift);
    if segment.has_timestamp {
        sent.flags |= sent_flags::TIMESTAMPS;
        sent.tsval = segment.tsval;
        sent.tsecr = segment.tsecr;
    }
    if segment.has(tcp_flags::FIN) {
        sent.flags |= sent_flags::FIN_SENT;
    }
    if segment.has(tcp_flags::ECE) {
        sent.flags |= sent_flags::ECE;
    } else {
        sent.flags &= !sent_flags::ECE;
    }
}

/// Decides about a segment that the kernel sends on a guarded flow, SYN-ACKs excepted, while the gate
/// guards. Notes it in `sent`, told values included: undo those if it cannot leave after all.
#[inline(always)]
pub const fn ack_decide(
    segment: &Outgoing,
    sent: &mut Sent,
    confirmation: Confirmation,
    shift: u32,
) -> AckDecision {
    if segment.has(tcp_flags::RST)
        && sent.flags & sent_flags::FIN_SENT != 0
        && after(sent.ack, sent.told)
        && !confirmation.is_open()
    {
        // The kernel has closed the connection and forgotten it: its RST answers what the client repeats
        // because it was not told yet that it arrived. The release will tell it.
        return AckDecision {
            verdict: AckVerdict::Held,
            ack: segment.ack,
            window: segment.window,
        };
    }
    let must_leave = segment.must_leave(sent);
    note_sent(segment, sent, shift);
    let mut decision = AckDecision {
        verdict: AckVerdict::Passed,
        ack: segment.ack,
        window: segment.window,
    };
    if confirmation.is_open() {
        note_release(segment, sent, shift);
        return decision;
    }
    if !segment.has(tcp_flags::ACK) {
        return decision;
    }
    let (most_ack, most_edge) = limits(sent, confirmation);
    if after(segment.ack, most_ack) {
        if !must_leave {
            decision.verdict = AckVerdict::Held;
            return decision;
        }
        decision.verdict = AckVerdict::Lowered;
        decision.ack = most_ack;
    }
    let edge = earlier(segment.edge(shift), most_edge);
    decision.window = window_up_to(decision.ack, edge, shift);
    tell(sent, decision.ack, decision.window, shift);
    decision
}

/// Notes a segment that the kernel sends on a guarded flow while the gate is open: all of it is told.
#[inline(always)]
pub const fn note_open(segment: &Outgoing, sent: &mut Sent, shift: u32) {
    note_sent(segment, sent, shift);
    note_release(segment, sent, shift);
}

/// Notes what a released ACK tells: `told` and `told_edge`, nothing else.
#[inline(always)]
pub const fn note_release(segment: &Outgoing, sent: &mut Sent, shift: u32) {
    if segment.has(tcp_flags::ACK) {
        let shift = if segment.has(tcp_flags::SYN) {
            0
        } else {
            shift
        };
        tell(sent, segment.ack, segment.window, shift);
    }
}

#[inline(always)]
const fn tell(sent: &mut Sent, ack: u32, window: u16, shift: u32) {
    sent.told = later(ack, sent.told);
    sent.told_edge = later(edge_of(ack, window, shift), sent.told_edge);
}

/// The pure ACK that is pending, if there is one: the client may know more than it was told. With
/// [`Sent::everything`] for a confirmation, all that the kernel wanted to say.
pub const fn release(sent: &Sent, confirmation: Confirmation, shift: u32) -> Option<Release> {
    if sent.flags & sent_flags::RST_SENT != 0 {
        return None;
    }
    let (most_ack, most_edge) = limits(sent, confirmation);
    let ack = earlier(later(sent.ack, sent.told), most_ack);
    let window = window_up_to(ack, earlier(sent.edge, most_edge), shift);
    if !after(ack, sent.told) && !after(edge_of(ack, window, shift), sent.told_edge) {
        return None;
    }
    Some(Release::new(sent, ack, window))
}

/// Decides about a SYN-ACK; `guarded` is what is known of its addresses and ports.
#[inline(always)]
pub const fn syn_ack_decide(ack: u32, guarded: Option<Guarded>, guarding: bool) -> AckGateVerdict {
    match guarded {
        Some(guarded) if guarded.is_opened_by(ack) => AckGateVerdict::Passed,
        _ if guarding => AckGateVerdict::Opening,
        _ => AckGateVerdict::Open,
    }
}

/// Whether a segment that came in opens a connection (RFC 9293 section 3.5).
#[inline(always)]
pub const fn is_opening(tcp: &TcpPart) -> bool {
    const BITS: u8 = tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST;
    tcp.flags & BITS == tcp_flags::SYN
}

/// Most bytes of headers that an [`OpeningEvent`] holds: IPv4 and TCP with all options.
pub const OPENING_CAPTURE: usize = 120;

/// What an [`OpeningEvent`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OpeningKind {
    /// A SYN that came in.
    Syn = 0,
    /// A SYN-ACK that waits for the standby: dropped, to be sent by the agent.
    Held = 1,
    /// A SYN-ACK that left, because the gate is open.
    Passed = 2,
    /// As `Held`; the program lets it go when the standby's answers it ([`crate::agree`]).
    Kept = 3,
    /// It has done so.
    Agreed = 4,
}

impl OpeningKind {
    /// The kind with this number, if there is one.
    pub const fn from_u32(number: u32) -> Option<Self> {
        match number {
            0 => Some(OpeningKind::Syn),
            1 => Some(OpeningKind::Held),
            2 => Some(OpeningKind::Passed),
            3 => Some(OpeningKind::Kept),
            4 => Some(OpeningKind::Agreed),
            _ => None,
        }
    }
}

/// How the program guards a flow on which the kernels have agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Agreed {
    /// The slot that it has taken.
    pub slot: u32,
    /// Initial sequence number of the client.
    pub client_isn: u32,
    /// Window shift of the active.
    pub shift: u32,
    /// 1; 0 where there was no room in `GUARDED`.
    pub guarded: u32,
}

/// An entry of the ring `OPENINGS`: a SYN that came in, or a SYN-ACK, or what became of one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct OpeningEvent {
    /// When, `bpf_ktime_get_ns`.
    pub at_ns: u64,
    /// The flow.
    pub flow: FlowKey,
    /// Valid bytes of `packet`.
    pub len: u32,
    /// [`OpeningKind`] as a number.
    pub kind: u32,
    /// IPv4 and TCP headers; of [`OpeningKind::Agreed`] an [`Agreed`].
    pub packet: [u8; OPENING_CAPTURE],
}

impl OpeningEvent {
    /// Reads an entry of the ring; `None` for one that is shorter than it says.
    pub fn parse(entry: &[u8]) -> Option<OpeningEvent> {
        let (header, rest) = entry.split_at_checked(24)?;
        let event = OpeningEvent {
            at_ns: u64_at(header, 0)?,
            flow: FlowKey::read(header, 8)?,
            len: u32_at(header, 16)?,
            kind: u32_at(header, 20)?,
            packet: *rest.first_chunk()?,
        };
        (event.len as usize <= OPENING_CAPTURE).then_some(event)
    }

    /// What an event of kind [`OpeningKind::Agreed`] says.
    pub fn agreed(&self) -> Option<Agreed> {
        let packet = self.packet();
        Some(Agreed {
            slot: u32_at(packet, 0)?,
            client_isn: u32_at(packet, 4)?,
            shift: u32_at(packet, 8)?,
            guarded: u32_at(packet, 12)?,
        })
    }

    /// The valid bytes of the packet, from its IPv4 header on.
    pub fn packet(&self) -> &[u8] {
        self.packet.get(..self.len as usize).unwrap_or(&self.packet)
    }
}

#[cfg(feature = "user")]
mod pod {
    use super::{Confirmation, Guarded, Sent};

    // SAFETY: one integer: every bit pattern is valid.
    unsafe impl aya::Pod for Confirmation {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Guarded {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Sent {}
}
