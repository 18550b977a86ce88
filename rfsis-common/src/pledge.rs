//! Confirmations that the standby's kernel gives by itself, for its agent, of what is in the frame ring.
//!
//! ```text
//!  client            active's kernel                     standby's kernel             its agent
//!    │ bytes ───────────► copy ────────────────────────────► in the frame ring ──────────► in the shadow
//!    │                    ACK held                           │ what follows what is held:
//!    │ ◄───── ACK ─────── let go ◄─── prompt datagram ───────┘ so says the pledge ◄─────── room
//! ```
//!
//! The agent pledges to take whatever of a flow is in its ring, up to a limit: what lies there is as good as held, as long as
//! the agent lives, and one that dies takes its memory with it, too. So a client waits for no thread of the standby's.
//!
//! Only what the agent cannot refuse is confirmed so: bytes that follow what is held, in a segment without a flag that ends,
//! whose checksum a device has still to finish, as in every super-frame. That one is of this host, or of a card that has verified
//! what it put together (`tcp_gro_complete`, net/ipv4/tcp_offload.c); others the agent verifies, and confirms.
//!
//! Of super-frames that follow each other closely every second one is confirmed, as TCP acknowledges every second segment
//! (RFC 9293 section 3.8.6.3): each datagram, and the ACK that it lets go, cost both nodes and the client. Of the last one, if it
//! was not, the agent tells when it reads it.
//!
//! Pure functions, called by the programs, by the agent and by the simulation.

use crate::ack_gate::Confirmation;
use crate::frame::{TcpPart, tcp_flags};
use crate::prompt::{PromptRecord, folded, pseudo_sum};

/// Value of map `PLEDGED`: the pledge of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pledged {
    /// Element of map `PLEDGES`.
    pub slot: u32,
    /// Initial sequence number of the client.
    pub client_isn: u32,
}

/// Most flows with a pledge at once.
pub const PLEDGES_MAX: u32 = 4096;

/// Value of map `PLEDGES`: words that agent and programs exchange in the same memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pledge {
    /// Of which connection, and what of it is held or in the ring. Both sides move it forward.
    pub held: Held,
    /// How much of it may be.
    pub room: Room,
    /// What the active was told last.
    pub told: Confirmation,
    /// When the programs took a segment last, ns, CLOCK_MONOTONIC. Theirs alone.
    pub taken_ns: u64,
}

/// Words of a [`Pledge`], by their places.
pub const WORDS: usize = 4;
/// See [`Pledge::held`].
pub const HELD: usize = 0;
/// See [`Pledge::room`].
pub const ROOM: usize = 1;
/// See [`Pledge::told`].
pub const TOLD: usize = 2;
/// See [`Pledge::taken_ns`].
pub const TAKEN: usize = 3;

/// See [`Pledge::held`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Held(u64);

impl Held {
    /// Nothing is pledged.
    pub const NOTHING: Held = Held(0);

    /// Every byte before `next` of the client's with this initial sequence number.
    #[inline(always)]
    pub const fn new(client_isn: u32, next: u32) -> Self {
        Self((client_isn as u64) << 32 | next as u64)
    }

