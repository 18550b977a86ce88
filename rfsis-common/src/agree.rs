//! Openings on which two kernels agree by themselves, without waking their agents.
//!
//! ```text
//!  client          active's kernel                      standby's kernel
//!    │ SYN ──────────► noted ───────── copy ──────────────► in the frame ring, noted
//!    │                 SYN-ACK held ── copy, marked ──────► in the frame ring
//!    │                 │                                      │ both are there, the agent lives and has room
//!    │ ◄── SYN-ACK ─── guarded, let go ◄──────── answer ──────┘
//! ```
//!
//! An answer is a UDP datagram between the nodes' own addresses:
//!
//! ```text
//!  offset  size  field                                            all big-endian
//!     0      4    magic "RFSA"
//!     4      1    version (1)
//!     5      1    flags: 1, the device was still to finish the checksum of the copy from which it was made
//!     6      2    reserved, 0
//!     8      8    0; a device that finishes that checksum writes here
//!    16      4    client's address
//!    20      2    client's port
//!    22      2    service's port
//!    24      4    client's initial sequence number
//!    28      4    active's initial sequence number
//!    32      8    digest of both handshake segments
//!    40     16    SipHash-2-4-128 over all before it, with zeros for what a device may write
//! ```
//!
//! It needs no sequence: it counts for this very SYN-ACK, and that is let go once. The digest shows that the standby
//! has got what the client and the active have said, and not what a forger says for them: its key is secret.
//!
//! Pure functions, called by the programs, by the agent and by the simulation.

use crate::maps::FlowKey;
use crate::prompt::{SipHash, folded};

/// First bytes of an answer.
pub const MAGIC: [u8; 4] = *b"RFSA";
/// Version that this build speaks.
pub const VERSION: u8 = 1;
/// Bytes of an answer.
pub const ANSWER_LEN: usize = 56;
/// The same in memory, for the hash.
pub type AnswerWords = [u64; ANSWER_LEN / 8];
/// Bytes in front of it in a frame: Ethernet, IPv4 without options, UDP.
pub const PAYLOAD: usize = 14 + 20 + 8;
/// Bytes of the frame.
pub const FRAME_LEN: usize = PAYLOAD + ANSWER_LEN;

/// A TCP header as its digest takes it: with zeros behind it, and in place of what changes on the way.
pub type TcpHeader = [u32; 16];
/// Bytes of the longest.
pub const TCP_HEADER_MAX: usize = 60;
/// Word that holds checksum and urgent pointer.
const CHANGING: usize = 4;

/// Bytes of the longest SYN-ACK that is let go in this way, from its IPv4 header on: without IPv4 options.
pub const SYN_ACK_MAX: usize = 20 + TCP_HEADER_MAX;
/// A SYN-ACK in words, in network byte order, with zeros behind it.
pub type SynAck = [u32; SYN_ACK_MAX / 4];

/// Value of map `AGREE`: who the nodes are to each other. The agent writes it; all zeros is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AgreePeer {
    /// Key of what is taken from the peer.
    pub taking: [u64; 2],
    /// Key of what is given to it.
    pub giving: [u64; 2],
    /// The peer's IPv4 address, host byte order.
    pub peer: u32,
    /// That of this node.
    pub node: u32,
    /// UDP port of both; 0 for nobody.
    pub port: u32,
    /// 0.
    pub reserved: u32,
    /// Key of the confirmations that are given to it ([`crate::pledge`]).
    pub prompting: [u64; 2],
}

/// Value of map `SYNS`: a SYN that the agent will hear of, or has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NotedSyn {
    /// Its digest.
    pub digest: u64,
}

/// Value of map `PENDING`: a SYN-ACK that is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pending {
    /// Digest of the SYN.
    pub syn: u64,
    /// Bytes of the SYN-ACK, from its IPv4 header on.
    pub len: u32,
    /// Hardware addresses with which it leaves.
    pub addresses: [u32; 3],
    /// The packet, as the kernel has sent it.
    pub packet: SynAck,
}

