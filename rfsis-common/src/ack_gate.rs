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
//!   anew from it, so that an edge never shrinks because the ACK was lowered.
//! - What was held or lowered is **released** by the confirmation: a pure ACK made of [`Sent`]'s latest
//!   values. Nothing needs a flag: something is pending exactly while more could be told than was.

use crate::maps::FlowKey;

/// `skb->mark` of what the agent sends to release a flow: the gate lets it pass as it is.
pub const RELEASE_MARK: u32 = 0x5246_5349;

/// What the standby holds of a flow, and up to where it can take more.
///
/// One word, so that a program never sees half of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Confirmation(u64);

impl Confirmation {
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

/// Value of map `SENT`: what the kernel sent of a flow, and what the client was told.
///
/// The agent writes it once, before the flow is published; from then on the gate alone does. `version`
/// is odd while it is being written.
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
    /// The furthest right edge of the window that the kernel offered.
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
}

impl Sent {
    /// Of a flow whose SYN-ACK is about to leave.
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
}

/// Most bytes of headers that an [`OpeningEvent`] holds: IPv4 and TCP with all options.
pub const OPENING_CAPTURE: usize = 120;

/// An entry of the ring `OPENINGS`: a SYN that came in, or a SYN-ACK that the gate holds.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct OpeningEvent {
    /// When, `bpf_ktime_get_ns`.
    pub at_ns: u64,
    /// The flow.
    pub flow: FlowKey,
    /// Valid bytes of `packet`.
    pub len: u32,
    /// [`crate::maps::Direction`] as a number: a SYN comes in, a SYN-ACK goes out.
    pub direction: u32,
    /// IPv4 and TCP headers.
    pub packet: [u8; OPENING_CAPTURE],
}
