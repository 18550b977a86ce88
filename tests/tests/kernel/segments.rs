//! TCP segments to be, with the numbers of the flow that these tests are about.

use crate::frames::{CLIENT, CLIENT_PORT, SERVICE, VIP, ethernet, ipv4};
use rfsis_common::frame::tcp_flags::ACK;

pub const SLOT: u32 = 3;
pub const SHIFT: u32 = 2;
/// The client's first byte, the active's next, the edge that the SYN-ACK offered.
pub const FIRST: u32 = 2000;
pub const NEXT: u32 = 5000;
pub const FIRST_EDGE: u32 = FIRST + 64_000;

/// A TCP segment to be, from the VIP to the client.
#[derive(Clone, Debug)]
pub struct Segment {
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

/// A pure ACK that the active's kernel sends.
pub fn pure(ack: u32, window: u16) -> Segment {
    Segment {
        flags: ACK,
        seq: NEXT,
        ack,
        window,
        options: Vec::new(),
        payload: Vec::new(),
    }
}

impl Segment {
    pub fn flags(self, flags: u8) -> Self {
        Self { flags, ..self }
    }

    pub fn seq(self, seq: u32) -> Self {
        Self { seq, ..self }
    }

    pub fn options(self, options: &[&[u8]]) -> Self {
        let options = options.concat();
        Self { options, ..self }
    }

    pub fn data(self, payload: &[u8]) -> Self {
        let payload = payload.to_vec();
        Self { payload, ..self }
    }

    pub fn tcp(&self, source: u16, destination: u16) -> Vec<u8> {
        let mut tcp = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let words = 5 + self.options.len() / 4;
        tcp.extend([(words << 4) as u8, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        tcp
    }

    /// With its checksum (RFC 9293 section 3.1).
    pub fn frame(&self) -> Vec<u8> {
        let mut tcp = self.tcp(SERVICE, CLIENT_PORT);
        let sum = !folded(&[&pseudo_header(tcp.len())[..], &tcp].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        ethernet(0x0800, &ipv4(6, VIP, CLIENT, &tcp))
    }

    /// From the client.
    pub fn client_frame(&self) -> Vec<u8> {
        let mut frame = self.to_vip();
        let sum = !folded(&[&pseudo_header(frame.len() - 34)[..], &frame[34..]].concat());
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        let sum = !folded(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    /// The same without a checksum.
    pub fn to_vip(&self) -> Vec<u8> {
        let tcp = self.tcp(CLIENT_PORT, SERVICE);
        ethernet(0x0800, &ipv4(6, CLIENT, VIP, &tcp))
    }
}

pub fn pseudo_header(len: usize) -> Vec<u8> {
    let mut bytes = [VIP.octets(), CLIENT.octets()].concat();
    bytes.extend([0, 6]);
    bytes.extend((len as u16).to_be_bytes());
    bytes
}

/// Ones' complement sum (RFC 1071).
pub fn folded(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

pub const STAMPS: &[u8] = &[1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9];

/// Two NOPs and a SACK option with so many blocks, of what lies ahead.
pub fn sack(blocks: u8) -> Vec<u8> {
    let ahead = (0..blocks.into()).map(|block| FIRST + 50_000 + 2000 * block);
    sack_of(&ahead.map(|left| (left, left + 1001)).collect::<Vec<_>>())
}

/// The same with these.
pub fn sack_of(blocks: &[(u32, u32)]) -> Vec<u8> {
    let mut option = vec![1, 1, 5, 2 + 8 * blocks.len() as u8];
    for (left, right) in blocks {
        option.extend(left.to_be_bytes());
        option.extend(right.to_be_bytes());
    }
    option
}

/// So many NOPs.
pub fn nops(count: usize) -> Vec<u8> {
    vec![1; count]
}

/// Maximum segment size, SACK permitted, timestamps, NOP, window scale: 20 bytes.
pub const SYN_OPTIONS: &[u8] = &[
    2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9, 1, 3, 3, 7,
];