impl Pending {
    /// Initial sequence number of the client.
    #[inline(always)]
    pub const fn client_isn(&self) -> u32 {
        u32::from_be(self.packet[TCP + 2]).wrapping_sub(1)
    }

    /// Initial sequence number of the active.
    #[inline(always)]
    pub const fn active_isn(&self) -> u32 {
        u32::from_be(self.packet[TCP + 1])
    }

    /// Its window, bytes.
    #[inline(always)]
    pub const fn window(&self) -> u16 {
        u32::from_be(self.packet[TCP + 3]) as u16
    }

    /// Whether an answer is one to this, and whoever gave it has got what was said.
    #[inline(always)]
    pub fn is_answered_by(&self, answer: &Answer, key: [u64; 2]) -> bool {
        let digest = digest_of(key, self.syn, |word| match self.packet.get(TCP + word) {
            Some(word) => *word,
            None => 0,
        });
        answer.client_isn == self.client_isn()
            && answer.active_isn == self.active_isn()
            && answer.digest == digest
    }
}

/// What the standby's kernel says: it has got both segments of this handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The flow.
    pub flow: FlowKey,
    /// Initial sequence number of the client.
    pub client_isn: u32,
    /// Initial sequence number of the active.
    pub active_isn: u32,
    /// Digest of the handshake.
    pub digest: u64,
    /// The buffer that carries this is one of which a device is to finish a checksum, or has.
    pub unfinished: bool,
}

/// Most slots that are lent to the programs at once.
pub const SPARE_SLOTS_MAX: u32 = 1024;

/// What a key signs of an answer.
const SIGNED: usize = 5;

impl Answer {
    /// The answer as it is sent.
    #[inline(always)]
    pub const fn seal(&self, key: [u64; 2]) -> AnswerWords {
        let flow = (self.flow.client_addr as u64) << 32
            | (self.flow.client_port as u64) << 16
            | self.flow.service_port as u64;
        let mut words = [
            head(self.unfinished),
            0,
            flow.to_be(),
            ((self.client_isn as u64) << 32 | self.active_isn as u64).to_be(),
            self.digest.to_be(),
            0,
            0,
        ];
        [words[SIGNED], words[SIGNED + 1]] = tag(&words, key);
        words
    }

    /// An answer that came in; `None` if it is not one of this version, or `key` has not signed it.
    #[inline(always)]
    pub const fn open(words: &AnswerWords, key: [u64; 2]) -> Option<Answer> {
        let [a, b] = tag(words, key);
        let unfinished = words[0] == head(true);
        if (!unfinished && words[0] != head(false))
            || (a ^ words[SIGNED]) | (b ^ words[SIGNED + 1]) != 0
        {
            return None;
        }
        let (flow, numbers) = (u64::from_be(words[2]), u64::from_be(words[3]));
        Some(Answer {
            flow: FlowKey {
                client_addr: (flow >> 32) as u32,
                client_port: (flow >> 16) as u16,
                service_port: flow as u16,
            },
            client_isn: (numbers >> 32) as u32,
            active_isn: numbers as u32,
            digest: u64::from_be(words[4]),
            unfinished,
        })
    }
}

/// The first word, as it lies in memory.
#[inline(always)]
const fn head(unfinished: bool) -> u64 {
    let [a, b, c, d] = MAGIC;
    u64::from_ne_bytes([a, b, c, d, VERSION, unfinished as u8, 0, 0])
}

/// Whether a device has still to finish a checksum of the buffer in which an answer came.
#[inline(always)]
pub const fn is_unfinished(answer: &Answer, words: &AnswerWords) -> bool {
    // What it writes is never 0 (`skb_checksum_help`, net/core/dev.c).
    answer.unfinished && words[1] == 0
}

#[inline(always)]
const fn tag(words: &AnswerWords, key: [u64; 2]) -> [u64; 2] {
    let mut hash = SipHash::new(key);
    hash.absorb(words[0]);
    hash.absorb(0);
    hash.absorb(words[2]);
    hash.absorb(words[3]);
    hash.absorb(words[4]);
    hash.finish(SIGNED * 8)
}

