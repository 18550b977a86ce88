//! A mirrored TCP segment, parsed and verified once.

use std::net::Ipv4Addr;

use rfsis_common::maps::{Direction, FlowKey};
use rfsis_common::mirror::HELD_URGENT;
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpOption, TcpPacket};

/// Why a mirrored frame is not a segment for a shadow, nor a datagram to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SegmentError {
    /// Lengths that contradict each other.
    #[error("malformed IPv4, TCP or UDP header")]
    Malformed,
    /// ICMP, a fragment: another protocol than was asked for, or not in one piece.
    #[error("not an unfragmented packet of its protocol")]
    NotTcp,
    /// The kernel of the active would drop it too.
    #[error("bad checksum")]
    BadChecksum,
}

/// What of a TCP header matters here (RFC 9293 section 3.1), in wire units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Sequence number of the first byte (or of the SYN).
    pub seq: u32,
    /// Acknowledgement number, if the ACK flag is set.
    pub ack: Option<u32>,
    /// Synchronise.
    pub syn: bool,
    /// No more data from sender.
    pub fin: bool,
    /// Reset.
    pub rst: bool,
    /// Of a copy: the original, a SYN-ACK, is held until the standby knows the flow.
    pub held: bool,
    /// Of such a copy: the program has told the active's kernel that it is here.
    pub answered: bool,
    /// Window field, unscaled.
    pub window: u16,
    /// Options.
    pub options: Options,
    /// Data.
    pub payload: &'a [u8],
}

/// The options that both ends must agree on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Maximum segment size, bytes.
    pub mss: Option<u16>,
    /// Window shift (RFC 7323 section 2).
    pub window_scale: Option<u8>,
    /// SACK permitted (RFC 2018 section 2).
    pub sack_permitted: bool,
    /// Timestamp value and echo (RFC 7323 section 3).
    pub timestamp: Option<(u32, u32)>,
}

impl Segment<'_> {
    /// The sequence number behind this segment.
    pub fn end(&self) -> u32 {
        self.seq
            .wrapping_add(self.payload.len() as u32)
            .wrapping_add(u32::from(self.syn))
            .wrapping_add(u32::from(self.fin))
    }
}

/// Parses an IPv4 packet that goes to or from the VIP.
///
/// A checksum is right when it is complete, or when it is the bare sum over the pseudo header: that
/// is what a sender on the same machine leaves to a network card that then is none (veth with
/// transmit checksum offload, `CHECKSUM_PARTIAL` in linux/skbuff.h).
pub fn parse(packet: &[u8], direction: Direction) -> Result<(FlowKey, Segment<'_>), SegmentError> {
    let ip = parse_ipv4(packet, IpProtocol::Tcp)?;
    let tcp = TcpPacket::new_checked(ip.payload()).map_err(|_| SegmentError::Malformed)?;
    let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
    if !tcp.verify_partial_checksum(&from, &to) && !tcp.verify_checksum(&from, &to) {
        return Err(SegmentError::BadChecksum);
    }
    read(&ip, direction)
}

/// Parses a packet that this host's kernel sends or has taken, perhaps without its payload and without
/// a finished checksum.
pub fn parse_headers(
    packet: &[u8],
    direction: Direction,
) -> Result<(FlowKey, Segment<'_>), SegmentError> {
    let ip = Ipv4Packet::new_checked(packet).map_err(|_| SegmentError::Malformed)?;
    if ip.next_header() != IpProtocol::Tcp {
        return Err(SegmentError::NotTcp);
    }
    read(&ip, direction)
}

/// Finishes the checksum of a TCP packet that a network card was to finish.
pub fn complete_checksum(packet: &mut [u8]) {
    let Ok(mut ip) = Ipv4Packet::new_checked(packet) else {
        return;
    };
    let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
    if let Ok(mut tcp) = TcpPacket::new_checked(ip.payload_mut()) {
        tcp.fill_checksum(&from, &to);
    }
}

fn read<'a>(
    ip: &Ipv4Packet<&'a [u8]>,
    direction: Direction,
) -> Result<(FlowKey, Segment<'a>), SegmentError> {
    let (source, destination) = (ip.src_addr(), ip.dst_addr());
    let tcp = TcpPacket::new_checked(ip.payload()).map_err(|_| SegmentError::Malformed)?;
    if tcp.header_len() < 20 {
        return Err(SegmentError::Malformed);
    }
    let flow = match direction {
        Direction::ToVip => flow_key(source, tcp.src_port(), tcp.dst_port()),
        Direction::FromVip => flow_key(destination, tcp.dst_port(), tcp.src_port()),
    };
    let segment = Segment {
        seq: tcp.seq_number().0 as u32,
        ack: tcp.ack().then(|| tcp.ack_number().0 as u32),
        syn: tcp.syn(),
        fin: tcp.fin(),
        rst: tcp.rst(),
        held: !tcp.urg() && tcp.urgent_at() == HELD_URGENT,
        answered: false,
        window: tcp.window_len(),
        options: parse_options(tcp.options()),
        payload: tcp.payload(),
    };
    Ok((flow, segment))
}

