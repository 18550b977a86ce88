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
    /// `N` words of four bytes at `offset`, in network byte order there and as numbers here; `None` where the
    /// frame ends before them.
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]>;
    /// Bytes from the Ethernet header to the end of the frame.
    fn frame_len(&self) -> usize;
}

impl Frame for &[u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk::<N>().copied()
    }

    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let mut words = [0; N];
        for (index, word) in words.iter_mut().enumerate() {
            *word = u32::from_be_bytes(self.load(offset + index * 4)?);
        }
        Some(words)
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

/// IPv4 protocol numbers of ICMP and UDP.
const IP_ICMP: u8 = 1;
const IP_UDP: u8 = 17;

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
    /// Urgent pointer field is significant.
    pub const URG: u8 = 0x20;
    /// Congestion was met (RFC 3168 section 6.1).
    pub const ECE: u8 = 0x40;
}

/// What kind of frame it is, seen from the VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameClass {
    /// An ARP packet, request or reply, that carries the trailer's magic.
    Heartbeat,
    /// "Who has the VIP?"
    ArpRequestForVip,
    /// An ARP packet, request or reply, whose sender claims the VIP.
    ArpFromVip,
    /// IPv4 to or from the VIP.
    Vip,
    /// Tagged for a VLAN (id ≠ 0): belongs to another interface.
    Tagged,
    /// Too short or self-contradictory.
    Malformed,
    /// All the rest.
    Other,
}

/// A frame, classified.
///
/// Flat, not an enum with payloads: what a variant lacks would be undefined, the compiler moves
/// undefined values about freely, and the verifier refuses a program that reads one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classified {
    /// What kind of frame it is.
    pub class: FrameClass,
    /// Which way it goes; `ToVip` unless it is from the VIP.
    pub direction: Direction,
    /// Bytes from the start of the frame to the layer-3 header.
    pub l3_offset: usize,
    /// `tcp` says something.
    has_tcp: bool,
    tcp: TcpPart,
}

impl Classified {
    #[inline(always)]
    const fn new(class: FrameClass, l3_offset: usize) -> Self {
        Self {
            class,
            direction: Direction::ToVip,
            l3_offset,
            has_tcp: false,
            tcp: TcpPart {
                flow: FlowKey {
                    client_addr: 0,
                    client_port: 0,
                    service_port: 0,
                },
                flags: 0,
                seq: 0,
                ack: 0,
                window: 0,
                offset: 0,
                header_len: 0,
                payload: 0,
            },
        }
    }

    /// The TCP part of a packet to or from the VIP; `None` for other protocols and for fragments after
    /// the first.
    #[inline(always)]
    pub const fn tcp(&self) -> Option<&TcpPart> {
        if self.has_tcp { Some(&self.tcp) } else { None }
    }
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
    /// Window field, unscaled.
    pub window: u16,
    /// Bytes from the start of the frame to the TCP header.
    pub offset: usize,
    /// Bytes of the TCP header with its options, by its data offset: 0 to 60, not checked.
    pub header_len: usize,
    /// Bytes of data, by the IPv4 total length: of a super-frame, all of them.
    pub payload: u32,
}

/// Words of an IPv4 header without options, and of a TCP header up to its window.
type Ipv4Words = [u32; 5];
type TcpWords = [u32; 4];

/// Classifies a frame. `vip` is in host byte order.
#[inline(always)]
pub fn classify<F: Frame>(frame: &F, vip: u32) -> Classified {
    // Nearly all are TCP over IPv4 without tags and options. In the kernel each look at a frame is a call: one
    // for all of that, and from where its words are aligned.
    if let Some([start, a, b, c, d, e, ports, seq, ack, rest]) = frame.words(ETHERNET_LEN - 4)
        && start as u16 == ETH_IPV4
        && a >> 24 == 0x45
    {
        let (ip, tcp) = ([a, b, c, d, e], [ports, seq, ack, rest]);
        return classify_packet(frame.frame_len(), ETHERNET_LEN, ip, |_| Some(tcp), vip);
    }
    let Some(ethertype) = frame.load::<2>(12) else {
        return Classified::new(FrameClass::Malformed, ETHERNET_LEN);
    };
    match u16::from_be_bytes(ethertype) {
        ETH_ARP => classify_arp(frame, ETHERNET_LEN, vip),
        ETH_IPV4 => classify_ipv4(frame, ETHERNET_LEN, vip),
        ETH_VLAN | ETH_QINQ => classify_tagged(frame, vip),
        _ => Classified::new(FrameClass::Other, ETHERNET_LEN),
    }
}

