//! Frames, good and bad.

use std::net::Ipv4Addr;

use rfsis_common::frame::tcp_flags::ACK;
use rfsis_common::heartbeat::MAGIC;
use rfsis_common::maps::FlowKey;

pub const VIP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
pub const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 50);
pub const SERVICE: u16 = 7;
pub const CLIENT_PORT: u16 = 40_000;
pub const FLOW: FlowKey = FlowKey {
    client_addr: u32::from_be_bytes(CLIENT.octets()),
    client_port: CLIENT_PORT,
    service_port: SERVICE,
};

pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
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

pub fn tagged(vlan: u16, frame: &[u8]) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend_from_slice(&[0x81, 0]);
    tagged.extend_from_slice(&vlan.to_be_bytes());
    tagged.extend_from_slice(&frame[12..]);
    tagged
}

pub fn with(mut frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

pub fn malformed_frames() -> Vec<(&'static str, Vec<u8>)> {
    let tcp = || tcp_to_vip(ACK, b"payload");
    vec![
        ("no more than an Ethernet header", tcp()[..14].to_vec()),
        ("cut inside the IPv4 header", tcp()[..30].to_vec()),
        ("cut inside the payload", tcp()[..57].to_vec()),
        ("header length 4", with(tcp(), 14, &[0x44])),
        ("version 6 in IPv4", with(tcp(), 14, &[0x65])),
        (
            "header longer than the packet",
            with(udp_to_vip(), 14, &[0x4f]),
        ),
        (
            "total length beyond the frame",
            with(tcp(), 16, &[0xff, 0xff]),
        ),
        ("total length within the header", with(tcp(), 16, &[0, 19])),
        ("total length 0", with(tcp(), 16, &[0, 0])),
        ("no room for a TCP header", with(tcp(), 16, &[0, 39])),
        ("cut ARP", arp(1, CLIENT, VIP, &[])[..41].to_vec()),
        ("cut VLAN tag", tagged(0, &tcp())[..17].to_vec()),
    ]
}

/// An untagged IPv4 frame from the VIP.
pub fn from_vip(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(26..30) == Some(&VIP.octets())
}