/// An IPv4 packet of this protocol in one piece, its header verified.
pub fn parse_ipv4(packet: &[u8], protocol: IpProtocol) -> Result<Ipv4Packet<&[u8]>, SegmentError> {
    let ip = Ipv4Packet::new_checked(packet).map_err(|_| SegmentError::Malformed)?;
    if ip.version() != 4 || ip.header_len() < 20 {
        return Err(SegmentError::Malformed);
    }
    if ip.next_header() != protocol || ip.more_frags() || ip.frag_offset() != 0 {
        return Err(SegmentError::NotTcp);
    }
    if !ip.verify_checksum() {
        return Err(SegmentError::BadChecksum);
    }
    Ok(ip)
}

/// The key of a flow, numbers in host byte order.
pub fn flow_key(client: Ipv4Addr, client_port: u16, service_port: u16) -> FlowKey {
    FlowKey {
        client_addr: u32::from(client),
        client_port,
        service_port,
    }
}

/// Reads options up to the first that is broken, as Linux does (`tcp_parse_options`).
fn parse_options(mut bytes: &[u8]) -> Options {
    let mut options = Options::default();
    while !bytes.is_empty() {
        let Ok((rest, option)) = TcpOption::parse(bytes) else {
            break;
        };
        match option {
            TcpOption::EndOfList => break,
            TcpOption::MaxSegmentSize(mss) => options.mss = Some(mss),
            // RFC 7323 section 2.3: a shift above 14 is read as 14.
            TcpOption::WindowScale(shift) => options.window_scale = Some(shift.min(14)),
            TcpOption::SackPermitted => options.sack_permitted = true,
            TcpOption::TimeStamp { tsval, tsecr } => options.timestamp = Some((tsval, tsecr)),
            _ => {}
        }
        bytes = rest;
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Ipv4Repr, TcpControl, TcpRepr, TcpSeqNumber};

    fn packet(payload: &[u8]) -> Vec<u8> {
        let tcp = TcpRepr {
            src_port: 4000,
            dst_port: 7,
            control: TcpControl::Psh,
            seq_number: TcpSeqNumber(-5),
            ack_number: Some(TcpSeqNumber(9)),
            window_len: 77,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let ip = Ipv4Repr {
            src_addr: Ipv4Addr::new(10, 0, 0, 1),
            dst_addr: Ipv4Addr::new(10, 0, 0, 2),
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; 20 + tcp.buffer_len()];
        let caps = ChecksumCapabilities::default();
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &caps);
        tcp.emit(
            &mut TcpPacket::new_unchecked(&mut bytes[20..]),
            &ip.src_addr.into(),
            &ip.dst_addr.into(),
            &caps,
        );
        bytes
    }

    #[test]
    fn a_segment_is_read_as_it_was_sent() {
        let bytes = packet(b"hello");
        let (flow, segment) = parse(&bytes, Direction::ToVip).unwrap();
        assert_eq!(flow, flow_key(Ipv4Addr::new(10, 0, 0, 1), 4000, 7));
        assert_eq!(segment.seq, u32::MAX - 4);
        assert_eq!((segment.ack, segment.window), (Some(9), 77));
        assert_eq!((segment.payload, segment.end()), (&b"hello"[..], 0));
    }

    #[test]
    fn a_partial_checksum_is_accepted() {
        let mut bytes = packet(b"hello");
        let length = (bytes.len() - 20) as u32;
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let sum = u32::from(from) as u64 + u32::from(to) as u64 + 6 + u64::from(length);
        let mut folded = (sum >> 48) + (sum >> 32 & 0xffff) + (sum >> 16 & 0xffff) + (sum & 0xffff);
        folded = (folded >> 16) + (folded & 0xffff);
        TcpPacket::new_unchecked(&mut bytes[20..]).set_checksum(folded as u16);
        assert!(parse(&bytes, Direction::ToVip).is_ok());
    }

    proptest! {
        #[test]
        fn a_flipped_bit_in_the_data_is_a_bad_checksum(bit in 0usize..40) {
            let mut bytes = packet(b"hello");
            let at = bytes.len() - 5 + bit / 8;
            bytes[at] ^= 1 << (bit % 8);
            prop_assert_eq!(parse(&bytes, Direction::ToVip), Err(SegmentError::BadChecksum));
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..120), cut in 0usize..60,
        ) {
            let _ = parse(&bytes, Direction::ToVip);
            let mut good = packet(&bytes);
            good.truncate(cut);
            let _ = parse(&good, Direction::FromVip);
        }
    }
}
