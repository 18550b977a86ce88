//! Prompt datagrams: confirmations that the active's kernel takes by itself, without waking its agent.
//!
//! ```text
//!  offset  size  field                                            all big-endian
//!     0      4    magic "RFSP"
//!     4      1    version (2)
//!     5      1    flags: 1, the device was still to finish the checksum of the frame from which it was made
//!     6      2    reserved, 0
//!     8      8    0; a device that finishes that checksum writes here
//!    16      8    sequence: ever higher under one key
//!    24    24·n   records, 1 to 8
//! 24+24n     16    SipHash-2-4-128 over all before it, with zeros for what a device may write
//! ```
//!
//! A record is client's address, 4; client's port, 2; service's port, 2; client's initial sequence number, 4;
//! acknowledgement, 4; right edge, 4; reserved, 4. The key is one of the two nodes in their present sessions
//! and epoch: so that none of these stands in the datagram. The standby's agent makes them, and so does its kernel: see
//! [`crate::pledge`].
//!
//! Pure functions, called by the programs and by the agent.

use crate::ack_gate::{Confirmation, Release};
use crate::frame::tcp_flags;
use crate::maps::FlowKey;

/// First bytes of a datagram.
pub const MAGIC: [u8; 4] = *b"RFSP";
/// Version of the datagram that this build speaks.
pub const VERSION: u8 = 2;
/// Bytes in front of the records.
pub const HEADER_LEN: usize = 24;
/// Bytes of a record.
pub const RECORD_LEN: usize = 24;
/// Bytes of the tag.
pub const TAG_LEN: usize = 16;
/// Most records of a datagram.
pub const MAX_RECORDS: usize = 8;
/// Bytes of a datagram of so many records.
pub const fn len_of(records: usize) -> usize {
    HEADER_LEN + records * RECORD_LEN + TAG_LEN
}
/// The longest datagram.
pub const MAX_LEN: usize = len_of(MAX_RECORDS);

/// A datagram in memory, in words, for the hash.
pub type Words = [u64; MAX_LEN / 8];

/// Words of a datagram: what a device may write, and the sequence.
pub const WRITTEN: usize = 1;
/// See above.
pub const SEQUENCE: usize = 2;

/// The first word, as it lies in memory.
#[inline(always)]
pub const fn head(unfinished: bool) -> u64 {
    let [a, b, c, d] = MAGIC;
    u64::from_ne_bytes([a, b, c, d, VERSION, unfinished as u8, 0, 0])
}

/// Whether a device has still to finish a checksum of the buffer in which a datagram came: its first words.
#[inline(always)]
pub const fn is_unfinished(words: &Words) -> bool {
    // What it writes is never 0 (`skb_checksum_help`, net/core/dev.c).
    words[0] == head(true) && words[WRITTEN] == 0
}

/// A datagram of one record, in words.
pub type One = [u64; len_of(1) / 8];

/// The datagram that says this. `unfinished`: a device has still to finish a checksum of the buffer that carries it.
#[inline(always)]
pub const fn seal(record: &PromptRecord, sequence: u64, unfinished: bool, key: [u64; 2]) -> One {
    let [flow, numbers, edge] = record.to_words();
    let head = head(unfinished);
    let mut hash = SipHash::new(key);
    hash.absorb(head);
    hash.absorb(0);
    hash.absorb(sequence.to_be());
    hash.absorb(flow);
    hash.absorb(numbers);
    hash.absorb(edge);
    let [a, b] = hash.finish(HEADER_LEN + RECORD_LEN);
    [head, 0, sequence.to_be(), flow, numbers, edge, a, b]
}

/// From where and to where a datagram between the nodes goes, and what it begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// IPv4 address of the sender, host byte order.
    pub from: u32,
    /// IPv4 address of the receiver, host byte order.
    pub to: u32,
    /// UDP port of both.
    pub port: u32,
    /// First bytes of the payload.
    pub magic: [u8; 4],
    /// The next.
    pub version: u8,
}

/// Where the EtherType stands in a frame, and how many bytes there are from there up to the version of a datagram,
/// behind IPv4 without options, and UDP.
pub const HEAD_AT: usize = 12;
/// See above; the last one is not read.
pub const HEAD_LEN: usize = 36;