/// Digest of a TCP header that follows on another of that digest, 0 for none.
#[inline(always)]
pub fn digest(key: [u64; 2], before: u64, header: &TcpHeader) -> u64 {
    digest_of(key, before, |word| header[word])
}

#[inline(always)]
fn digest_of(key: [u64; 2], before: u64, header: impl Fn(usize) -> u32) -> u64 {
    const WORDS: usize = size_of::<TcpHeader>() / 4;
    let mut hash = SipHash::new(key);
    hash.absorb(before.to_be());
    for pair in 0..WORDS / 2 {
        let [low, high] = [2 * pair, 2 * pair + 1].map(|word| match word {
            CHANGING => 0,
            word => u64::from(header(word)),
        });
        hash.absorb((low | high << 32).to_le());
    }
    hash.finish(8 + WORDS * 4)[0]
}

/// IPv4 and UDP headers of so many bytes (RFC 791, RFC 768), without a checksum of UDP: they prove themselves better. In
/// words of network byte order.
#[inline(always)]
pub const fn envelope(node: u32, peer: u32, port: u16, len: usize) -> [u32; 7] {
    let udp_len = 8 + len as u32;
    let ports = (port as u32) << 16 | port as u32;
    let mut words = [
        0x4500_0000 | (20 + udp_len),
        0x0000_4000,
        0x4011_0000,
        node,
        peer,
        ports,
        udp_len << 16,
    ];
    let head = words[0] as u64 + words[1] as u64 + words[2] as u64;
    words[2] |= folded(head + node as u64 + peer as u64);
    let mut word = 0;
    while word < words.len() {
        words[word] = words[word].to_be();
        word += 1;
    }
    words
}

/// Words of a SYN-ACK's TCP header, behind an IPv4 header without options.
const TCP: usize = 5;

/// Writes the TCP checksum of a packet, whatever stands in its place; `len`: its bytes. `unfinished`: as much of it as
/// a device needs that finishes it, the sum over the pseudo header (`CHECKSUM_PARTIAL`, include/linux/skbuff.h).
#[inline(always)]
pub fn write_checksum(packet: &mut SynAck, len: u32, unfinished: bool) {
    packet[TCP + CHANGING] &= 0xffff_u32.to_be();
    let [from, to] = [3, 4].map(|word| u64::from(u32::from_be(packet[word])));
    let pseudo = from + to + 6 + u64::from(len) - 20;
    let sum = if unfinished {
        !folded(pseudo) & 0xffff
    } else {
        // What is behind the segment is zero.
        let words = packet[TCP..].iter();
        folded(
            pseudo
                + words
                    .map(|word| u64::from(u32::from_be(*word)))
                    .sum::<u64>(),
        )
    };
    packet[TCP + CHANGING] |= (sum << 16).to_be();
}

/// Whether a device has still to finish the checksum of a segment without data from the VIP; `None` if that cannot be told, or
/// it is wrong.
#[inline(always)]
pub fn is_header_unfinished(vip: u32, flow: FlowKey, header: &TcpHeader, len: u32) -> Option<bool> {
    let pseudo = u64::from(vip) + u64::from(flow.client_addr) + 6 + u64::from(len);
    let words = header.iter();
    let sum = pseudo
        + words
            .map(|word| u64::from(u32::from_be(*word)))
            .sum::<u64>();
    let is_complete = folded(sum) == 0;
    let found = u32::from_be(header[CHANGING]) >> 16;
    let is_left = found == !folded(pseudo) & 0xffff;
    (is_complete != is_left).then_some(is_left)
}

