//! What a frame is: parsed once, over packet memory in the kernel and over slices elsewhere.
//!
//! Nothing here trusts a length. A frame that cannot be parsed is [`FrameClass::Malformed`] and is
//! left to the kernel; it is never mirrored.

use crate::heartbeat::{ARP_LEN, ETHERNET_LEN, MAGIC};
use crate::maps::{Direction, FlowKey};

/// Bytes of a frame from its Ethernet header on.
pub trait Frame {
    /// `N` bytes at `offset`, or `None` where the frame ends before them.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// Bytes from the Ethernet header to the end of the frame.
    fn frame_len(&self) -> usize;
}

impl Frame for &[u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk::<N>().copied()
    }

    fn frame_len(&self) -> usize {
        self.len()
    }
}

/// EtherTypes (IEEE 802 numbers).
const ETH_IPV4: u16 = 0x0800;
const ETH_ARP: u16 = 0x0806;
const ETH_VLAN: u16 = 0x8100;
const ETH_QINQ: u16 = 0x88a8;

/// IPv4 protocol number of TCP.
pub const IP_TCP: u8 = 6;

/// TCP flag bits (RFC 9293 section 3.1).
pub mod tcp_flags {
    /// No more data from sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Acknowledgement field is significant.
    pub const ACK: u8 = 0x10;
}

/// What kind of frame it is, seen from the VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameClass {
    /// An ARP request that carries the trailer's magic.
    Heartbeat,
    /// "Who has the VIP?"
    ArpRequestForVip,
    /// An ARP packet, request or reply, whose sender claims the VIP.
    ArpFromVip,
    /// IPv4 to or from the VIP.
    Vip(VipPacket),
    /// Tagged for a VLAN (id ≠ 0): belongs to another interface.
    Tagged,
    /// Too short or self-contradictory.
    Malformed,
    /// All the rest.
    Other,
}

/// An IPv4 packet to or from the VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VipPacket {
    /// Which way it goes.
    pub direction: Direction,
    /// Bytes from the start of the frame to the IPv4 header.
    pub l3_offset: usize,
    /// The TCP part; `None` for other protocols and for fragments after the first.
    pub tcp: Option<TcpPart>,
}

/// What the programs need of a TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpPart {
    /// The connection.
    pub flow: FlowKey,
    /// Low byte of the flags.
    pub flags: u8,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
}

/// Classifies a frame. `vip` is in host byte order.
#[inline(always)]
pub fn classify<F: Frame>(frame: &F, vip: u32) -> FrameClass {
    let Some(ethertype) = frame.load::<2>(12) else {
        return FrameClass::Malformed;
    };
    match u16::from_be_bytes(ethertype) {
        ETH_ARP => classify_arp(frame, ETHERNET_LEN, vip),
        ETH_IPV4 => classify_ipv4(frame, ETHERNET_LEN, vip),
        ETH_VLAN | ETH_QINQ => classify_tagged(frame, vip),
        _ => FrameClass::Other,
    }
}

/// A tag with VLAN id 0 carries a priority only: the kernel reads such a frame as untagged.
#[inline(always)]
fn classify_tagged<F: Frame>(frame: &F, vip: u32) -> FrameClass {
    let Some([tci_high, tci_low, type_high, type_low]) = frame.load::<4>(ETHERNET_LEN) else {
        return FrameClass::Malformed;
    };
    if u16::from_be_bytes([tci_high, tci_low]) & 0x0fff != 0 {
        return FrameClass::Tagged;
    }
    match u16::from_be_bytes([type_high, type_low]) {
        ETH_ARP => classify_arp(frame, ETHERNET_LEN + 4, vip),
        ETH_IPV4 => classify_ipv4(frame, ETHERNET_LEN + 4, vip),
        ETH_VLAN | ETH_QINQ => FrameClass::Tagged,
        _ => FrameClass::Other,
    }
}

/// RFC 826.
#[inline(always)]
fn classify_arp<F: Frame>(frame: &F, offset: usize, vip: u32) -> FrameClass {
    let Some(arp) = frame.load::<ARP_LEN>(offset) else {
        return FrameClass::Malformed;
    };
    // Ethernet, IPv4, address lengths 6 and 4.
    if arp[0] != 0 || arp[1] != 1 || arp[2] != 8 || arp[3] != 0 || arp[4] != 6 || arp[5] != 4 {
        return FrameClass::Other;
    }
    let request = arp[6] == 0 && arp[7] == 1;
    if request && offset == ETHERNET_LEN && frame.load::<4>(offset + ARP_LEN) == Some(MAGIC) {
        return FrameClass::Heartbeat;
    }
    let sender = u32::from_be_bytes([arp[14], arp[15], arp[16], arp[17]]);
    let target = u32::from_be_bytes([arp[24], arp[25], arp[26], arp[27]]);
    if sender == vip {
        FrameClass::ArpFromVip
    } else if request && target == vip {
        FrameClass::ArpRequestForVip
    } else {
        FrameClass::Other
    }
}

/// RFC 791, RFC 9293.
#[inline(always)]
fn classify_ipv4<F: Frame>(frame: &F, offset: usize, vip: u32) -> FrameClass {
    let Some(ip) = frame.load::<20>(offset) else {
        return FrameClass::Malformed;
    };
    let source = u32::from_be_bytes([ip[12], ip[13], ip[14], ip[15]]);
    let destination = u32::from_be_bytes([ip[16], ip[17], ip[18], ip[19]]);
    let direction = if destination == vip {
        Direction::ToVip
    } else if source == vip {
        Direction::FromVip
    } else {
        return FrameClass::Other;
    };
    let header_len = ((ip[0] & 0x0f) as usize) * 4;
    let total_len = u16::from_be_bytes([ip[2], ip[3]]) as usize;
    // A total length of 0 stands for a super-frame above 64 KiB (BIG TCP); it is never from a wire.
    if ip[0] >> 4 != 4
        || header_len < 20
        || total_len < header_len
        || offset + total_len > frame.frame_len()
    {
        return FrameClass::Malformed;
    }
    let mut packet = VipPacket {
        direction,
        l3_offset: offset,
        tcp: None,
    };
    let fragment_offset = u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff;
    if ip[9] != IP_TCP || fragment_offset != 0 {
        return FrameClass::Vip(packet);
    }
    if total_len < header_len + 20 {
        return FrameClass::Malformed;
    }
    // Masked so that the verifier sees the bound: header_len is a multiple of 4 up to 60.
    let Some(tcp) = frame.load::<14>(offset + (header_len & 0x3c)) else {
        return FrameClass::Malformed;
    };
    let source_port = u16::from_be_bytes([tcp[0], tcp[1]]);
    let destination_port = u16::from_be_bytes([tcp[2], tcp[3]]);
    let flow = match direction {
        Direction::ToVip => FlowKey {
            client_addr: source,
            client_port: source_port,
            service_port: destination_port,
        },
        Direction::FromVip => FlowKey {
            client_addr: destination,
            client_port: destination_port,
            service_port: source_port,
        },
    };
    packet.tcp = Some(TcpPart {
        flow,
        flags: tcp[13],
        seq: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        ack: u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]),
    });
    FrameClass::Vip(packet)
}
