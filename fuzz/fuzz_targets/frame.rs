//! Frames: what the programs in the kernel take a frame for is what the agent's parser reads in it.

#![no_main]

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rfsis_agent::datagrams::{Datagrams, DatagramsConfig};
use rfsis_agent::handler::HandlerKind;
use rfsis_agent::metrics::Metrics;
use rfsis_agent::segment;
use rfsis_common::frame::{FrameClass, classify, refused_udp_port};
use rfsis_common::maps::Direction;
use smoltcp::wire::{IpProtocol, Ipv4Packet, UdpPacket};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);

static COUNTERS: OnceLock<Metrics> = OnceLock::new();

fuzz_target!(|frame: &[u8]| {
    let classified = classify(&frame, u32::from(VIP));
    let direction = classified.direction;
    let is_vip = classified.class == FrameClass::Vip;
    let Some(packet) = frame.get(classified.l3_offset..).filter(|_| is_vip) else {
        assert!(classified.tcp().is_none() || is_vip);
        return;
    };
    let _ = refused_udp_port(&frame, classified.l3_offset);
    let headers = segment::parse_headers(packet, direction);
    if let (Some(tcp), Ok((flow, segment))) = (classified.tcp(), &headers) {
        assert_eq!(tcp.flow, *flow);
        assert_eq!(tcp.seq, segment.seq);
        assert_eq!(tcp.window, segment.window);
        assert_eq!(segment.ack.unwrap_or(tcp.ack), tcp.ack);
        assert_eq!(tcp.payload as usize, segment.payload.len());
    }
    // With sums that are right more of the parser is reached.
    let mut packet = packet.to_vec();
    complete(&mut packet);
    if let Ok((flow, whole)) = segment::parse(&packet, direction) {
        let tcp = classified
            .tcp()
            .expect("a segment that the programs do not see");
        assert_eq!((tcp.flow, tcp.seq), (flow, whole.seq));
    }
    let counters = COUNTERS.get_or_init(|| Metrics::new("fuzz").expect("metrics"));
    for direction in [Direction::ToVip, Direction::FromVip] {
        let mut datagrams = Datagrams::new(
            DatagramsConfig {
                vip: VIP,
                services: HashMap::from([(7, HandlerKind::Echo)]),
                window: 1_000_000_000,
            },
            counters.datagrams_replayed.clone(),
        );
        datagrams.process_frame(&packet, direction, 1);
        datagrams.go_live(2, |answer| {
            let ip = Ipv4Packet::new_checked(answer).expect("a sound answer");
            assert_eq!(ip.src_addr(), VIP);
        });
    }
});

/// Fills in the checksums.
fn complete(packet: &mut [u8]) {
    let Ok(mut ip) = Ipv4Packet::new_checked(&mut *packet) else {
        return;
    };
    if usize::from(ip.header_len()) < 20 {
        return;
    }
    ip.fill_checksum();
    let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
    if ip.next_header() == IpProtocol::Udp
        && let Ok(mut udp) = UdpPacket::new_checked(ip.payload_mut())
    {
        udp.fill_checksum(&from, &to);
    }
    segment::complete_checksum(packet);
}