/// Window shift that a SYN-ACK of Linux announces, 0 without; `None` where its options are others than these, in this
/// order (`tcp_options_write`, net/ipv4/tcp_output.c): segment size, timestamps and SACK permitted, window shift.
#[inline(always)]
pub fn window_shift(packet: &SynAck, len: u32) -> Option<u32> {
    const SEGMENT_SIZE: u32 = 0x0204;
    const SACK_PERMITTED: u32 = 0x0101_0402;
    const SACK_PERMITTED_AND_TIMESTAMPS: u32 = 0x0402_080a;
    const TIMESTAMPS: u32 = 0x0101_080a;
    const SHIFT: u32 = 0x0001_0303;
    const SHIFT_MAX: u32 = 14;
    let option = |at: usize| packet.get(at).map_or(0, |word| u32::from_be(*word));
    let mut at = TCP + 5;
    if option(at) >> 16 == SEGMENT_SIZE {
        at += 1;
    }
    at += match option(at) {
        SACK_PERMITTED_AND_TIMESTAMPS | TIMESTAMPS => 3,
        SACK_PERMITTED => 1,
        _ => 0,
    };
    let (shift, end) = match option(at) {
        option if option >> 8 == SHIFT => (option & 0xff, at + 1),
        _ => (0, at),
    };
    (end * 4 == len as usize && shift <= SHIFT_MAX).then_some(shift)
}