impl Route {
    /// UDP length and checksum of a frame that claims to be such a datagram, whole.
    #[inline(always)]
    pub const fn udp_of(&self, head: &[u8; HEAD_LEN]) -> Option<(usize, u16)> {
        const ETHERTYPE: u32 = 0x0800;
        const WITHOUT_OPTIONS: u32 = 0x45;
        // Offset of a fragment, and whether more follow; the protocol.
        const FRAGMENT: u32 = 0x3fff_0000;
        const UDP: u32 = 17;
        let claims = word(head, 0) >> 8 == ETHERTYPE << 8 | WITHOUT_OPTIONS
            && word(head, 8) & (FRAGMENT | 0xff) == UDP
            && word(head, 14) == self.from
            && word(head, 18) == self.to
            && word(head, 22) == (self.port << 16 | self.port)
            && word(head, 30) == u32::from_be_bytes(self.magic)
            && head[34] == self.version;
        let udp = word(head, 26);
        if claims {
            Some(((udp >> 16) as usize, udp as u16))
        } else {
            None
        }
    }
}

#[inline(always)]
const fn word(bytes: &[u8; HEAD_LEN], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// How far behind the highest sequence one may come and still count.
pub const WINDOW: u64 = 64;

/// Value of map `PROMPT`: from whom prompt datagrams are taken. The agent writes it; all zeros but `seen` is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PromptPeer {
    /// Key of the hash.
    pub key: [u64; 2],
    /// IPv4 address of the sender, host byte order.
    pub peer: u32,
    /// IPv4 address of this node, host byte order.
    pub node: u32,
    /// UDP port of both.
    pub port: u32,
    /// Which element of map `PROMPT_SEEN` belongs to the key: the other one is that of the key before.
    pub seen: u32,
}

impl PromptPeer {
    /// Nothing is taken.
    pub const fn nobody(seen: u32) -> Self {
        Self {
            key: [0; 2],
            peer: 0,
            node: 0,
            port: 0,
            seen,
        }
    }
}

/// Value of map `PROMPT_SEEN`: which sequences came already, of the last [`WINDOW`].
///
/// What the programs leave to the agent, the agent notes. Two may write at once, on two CPUs, and one forget
/// what the other has seen. Then a datagram may count twice that is not older than [`WINDOW`] others: so much
/// cannot be said in these that what it says would lie ahead again, and it says nothing the second time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PromptSeen {
    /// The highest.
    pub highest: u64,
    /// Bit `n`: `highest - n` was seen.
    pub bits: u64,
    /// When the latest came that was taken, `bpf_ktime_get_ns`; 0 for none.
    pub at_ns: u64,
    /// How many were taken, without the agent's having to hear of them.
    pub taken: u64,
}

/// Value of map `DELEGATED`, by slot: of which connection the programs take confirmations by themselves.
///
/// One word, so that a program never sees half of it. All zeros: of none, the agent alone does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Delegated(u64);

impl Delegated {
    /// The programs take what is said of the connection with this initial sequence number.
    pub const fn of(client_isn: u32) -> Self {
        Self(1 << 32 | client_isn as u64)
    }

    /// Whether they take a record of the connection with this one.
    #[inline(always)]
    pub const fn takes(self, client_isn: u32) -> bool {
        self.0 == Self::of(client_isn).0
    }
}

impl PromptSeen {
    /// What is seen when `sequence` is; `None` if it was seen before, or has fallen behind the window.
    #[inline(always)]
    pub const fn accept(self, sequence: u64) -> Option<PromptSeen> {
        if sequence > self.highest {
            let ahead = sequence - self.highest;
            let bits = if ahead < WINDOW {
                self.bits << ahead
            } else {
                0
            };
            return Some(PromptSeen {
                highest: sequence,
                bits: bits | 1,
                ..self
            });
        }
        let behind = self.highest - sequence;
        if sequence == 0 || behind >= WINDOW || self.bits & (1 << behind) != 0 {
            return None;
        }
        Some(PromptSeen {
            bits: self.bits | (1 << behind),
            ..self
        })
    }
}

/// What the standby holds of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptRecord {
    /// The flow.
    pub flow: FlowKey,
    /// Initial sequence number of the client.
    pub client_isn: u32,
    /// What is held, and up to where more can be taken.
    pub confirmation: Confirmation,
}

impl PromptRecord {
    /// The words of a record, as they lie in memory.
    #[inline(always)]
    pub const fn from_words(words: [u64; 3]) -> Self {
        let [flow, numbers, edge] = [
            u64::from_be(words[0]),
            u64::from_be(words[1]),
            u64::from_be(words[2]),
        ];
        Self {
            flow: FlowKey {
                client_addr: (flow >> 32) as u32,
                client_port: (flow >> 16) as u16,
                service_port: flow as u16,
            },
            client_isn: (numbers >> 32) as u32,
            confirmation: Confirmation::new(numbers as u32, (edge >> 32) as u32),
        }
    }