/// A tag with VLAN id 0 carries a priority only: the kernel reads such a frame as untagged.
#[inline(always)]
fn classify_tagged<F: Frame>(frame: &F, vip: u32) -> Classified {
    const L3: usize = ETHERNET_LEN + 4;
    let Some([tci_high, tci_low, type_high, type_low]) = frame.load::<4>(ETHERNET_LEN) else {
        return Classified::new(FrameClass::Malformed, ETHERNET_LEN);
    };
    if u16::from_be_bytes([tci_high, tci_low]) & 0x0fff != 0 {
        return Classified::new(FrameClass::Tagged, ETHERNET_LEN);
    }
    match u16::from_be_bytes([type_high, type_low]) {
        ETH_ARP => classify_arp(frame, L3, vip),
        ETH_IPV4 => classify_ipv4(frame, L3, vip),
        ETH_VLAN | ETH_QINQ => Classified::new(FrameClass::Tagged, ETHERNET_LEN),
        _ => Classified::new(FrameClass::Other, L3),
    }
}

/// RFC 826.
#[inline(always)]
fn classify_arp<F: Frame>(frame: &F, offset: usize, vip: u32) -> Classified {
    let Some(arp) = frame.load::<ARP_LEN>(offset) else {
        return Classified::new(FrameClass::Malformed, offset);
    };
    // Ethernet, IPv4, address lengths 6 and 4.
    if arp[0] != 0 || arp[1] != 1 || arp[2] != 8 || arp[3] != 0 || arp[4] != 6 || arp[5] != 4 {
        return Classified::new(FrameClass::Other, offset);
    }
    let request = arp[6] == 0 && arp[7] == 1;
    let reply = arp[6] == 0 && arp[7] == 2;
    let sender = u32::from_be_bytes([arp[14], arp[15], arp[16], arp[17]]);
    let target = u32::from_be_bytes([arp[24], arp[25], arp[26], arp[27]]);
    // The VIP first: nothing is said in its name that the gate takes for something else.
    let class = if sender == vip {
        FrameClass::ArpFromVip
    } else if (request || reply)
        && offset == ETHERNET_LEN
        && frame.load::<4>(offset + ARP_LEN) == Some(MAGIC)
    {
        FrameClass::Heartbeat
    } else if request && target == vip {
        FrameClass::ArpRequestForVip
    } else {
        FrameClass::Other
    };
    Classified::new(class, offset)
}

/// RFC 791.
#[inline(always)]
fn classify_ipv4<F: Frame>(frame: &F, offset: usize, vip: u32) -> Classified {
    match frame.words(offset) {
        Some(ip) => classify_packet(frame.frame_len(), offset, ip, |tcp| frame.words(tcp), vip),
        None => Classified::new(FrameClass::Malformed, offset),
    }
}

/// RFC 791, RFC 9293. `tcp_at` gives the TCP header at an offset of the frame.
#[inline(always)]
fn classify_packet(
    frame_len: usize,
    offset: usize,
    ip: Ipv4Words,
    tcp_at: impl FnOnce(usize) -> Option<TcpWords>,
    vip: u32,
) -> Classified {
    let [lengths, fragment, protocol, source, destination] = ip;
    // From the VIP to itself is from the VIP: the gate must judge it.
    let direction = if source == vip {
        Direction::FromVip
    } else if destination == vip {
        Direction::ToVip
    } else {
        return Classified::new(FrameClass::Other, offset);
    };
    let header_len = (lengths >> 24 & 0x0f) as usize * 4;
    let total_len = (lengths & 0xffff) as usize;
    // A total length of 0 stands for a super-frame above 64 KiB (BIG TCP); it is never from a wire.
    if lengths >> 28 != 4
        || header_len < 20
        || total_len < header_len
        || offset + total_len > frame_len
    {
        return Classified::new(FrameClass::Malformed, offset);
    }
    let mut packet = Classified::new(FrameClass::Vip, offset);
    packet.direction = direction;
    if (protocol >> 16) as u8 != IP_TCP || fragment & 0x1fff != 0 {
        return packet;
    }
    if total_len < header_len + 20 {
        return Classified::new(FrameClass::Malformed, offset);
    }
    // Masked so that the verifier sees the bound: header_len is a multiple of 4 up to 60.
    let tcp_offset = offset + (header_len & 0x3c);
    let Some([ports, seq, ack, rest]) = tcp_at(tcp_offset) else {
        return Classified::new(FrameClass::Malformed, offset);
    };
    let tcp_header_len = (rest >> 28) as usize * 4;
    let (source_port, destination_port) = ((ports >> 16) as u16, ports as u16);
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
    packet.has_tcp = true;
    packet.tcp = TcpPart {
        flow,
        flags: (rest >> 16) as u8,
        seq,
        ack,
        window: rest as u16,
        offset: tcp_offset,
        header_len: tcp_header_len,
        payload: total_len.saturating_sub(header_len + tcp_header_len) as u32,
    };
    packet
}