    /// Initial sequence number of the client.
    #[inline(always)]
    pub const fn client_isn(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Every byte before this one is held, or in the ring.
    #[inline(always)]
    pub const fn next(self) -> u32 {
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
}

/// See [`Pledge::room`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Room(u64);

impl Room {
    /// Bytes before `limit` are taken for certain; what the client may be told of is up to `edge`.
    #[inline(always)]
    pub const fn new(limit: u32, edge: u32) -> Self {
        Self((limit as u64) << 32 | edge as u64)
    }

    /// Bytes before this one are taken for certain.
    #[inline(always)]
    pub const fn limit(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Right edge that the client may be told of.
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
}

/// Whether a segment has nothing but bytes, for what its headers say.
#[inline(always)]
pub const fn is_plain(tcp: &TcpPart) -> bool {
    const OTHER: u8 = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST | tcp_flags::URG;
    tcp.flags & (OTHER | tcp_flags::ACK) == tcp_flags::ACK
        && tcp.payload > 0
        && tcp.header_len >= 20
}

/// What is held with such a segment in the ring; `None` if that is for the agent to say.
#[inline(always)]
pub const fn grown(pledged: Pledged, held: Held, room: Room, tcp: &TcpPart) -> Option<Held> {
    let next = tcp.seq.wrapping_add(tcp.payload);
    let is_next = tcp.seq == held.next() && pledged.client_isn == held.client_isn();
    let has_room = room.limit().wrapping_sub(next) as i32 >= 0;
    if held.word() != Held::NOTHING.word() && is_next && has_room {
        Some(Held::new(held.client_isn(), next))
    } else {
        None
    }
}

/// Bytes of a segment that more of the same are likely to follow.
const LONG: u32 = 32 * 1024;
/// Unless a pause comes before it, ns.
const PAUSE_NS: u64 = 60_000;
/// What of long ones may be left to be told, bytes. A super-frame of usual Ethernet has 65,160: every second one.
const UNTOLD: u32 = 64 * 1024;

/// Whether the active is to be told of a segment at once, which came so long after another, ns. `told` as it was told last.
#[inline(always)]
pub const fn is_due(held: Held, told: Confirmation, tcp: &TcpPart, since_ns: u64) -> bool {
    let untold = held.next().wrapping_sub(told.ack());
    tcp.payload < LONG || since_ns > PAUSE_NS || untold > UNTOLD
}

/// What the active is told then.
#[inline(always)]
pub const fn confirmation(held: Held, room: Room, tcp: &TcpPart) -> PromptRecord {
    PromptRecord {
        flow: tcp.flow,
        client_isn: held.client_isn(),
        confirmation: Confirmation::new(held.next(), room.edge()),
    }
}

/// IPv4 header without options, and TCP header without, as they lie in a frame.
pub type Headers = [u32; 10];

/// Whether the agent would believe a segment of such headers without a look at its bytes: that of IPv4 is sound (RFC 1071), and a
/// device has still to finish the checksum of TCP.
#[inline(always)]
pub const fn is_sound(headers: &Headers, tcp: &TcpPart, vip: u32) -> bool {
    let mut sum = 0;
    let mut word = 0;
    while word < 5 {
        sum += u32::from_be(headers[word]) as u64;
        word += 1;
    }
    let len = tcp.header_len as u32 + tcp.payload;
    let found = (u32::from_be(headers[9]) >> 16) as u16;
    folded(sum) == 0 && found == pseudo_sum(vip, tcp.flow.client_addr, len)
}

#[cfg(feature = "user")]
mod pod {
    use super::{Pledge, Pledged};

    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Pledged {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Pledge {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Classified, classify};
    use crate::maps::FlowKey;

    const ISN: u32 = u32::MAX - 700;
    const PLEDGED: Pledged = Pledged {
        slot: 3,
        client_isn: ISN,
    };
    const FLOW: FlowKey = FlowKey {
        client_addr: 0xc0a8_0132,
        client_port: 40_000,
        service_port: 7,
    };

    fn segment(seq: u32, payload: u32) -> TcpPart {
        TcpPart {
            flow: FLOW,
            flags: tcp_flags::ACK,
            seq,
            ack: 1,
            window: 1,
            offset: 34,
            header_len: 32,
            payload,
        }
    }

    /// What is held at last, of segments that come one after the other, from the first byte on; bytes before `limit` are taken.
    fn held(segments: &[(u32, u32)], limit: u32) -> u32 {
        let first = ISN.wrapping_add(1);
        let room = Room::new(first.wrapping_add(limit), first.wrapping_add(limit));
        let mut held = Held::new(ISN, first);
        for (start, len) in segments {
            let tcp = segment(first.wrapping_add(*start), *len);
            held = grown(PLEDGED, held, room, &tcp).unwrap_or(held);
        }
        assert_eq!(held.client_isn(), ISN);
        held.next().wrapping_sub(first)
    }

    #[test]
    fn only_what_follows_what_is_held_is_held_across_the_end_of_all_numbers_too() {
        assert_eq!(held(&[(0, 500), (500, 1000), (1500, 1)], 2000), 1501);
        assert_eq!(held(&[(0, 500), (501, 1000)], 2000), 500, "a hole");
        assert_eq!(held(&[(0, 500), (0, 500), (400, 200)], 2000), 500, "held");
        assert_eq!(held(&[(0, 2000)], 2000), 2000, "all the room");
        assert_eq!(held(&[(0, 1999), (1999, 2)], 2000), 1999, "no room");
        assert_eq!(held(&[(0, 1)], 0), 0);
        // As far as half of all numbers, no room is no room.
        assert_eq!(held(&[(0, 0x7fff_ffff)], 0), 0);
    }

    #[test]
    fn a_pledge_is_of_one_connection_or_of_none() {
        let tcp = segment(5, 10);
        let room = Room::new(1000, 2000);
        let other = Held::new(ISN + 1, 5);
        assert_eq!(grown(PLEDGED, other, room, &tcp), None);
        let nobody = Pledged::default();
        let nothing = segment(0, 10);
        assert_eq!(grown(nobody, Held::NOTHING, room, &nothing), None);
        let known = Held::new(ISN, 5);
        let now = grown(PLEDGED, known, room, &tcp).unwrap();
        let said = confirmation(now, room, &tcp);
        assert_eq!((said.flow, said.client_isn), (FLOW, ISN));
        assert_eq!(said.confirmation, Confirmation::new(15, 2000));
    }

    #[test]
    fn a_segment_that_ends_or_begins_or_hurries_something_is_not_plain() {
        for flags in 0..=u8::MAX {
            let tcp = TcpPart {
                flags,
                ..segment(1, 1)
            };
            // FIN, SYN, RST, URG; PSH, ECE and CWR change nothing.
            let expected = flags & 0x27 == 0 && flags & 0x10 != 0;
            assert_eq!(is_plain(&tcp), expected, "{flags:#x}");
        }
        assert!(!is_plain(&segment(1, 0)), "no data");
        let short = TcpPart {
            header_len: 16,
            ..segment(1, 1)
        };
        assert!(!is_plain(&short));
    }

    /// Which segments are told at once: of so many bytes, and so many microseconds after the one before.
    fn due<const N: usize>(segments: [(u64, u32); N]) -> [bool; N] {
        let first = ISN.wrapping_add(1);
        let (mut held, mut told) = (Held::new(ISN, first), Confirmation::new(first, 0));
        segments.map(|(after, len)| {
            let tcp = segment(held.next(), len);
            held = Held::new(ISN, held.next().wrapping_add(len));
            let is_due = is_due(held, told, &tcp, after * 1000);
            if is_due {
                told = Confirmation::new(held.next(), 0);
            }
            is_due
        })
    }

    #[test]
    fn of_long_segments_that_follow_each_other_closely_every_second_is_told_at_once() {
        const FULL: u32 = 65_160;
        let stream = [(1000, FULL), (40, FULL), (40, FULL), (0, FULL), (60, FULL)];
        assert_eq!(due(stream), [true, false, true, false, true]);
        assert_eq!(due([(1000, FULL), (61, FULL)]), [true; 2], "a pause");
        let mixed = [(1000, 1), (0, LONG - 1), (0, FULL), (0, 1), (0, LONG)];
        assert_eq!(due(mixed), [true, true, false, true, false]);
        // As many bytes of shorter ones.
        let halves = [(1000, LONG), (0, LONG), (0, LONG), (0, LONG), (0, LONG)];
        assert_eq!(due(halves), [true, false, false, true, false]);
    }

    #[test]
    fn headers_are_sound_as_a_sender_leaves_them_to_its_device_and_not_otherwise() {
        const VIP: u32 = 0xc0a8_0164;
        let mut frame = [0; 14 + 20 + 20 + 5];
        frame[12] = 8;
        frame[14..26].copy_from_slice(&[0x45, 0, 0, 45, 0, 1, 0x40, 0, 64, 6, 0, 0]);
        frame[26..30].copy_from_slice(&FLOW.client_addr.to_be_bytes());
        frame[30..34].copy_from_slice(&VIP.to_be_bytes());
        frame[34..38].copy_from_slice(&[0x9c, 0x40, 0, 7]);
        frame[46..48].copy_from_slice(&[0x50, 0x10]);
        let words = |frame: &[u8; 59]| -> Headers {
            core::array::from_fn(|word| {
                let at = 14 + word * 4;
                u32::from_ne_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
            })
        };
        let sum = words(&frame)[..5]
            .iter()
            .map(|word| u64::from(u32::from_be(*word)))
            .sum();
        frame[24..26].copy_from_slice(&(folded(sum) as u16).to_be_bytes());
        // The sum over addresses, protocol and length, by hand: c0a8 + 0132 + c0a8 + 0164 + 6 + 25.
        frame[50..52].copy_from_slice(&0x8406_u16.to_be_bytes());
        let sound = |frame: &[u8; 59]| {
            let bytes: &[u8] = frame;
            let class: Classified = classify(&bytes, VIP);
            let tcp = class.tcp().copied();
            tcp.is_some_and(|tcp| is_sound(&words(frame), &tcp, VIP))
        };
        assert!(sound(&frame));
        for byte in (14..34).chain(50..52) {
            for bit in 0..8 {
                frame[byte] ^= 1 << bit;
                assert!(!sound(&frame), "bit {bit} of byte {byte}");
                frame[byte] ^= 1 << bit;
            }
        }
    }
}