    /// The record as it is sent, in words as they lie in memory.
    #[inline(always)]
    pub const fn to_words(&self) -> [u64; 3] {
        let flow = (self.flow.client_addr as u64) << 32
            | (self.flow.client_port as u64) << 16
            | self.flow.service_port as u64;
        let numbers = (self.client_isn as u64) << 32 | self.confirmation.ack() as u64;
        let edge = (self.confirmation.edge() as u64) << 32;
        [flow.to_be(), numbers.to_be(), edge.to_be()]
    }
}

/// SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, `siphash.c` of the reference), over whole words.
#[derive(Clone, Copy, Debug)]
pub struct SipHash([u64; 4]);

impl SipHash {
    /// With a key.
    #[inline(always)]
    pub const fn new(key: [u64; 2]) -> Self {
        Self([
            key[0] ^ 0x736f_6d65_7073_6575,
            key[1] ^ 0x646f_7261_6e64_6f6d ^ 0xee,
            key[0] ^ 0x6c79_6765_6e65_7261,
            key[1] ^ 0x7465_6462_7974_6573,
        ])
    }

    /// Absorbs a word of the message, as it lies in memory.
    #[inline(always)]
    pub const fn absorb(&mut self, word: u64) {
        let word = u64::from_le(word);
        self.0[3] ^= word;
        self.round();
        self.round();
        self.0[0] ^= word;
    }

    /// The tag of a message of so many bytes, a multiple of 8, as its words lie in memory.
    #[inline(always)]
    pub const fn finish(mut self, len: usize) -> [u64; 2] {
        self.absorb(((len as u64) << 56).to_le());
        self.0[2] ^= 0xee;
        self.finalize();
        let first = self.word();
        self.0[1] ^= 0xdd;
        self.finalize();
        [first.to_le(), self.word().to_le()]
    }

    #[inline(always)]
    const fn word(&self) -> u64 {
        self.0[0] ^ self.0[1] ^ self.0[2] ^ self.0[3]
    }

    #[inline(always)]
    const fn finalize(&mut self) {
        self.round();
        self.round();
        self.round();
        self.round();
    }

    #[inline(always)]
    const fn round(&mut self) {
        let [mut a, mut b, mut c, mut d] = self.0;
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
        self.0 = [a, b, c, d];
    }
}

/// Hardware addresses with which segments of a flow leave. Value of map `HOPS`, by slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Hop {
    /// Destination and source, as they stand in a frame.
    pub addresses: [u32; 3],
}

impl Hop {
    /// Whether nothing has left yet.
    #[inline(always)]
    pub const fn is_unknown(&self) -> bool {
        self.addresses[0] | self.addresses[1] | self.addresses[2] == 0
    }
}

/// Bytes of a released ACK's frame with timestamps, and without.
pub const ACK_LEN: usize = 14 + 20 + 32;
/// Without.
pub const ACK_LEN_BARE: usize = 14 + 20 + 20;

/// The frame of a released ACK, in words of 32 bits from the IPv4 header on.
pub type AckWords = [u32; (ACK_LEN - 14) / 4];

/// A checksum of the Internet (RFC 1071) of which `sum` is the sum of words of 32 bits.
#[inline(always)]
pub(crate) const fn folded(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u32) & 0xffff
}

/// The sum over the pseudo header of a segment between the VIP and a client, of so many bytes from the TCP header on: as much of
/// its checksum as a device needs that finishes it (`CHECKSUM_PARTIAL`, include/linux/skbuff.h).
#[inline(always)]
pub const fn pseudo_sum(vip: u32, client: u32, len: u32) -> u16 {
    !folded(vip as u64 + client as u64 + 6 + len as u64) as u16
}