#[cfg(feature = "user")]
mod pod {
    use super::{AgreePeer, NotedSyn, Pending};

    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for AgreePeer {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for NotedSyn {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Pending {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
    const ANSWER: Answer = Answer {
        flow: FlowKey {
            client_addr: 0x0102_0304,
            client_port: 0x0506,
            service_port: 0x0708,
        },
        client_isn: 0x090a_0b0c,
        active_isn: 0x0d0e_0f10,
        digest: 0x1112_1314_1516_1718,
        unfinished: false,
    };

    fn bytes(words: &AnswerWords) -> [u8; ANSWER_LEN] {
        let mut bytes = [0; ANSWER_LEN];
        for (word, to) in words.iter().zip(bytes.as_chunks_mut().0) {
            *to = word.to_ne_bytes();
        }
        bytes
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let sealed = bytes(&ANSWER.seal(KEY));
        assert_eq!(sealed[..16], *b"RFSA\x01\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(
            sealed[16..40],
            core::array::from_fn::<u8, 24, _>(|at| at as u8 + 1)
        );
        let mut hash = SipHash::new(KEY);
        for word in sealed[..40].as_chunks().0 {
            hash.absorb(u64::from_ne_bytes(*word));
        }
        let [a, b] = hash.finish(40);
        assert_eq!(sealed[40..48], a.to_ne_bytes());
        assert_eq!(sealed[48..], b.to_ne_bytes());
    }

    #[test]
    fn any_flipped_bit_is_refused_but_where_a_device_may_write() {
        let unfinished = Answer {
            unfinished: true,
            ..ANSWER
        };
        let mut sealed = unfinished.seal(KEY);
        assert_eq!(Answer::open(&sealed, KEY), Some(unfinished));
        assert!(is_unfinished(&unfinished, &sealed));
        // The device has done it.
        sealed[1] = 0xffff_u64.to_be();
        assert_eq!(Answer::open(&sealed, KEY), Some(unfinished));
        assert!(!is_unfinished(&unfinished, &sealed));
        let sealed = ANSWER.seal(KEY);
        assert!(!is_unfinished(&ANSWER, &sealed));
        assert_eq!(Answer::open(&sealed, KEY), Some(ANSWER));
        assert_eq!(Answer::open(&sealed, [KEY[0], KEY[1] ^ 1]), None);
        for word in 0..sealed.len() {
            for bit in 0..64 {
                let mut flipped = sealed;
                flipped[word] ^= 1 << bit;
                let expected = (word == 1).then_some(ANSWER);
                assert_eq!(
                    Answer::open(&flipped, KEY),
                    expected,
                    "word {word}, bit {bit}"
                );
            }
        }
    }

    #[test]
    fn a_digest_is_of_all_that_both_have_said_and_of_nothing_that_changes_on_the_way() {
        let header: TcpHeader = core::array::from_fn(|at| at as u32 * 0x0101_0101);
        let first = digest(KEY, 0, &header);
        assert_ne!(first, digest([KEY[1], KEY[0]], 0, &header));
        assert_ne!(first, digest(KEY, 1, &header));
        for word in 0..header.len() {
            for bit in 0..32 {
                let mut other = header;
                other[word] ^= 1 << bit;
                let is_same = digest(KEY, 0, &other) == first;
                assert_eq!(is_same, word == CHANGING, "word {word}, bit {bit}");
            }
        }
    }

    /// A SYN-ACK that tshark calls right, its checksum left to a device.
    #[test]
    fn a_checksum_is_that_of_the_whole_segment_whatever_stood_there() {
        let packet: [u32; 11] = [
            0x4500_002c,
            0x0000_4000,
            0x4006_b6c1,
            0xc0a8_0164,
            0xc0a8_0132,
            0x0007_9c40,
            0x0000_1387,
            0x0000_07d0,
            0x6012_fa00,
            0x1234_0000,
            0x0204_05b4,
        ];
        let mut whole = SynAck::default();
        for (word, from) in whole.iter_mut().zip(packet) {
            *word = from.to_be();
        }
        let flow = FlowKey {
            client_addr: 0xc0a8_0132,
            client_port: 40_000,
            service_port: 7,
        };
        let judge = |packet: &SynAck| {
            let header = core::array::from_fn(|word| packet.get(TCP + word).copied().unwrap_or(0));
            is_header_unfinished(0xc0a8_0164, flow, &header, 24)
        };
        assert_eq!(judge(&whole), None, "wrong");
        write_checksum(&mut whole, 44, false);
        let sum: u64 = [0xc0a8_0164, 0xc0a8_0132, 6, 24]
            .into_iter()
            .chain(whole[5..].iter().map(|word| u64::from(u32::from_be(*word))))
            .sum();
        assert_eq!(folded(sum), 0, "the sum with the checksum is all ones");
        assert_eq!(judge(&whole), Some(false));
        let once = whole;
        write_checksum(&mut whole, 44, false);
        assert_eq!(whole, once);

        write_checksum(&mut whole, 44, true);
        assert_eq!(judge(&whole), Some(true));
        // As the device does it: the sum of all from the TCP header on.
        let sum = folded(
            whole[5..]
                .iter()
                .map(|word| u64::from(u32::from_be(*word)))
                .sum(),
        );
        whole[TCP + CHANGING] = (sum << 16).to_be();
        assert_eq!(whole, once);
    }

    #[test]
    fn a_window_shift_is_read_where_linux_writes_it_and_nowhere_else() {
        const MSS: u32 = 0x0204_05b4;
        const SACK_AND_STAMPS: [u32; 3] = [0x0402_080a, 0x0103_0307, 0x0103_0307];
        const STAMPS: [u32; 3] = [0x0101_080a, 7, 0x0103_0307];
        const SACK: u32 = 0x0101_0402;
        const SHIFT: u32 = 0x0103_0307;
        let found = |parts: &[&[u32]]| {
            let (mut packet, mut at) = (SynAck::default(), 10);
            for word in parts.iter().copied().flatten() {
                packet[at] = word.to_be();
                at += 1;
            }
            window_shift(&packet, at as u32 * 4)
        };
        assert_eq!(found(&[]), Some(0));
        assert_eq!(found(&[&[MSS]]), Some(0));
        assert_eq!(found(&[&[MSS, SHIFT]]), Some(7));
        assert_eq!(found(&[&[MSS, SACK, SHIFT]]), Some(7));
        assert_eq!(found(&[&[MSS], &SACK_AND_STAMPS, &[SHIFT]]), Some(7));
        // The client's clock is no shift.
        assert_eq!(found(&[&[MSS], &SACK_AND_STAMPS]), Some(0));
        assert_eq!(found(&[&[MSS], &STAMPS]), Some(0));
        assert_eq!(found(&[&[MSS], &STAMPS, &[SHIFT]]), Some(7));
        assert_eq!(found(&[&[MSS, 0x0103_030e]]), Some(14));
        assert_eq!(found(&[&[MSS, 0x0103_030f]]), None, "greater than any");
        assert_eq!(found(&[&[SHIFT, MSS]]), None, "another order");
        assert_eq!(found(&[&[MSS, SHIFT, 0x1e03_0000]]), None, "more behind it");
        assert_eq!(found(&[&[MSS, 0]]), None, "none that is known");
    }
}
