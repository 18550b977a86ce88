//! Frames, good and bad.

use std::net::Ipv4Addr;

use rfsis_common::heartbeat::MAGIC;
use rfsis_common::maps::FlowKey;

pub const VIP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
pub const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 50);
pub const SERVICE: u16 = 7;
/// Of a service whose answer only the active knows.
pub const OBSERVED: u16 = 13;
pub const CLIENT_PORT: u16 = 40_000;
pub const FLOW: FlowKey = FlowKey {
    client_addr: u32::from_be_bytes(CLIENT.octets()),
    client_port: CLIENT_PORT,
    service_port: SERVICE,
};

/// Whom frames are addressed to.
pub const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Whom copies are addressed to.
pub const STANDBY: [u8; 6] = [2, 0, 0, 0, 0, 0x42];

pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [OWN_MAC, [2, 0, 0, 0, 0, 2]].concat();
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

pub fn ipv4(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let total = (20 + payload.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&total.to_be_bytes());
    packet.extend_from_slice(&[0, 1, 0, 0, 64, protocol, 0, 0]);
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(payload);
    packet
}

pub fn segment(source: u16, destination: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend_from_slice(&source.to_be_bytes());
    segment.extend_from_slice(&destination.to_be_bytes());
    segment.extend_from_slice(&1000_u32.to_be_bytes());
    segment.extend_from_slice(&2000_u32.to_be_bytes());
    segment.extend_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(payload);
    segment
}

pub fn tcp_to_vip(flags: u8, payload: &[u8]) -> Vec<u8> {
    let segment = segment(CLIENT_PORT, SERVICE, flags, payload);
    ethernet(0x0800, &ipv4(6, CLIENT, VIP, &segment))
}

pub fn tcp_from_vip(flags: u8, payload: &[u8]) -> Vec<u8> {
    tcp_from_port(SERVICE, flags, payload)
}

pub fn tcp_from_port(port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let segment = segment(port, CLIENT_PORT, flags, payload);
    ethernet(0x0800, &ipv4(6, VIP, CLIENT, &segment))
}

pub fn udp_to_vip() -> Vec<u8> {
    ethernet(0x0800, &ipv4(17, CLIENT, VIP, &[156, 64, 0, 7, 0, 8, 0, 0]))
}

pub fn udp_from_vip() -> Vec<u8> {
    ethernet(0x0800, &ipv4(17, VIP, CLIENT, &[0, 7, 156, 64, 0, 8, 0, 0]))
}

/// ICMP port unreachable (RFC 792) of the VIP's, with the head of the datagram that is refused.
pub fn refusal(port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    let refused = ipv4(17, CLIENT, VIP, &[156, 64, high, low, 0, 8, 0, 0]);
    let icmp = [&[3, 3, 0, 0, 0, 0, 0, 0], &refused[..]].concat();
    ethernet(0x0800, &ipv4(1, VIP, CLIENT, &icmp))
}

pub fn arp(operation: u8, sender: Ipv4Addr, target: Ipv4Addr, trailer: &[u8]) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 2];
    packet.extend_from_slice(&sender.octets());
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&target.octets());
    packet.extend_from_slice(trailer);
    ethernet(0x0806, &packet)
}

pub fn heartbeat() -> Vec<u8> {
    let mut trailer = [0x5a; 88];
    trailer[..4].copy_from_slice(&MAGIC);
    arp(1, OWN, Ipv4Addr::new(192, 168, 1, 2), &trailer)
}

pub fn tagged(tci: u16, frame: &[u8]) -> Vec<u8> {
    tagged_as(0x8100, tci, frame)
}

/// With a tag of this EtherType.
pub fn tagged_as(ethertype: u16, tci: u16, frame: &[u8]) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend_from_slice(&ethertype.to_be_bytes());
    tagged.extend_from_slice(&tci.to_be_bytes());
    tagged.extend_from_slice(&frame[12..]);
    tagged
}

pub fn with(mut frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

/// An IPv4 frame with so many words of options, NOPs, behind its header.
pub fn with_ip_options(mut frame: Vec<u8>, words: u8) -> Vec<u8> {
    frame.splice(34..34, vec![1; 4 * usize::from(words)]);
    frame[14] += words;
    let total = u16::from_be_bytes([frame[16], frame[17]]) + 4 * u16::from(words);
    with(frame, 16, &total.to_be_bytes())
}

/// An IPv4 frame cut to so many bytes from its IPv4 header on, which says so.
pub fn shortened(mut frame: Vec<u8>, total: u16) -> Vec<u8> {
    frame.truncate(14 + usize::from(total));
    with(frame, 16, &total.to_be_bytes())
}

pub fn padded(mut frame: Vec<u8>, len: usize) -> Vec<u8> {
    frame.resize(len, 0);
    frame
}

/// An untagged IPv4 frame from the VIP.
pub fn from_vip(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(26..30) == Some(&VIP.octets())
}