/// IPv4 and TCP headers of a released ACK (RFC 791, RFC 9293), with their checksums. `unfinished`: a device will finish that
/// of TCP.
#[inline(always)]
pub const fn acknowledgement(
    vip: u32,
    flow: FlowKey,
    release: &Release,
    unfinished: bool,
) -> AckWords {
    let (tcp_len, offset, options) = match release.timestamp {
        // Two NOPs and the option, as RFC 7323 appendix A has it.
        Some((tsval, tsecr)) => (32, 8, [0x0101_080a, tsval, tsecr]),
        None => (20, 5, [0; 3]),
    };
    let flags = tcp_flags::ACK | if release.ece { tcp_flags::ECE } else { 0 };
    let mut words = [
        0x4500_0000 | (20 + tcp_len),
        0x0000_4000,
        0x4006_0000,
        vip,
        flow.client_addr,
        (flow.service_port as u32) << 16 | flow.client_port as u32,
        release.seq,
        release.ack,
        offset << 28 | (flags as u32) << 16 | release.window as u32,
        0,
        options[0],
        options[1],
        options[2],
    ];
    let addresses = vip as u64 + flow.client_addr as u64;
    let ip = words[0] as u64 + words[1] as u64 + words[2] as u64 + addresses;
    let tcp = addresses
        + 6
        + tcp_len as u64
        + words[5] as u64
        + words[6] as u64
        + words[7] as u64
        + words[8] as u64
        + options[0] as u64
        + options[1] as u64
        + options[2] as u64;
    words[2] |= folded(ip);
    let tcp = if unfinished {
        pseudo_sum(vip, flow.client_addr, tcp_len) as u32
    } else {
        folded(tcp)
    };
    words[9] = tcp << 16;
    words
}

#[cfg(feature = "user")]
mod pod {
    use super::{Delegated, Hop, PromptPeer, PromptSeen};

    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for PromptPeer {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for PromptSeen {}
    // SAFETY: a `u64`: every bit pattern is valid.
    unsafe impl aya::Pod for Delegated {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Hop {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All but type of service, length, identification, lifetime, header checksum, whether it may be fragmented, and what
    /// UDP says of itself.
    #[test]
    fn a_datagram_is_known_by_every_bit_that_says_whose_it_is() {
        let route = Route {
            from: 0xc0a8_0102,
            to: 0xc0a8_0101,
            port: 7_400,
            magic: MAGIC,
            version: VERSION,
        };
        let mut head = [0; HEAD_LEN];
        head[..12].copy_from_slice(&[8, 0, 0x45, 0, 0, 99, 1, 2, 0x40, 0, 64, 17]);
        head[14..18].copy_from_slice(&route.from.to_be_bytes());
        head[18..22].copy_from_slice(&route.to.to_be_bytes());
        head[22..26].copy_from_slice(&[0x1c, 0xe8, 0x1c, 0xe8]);
        head[26..30].copy_from_slice(&[0, 80, 3, 4]);
        head[30..34].copy_from_slice(&MAGIC);
        head[34] = VERSION;
        assert_eq!(route.udp_of(&head), Some((80, 0x0304)));
        for bit in 0..HEAD_LEN * 8 {
            let (byte, mask) = (bit / 8, 1 << (bit % 8));
            let counts = match byte {
                8 => mask & 0xc0 == 0,
                0..3 | 9 | 11 | 14..26 | 30..35 => true,
                _ => false,
            };
            head[byte] ^= mask;
            assert_eq!(
                route.udp_of(&head).is_none(),
                counts,
                "byte {byte}, {mask:#x}"
            );
            head[byte] ^= mask;
        }
    }

    /// `vectors_sip128` of the reference: key 00 … 0f, messages 00, 01, 02 …
    #[test]
    fn the_hash_is_that_of_the_reference() {
        let word = |n: u64| u64::from_ne_bytes(core::array::from_fn(|i| (n * 8) as u8 + i as u8));
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let tag = |words: u64| {
            let mut hash = SipHash::new(key);
            (0..words).for_each(|n| hash.absorb(word(n)));
            let [a, b] = hash.finish(words as usize * 8);
            u128::from(a.swap_bytes()) << 64 | u128::from(b.swap_bytes())
        };
        assert_eq!(tag(0), 0xa3817f04ba25a8e66df67214c7550293);
        assert_eq!(tag(1), 0x3b62a9ba6258f5610f83e264f31497b4);
    }

    #[test]
    fn a_sequence_counts_once_among_the_last() {
        let mut seen = PromptSeen::default();
        let mut take = |sequence| match seen.accept(sequence) {
            Some(now) => {
                seen = now;
                true
            }
            None => false,
        };
        assert!(!take(0), "nobody sends it");
        for (sequence, counts) in [
            (1, true),
            (1, false),
            (3, true),
            (2, true),
            (2, false),
            (64, true),
            (65, true),
            (1, false),
            (4, true),
            (66 + WINDOW, true),
            (65, false),
            (67, true),
            (66, false),
            (u64::MAX, true),
            (u64::MAX, false),
        ] {
            assert_eq!(take(sequence), counts, "{sequence}");
        }
    }
}