/// The UDP port of the VIP that an ICMP port unreachable (RFC 792) says is closed; `None` for every
/// other packet. `l3_offset` is that of a packet from the VIP.
///
/// A kernel says so when the process behind a port has died, so it is as much of a farewell as an RST.
#[inline(always)]
pub fn refused_udp_port<F: Frame>(frame: &F, l3_offset: usize) -> Option<u16> {
    const ICMP_LEN: usize = 8;
    let outer = frame.load::<20>(l3_offset)?;
    if outer[9] != IP_ICMP {
        return None;
    }
    let icmp = l3_offset + ((outer[0] & 0x0f) as usize) * 4;
    // Type 3, destination unreachable; code 3, port unreachable.
    if frame.load::<2>(icmp)? != [3, 3] {
        return None;
    }
    // What follows is the head of the datagram that was refused.
    let inner = frame.load::<20>(icmp + ICMP_LEN)?;
    if inner[9] != IP_UDP {
        return None;
    }
    let ports = frame.load::<4>(icmp + ICMP_LEN + ((inner[0] & 0x0f) as usize) * 4)?;
    Some(u16::from_be_bytes([ports[2], ports[3]]))
}

/// Frames for the tests of this crate, without an allocator.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub const VIP: u32 = 0xc0a8_0164;
    pub const CLIENT: u32 = 0xc0a8_0132;
    pub const SERVICE: u16 = 7;
    pub const CLIENT_PORT: u16 = 40_000;
    /// Ethernet, IPv4 and TCP headers, no options, no payload.
    pub type Segment = [u8; 54];

    pub fn tcp(source: (u32, u16), destination: (u32, u16), flags: u8) -> Segment {
        let mut frame = [0; 54];
        frame[12] = 8;
        frame[14..24].copy_from_slice(&[0x45, 0, 0, 40, 0, 1, 0, 0, 64, IP_TCP]);
        frame[26..30].copy_from_slice(&source.0.to_be_bytes());
        frame[30..34].copy_from_slice(&destination.0.to_be_bytes());
        frame[34..36].copy_from_slice(&source.1.to_be_bytes());
        frame[36..38].copy_from_slice(&destination.1.to_be_bytes());
        frame[38..42].copy_from_slice(&1000_u32.to_be_bytes());
        frame[42..46].copy_from_slice(&2000_u32.to_be_bytes());
        frame[46..48].copy_from_slice(&[0x50, flags]);
        frame
    }

    pub fn tcp_to_vip(flags: u8) -> Segment {
        tcp((CLIENT, CLIENT_PORT), (VIP, SERVICE), flags)
    }

    pub fn tcp_from_vip(flags: u8) -> Segment {
        tcp((VIP, SERVICE), (CLIENT, CLIENT_PORT), flags)
    }

    /// The VIP says that its UDP port `port` is closed; `words` words of IP options in both headers.
    pub fn port_unreachable(port: u16, words: u8) -> ([u8; 150], usize) {
        let mut frame = [0; 150];
        let header = 20 + 4 * words as usize;
        let len = 14 + header + 8 + header + 8;
        frame[12] = 8;
        let ip = |protocol, len: usize| [0x45 + words, 0, 0, len as u8, 0, 1, 0, 0, 64, protocol];
        frame[14..24].copy_from_slice(&ip(IP_ICMP, len - 14));
        frame[26..30].copy_from_slice(&VIP.to_be_bytes());
        frame[30..34].copy_from_slice(&CLIENT.to_be_bytes());
        let icmp = 14 + header;
        frame[icmp..icmp + 2].copy_from_slice(&[3, 3]);
        let inner = icmp + 8;
        frame[inner..inner + 10].copy_from_slice(&ip(IP_UDP, header + 8));
        frame[inner + 12..inner + 16].copy_from_slice(&CLIENT.to_be_bytes());
        frame[inner + 16..inner + 20].copy_from_slice(&VIP.to_be_bytes());
        let udp = inner + header;
        frame[udp..udp + 2].copy_from_slice(&CLIENT_PORT.to_be_bytes());
        frame[udp + 2..udp + 4].copy_from_slice(&port.to_be_bytes());
        (frame, len)
    }

    pub fn arp(operation: u8, sender: u32, target: u32) -> [u8; 42] {
        let mut frame = [0; 42];
        frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
        frame[28..32].copy_from_slice(&sender.to_be_bytes());
        frame[38..42].copy_from_slice(&target.to_be_bytes());
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    fn class(frame: &[u8]) -> FrameClass {
        classify(&frame, VIP).class
    }

    #[test]
    fn a_flow_is_the_same_from_both_sides() {
        let flow = FlowKey {
            client_addr: CLIENT,
            client_port: CLIENT_PORT,
            service_port: SERVICE,
        };
        for (frame, direction) in [
            (tcp_to_vip(tcp_flags::ACK), Direction::ToVip),
            (tcp_from_vip(tcp_flags::ACK), Direction::FromVip),
        ] {
            let frame = classify(&&frame[..], VIP);
            assert_eq!((frame.class, frame.direction), (FrameClass::Vip, direction));
            let tcp = frame.tcp().unwrap();
            assert_eq!((tcp.flow, tcp.flags), (flow, tcp_flags::ACK));
            assert_eq!((tcp.seq, tcp.ack), (1000, 2000));
        }
    }

    #[test]
    fn a_refused_port_is_read_behind_ip_options_and_from_nothing_else() {
        for words in 0..=10 {
            let (frame, len) = port_unreachable(9999, words);
            assert_eq!(refused_udp_port(&&frame[..len], 14), Some(9999), "{words}");
            // Cut behind the ports of the datagram that was refused, then before.
            assert_eq!(refused_udp_port(&&frame[..len - 4], 14), Some(9999));
            assert_eq!(refused_udp_port(&&frame[..len - 5], 14), None);
            for (at, value) in [(23, IP_UDP), (34, 8), (35, 1), (51, IP_TCP)] {
                let shift = if at > 23 { 4 * words as usize } else { 0 };
                let mut other = frame;
                other[at + shift] = value;
                assert_eq!(refused_udp_port(&&other[..len], 14), None, "byte {at}");
            }
        }
        let segment = tcp_from_vip(tcp_flags::RST);
        assert_eq!(refused_udp_port(&&segment[..], 14), None);
    }

    #[test]
    fn ports_are_read_behind_ip_options() {
        let plain = tcp_to_vip(tcp_flags::ACK);
        for words in 1..=10_usize {
            let mut frame = [0; 54 + 40];
            frame[..34].copy_from_slice(&plain[..34]);
            frame[34 + words * 4..54 + words * 4].copy_from_slice(&plain[34..]);
            frame[14] = 0x45 + words as u8;
            frame[17] = 40 + 4 * words as u8;
            let parsed = classify(&&frame[..54 + words * 4], VIP);
            let tcp = parsed.tcp().unwrap();
            assert_eq!(
                tcp.flow.client_port, CLIENT_PORT,
                "{words} words of options"
            );
        }
    }

    #[test]
    fn only_the_first_fragment_has_a_tcp_part() {
        for (high, low, has_tcp) in [
            (0x20, 0, true),
            (0x40, 0, true),
            (0x20, 1, false),
            (0x1f, 0xff, false),
        ] {
            let mut frame = tcp_to_vip(tcp_flags::ACK);
            frame[20] = high;
            frame[21] = low;
            let frame = classify(&&frame[..], VIP);
            assert_eq!(frame.class, FrameClass::Vip);
            assert_eq!(frame.tcp().is_some(), has_tcp, "{high:#x} {low:#x}");
        }
    }

    #[test]
    fn a_frame_that_ends_early_is_malformed_at_every_length() {
        let segment = tcp_to_vip(tcp_flags::ACK);
        for len in 0..segment.len() {
            assert_eq!(class(&segment[..len]), FrameClass::Malformed, "{len} bytes");
        }
        assert_eq!(class(&segment), FrameClass::Vip);
        let request = arp(1, CLIENT, VIP);
        for len in 0..request.len() {
            assert_eq!(
                class(&request[..len]),
                FrameClass::Malformed,
                "ARP of {len} bytes"
            );
        }
        assert_eq!(class(&request), FrameClass::ArpRequestForVip);
    }

    #[test]
    fn a_header_that_contradicts_itself_is_malformed() {
        for (offset, value) in [
            (14, 0x44),
            (14, 0x40),
            (14, 0x65),
            (14, 0x4b),
            (16, 0xff),
            (17, 0),
            (17, 19),
            (17, 39),
            (17, 41),
        ] {
            let mut frame = tcp_to_vip(tcp_flags::ACK);
            frame[offset] = value;
            assert_eq!(
                class(&frame),
                FrameClass::Malformed,
                "{value:#x} at {offset}"
            );
        }
    }

    #[test]
    fn no_frame_makes_the_parser_panic() {
        // A fixed pseudo-random walk (xorshift64) over mutations of valid frames.
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize
        };
        for _ in 0..200_000 {
            let mut frame = tcp_to_vip(0);
            for _ in 0..next() % 6 {
                frame[next() % 54] = next() as u8;
            }
            let len = next() % 55;
            let parsed = classify(&&frame[..len], VIP);
            assert!(
                parsed.tcp().is_none() || len >= 48,
                "a TCP part in {len} bytes"
            );
        }
    }

    #[test]
    fn arp_is_told_apart_by_operation_sender_and_magic() {
        assert_eq!(class(&arp(1, VIP, VIP)), FrameClass::ArpFromVip);
        assert_eq!(class(&arp(2, VIP, CLIENT)), FrameClass::ArpFromVip);
        assert_eq!(class(&arp(2, CLIENT, VIP)), FrameClass::Other);
        assert_eq!(class(&arp(1, CLIENT, CLIENT)), FrameClass::Other);
        for (operation, without_magic) in [
            (1, FrameClass::ArpRequestForVip),
            (2, FrameClass::Other),
            (3, FrameClass::Other),
        ] {
            let mut beat = [0; 46];
            beat[..42].copy_from_slice(&arp(operation, CLIENT, VIP));
            beat[42..].copy_from_slice(&MAGIC);
            let is_heartbeat = class(&beat) == FrameClass::Heartbeat;
            assert_eq!(is_heartbeat, operation < 3, "operation {operation}");
            beat[45] ^= 1;
            assert_eq!(class(&beat), without_magic, "operation {operation}");
        }
    }

    #[test]
    fn what_is_said_in_the_name_of_the_vip_is_from_the_vip_whatever_else_it_looks_like() {
        for operation in [1, 2] {
            let mut beat = [0; 46];
            beat[..42].copy_from_slice(&arp(operation, VIP, CLIENT));
            beat[42..].copy_from_slice(&MAGIC);
            assert_eq!(class(&beat), FrameClass::ArpFromVip);
        }
        let to_itself = tcp((VIP, SERVICE), (VIP, CLIENT_PORT), tcp_flags::RST);
        let parsed = classify(&&to_itself[..], VIP);
        assert_eq!(parsed.class, FrameClass::Vip);
        assert_eq!(parsed.direction, Direction::FromVip);
    }

    #[test]
    fn a_priority_tag_is_looked_through_and_a_vlan_is_not() {
        let plain = tcp_to_vip(tcp_flags::ACK);
        let mut frame = [0; 58];
        frame[..12].copy_from_slice(&plain[..12]);
        frame[16..].copy_from_slice(&plain[12..]);
        for ethertype in [ETH_VLAN, ETH_QINQ] {
            frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
            frame[14..16].copy_from_slice(&0xe000_u16.to_be_bytes());
            let parsed = classify(&&frame[..], VIP);
            assert_eq!((parsed.class, parsed.l3_offset), (FrameClass::Vip, 18));
            frame[14..16].copy_from_slice(&0xe005_u16.to_be_bytes());
            assert_eq!(class(&frame), FrameClass::Tagged);
        }
    }
}
