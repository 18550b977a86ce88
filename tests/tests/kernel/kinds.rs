//! Every kind of frame, sound or not, and what the programs do with it.

use std::net::Ipv4Addr;

use rfsis_common::frame::tcp_flags::{ACK, ECE, FIN, RST, SYN};
use rfsis_common::heartbeat::MAGIC;
use rfsis_common::maps::Direction;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

use crate::frames::{
    CLIENT, CLIENT_PORT, OWN, SERVICE, VIP, arp, ethernet, heartbeat, ipv4, padded, refusal,
    segment, shortened, tagged, tagged_as, tcp_from_port, tcp_from_vip, tcp_to_vip, udp_from_vip,
    udp_to_vip, with, with_ip_options,
};

/// What the programs do with a frame.
#[derive(Clone, Copy)]
pub struct Answers {
    /// Caught by a node that is not active, by an active one, and there with the flow live.
    pub caught: [XdpVerdict; 3],
    /// At the gate: closed, open, and open with the flow approved.
    pub gate: [GateVerdict; 3],
    pub direction: Direction,
    /// The standby gets a copy of what goes on.
    pub copied: bool,
}

const TO_VIP_TCP: Answers = Answers {
    caught: [
        XdpVerdict::Mirrored,
        XdpVerdict::PassVip,
        XdpVerdict::Mirrored,
    ],
    gate: [GateVerdict::Other; 3],
    direction: Direction::ToVip,
    copied: true,
};
/// TCP of no flow that is live, other protocols, and fragments without a TCP header.
const TO_VIP: Answers = Answers {
    caught: [
        XdpVerdict::Mirrored,
        XdpVerdict::PassVip,
        XdpVerdict::PassVip,
    ],
    ..TO_VIP_TCP
};
const FROM_VIP_TCP: Answers = Answers {
    gate: [
        GateVerdict::Closed,
        GateVerdict::Passed,
        GateVerdict::Passed,
    ],
    direction: Direction::FromVip,
    ..TO_VIP_TCP
};
const FROM_VIP: Answers = Answers {
    caught: TO_VIP.caught,
    ..FROM_VIP_TCP
};
const FAREWELL: Answers = Answers {
    gate: [GateVerdict::Closed, GateVerdict::Held, GateVerdict::Passed],
    ..FROM_VIP_TCP
};
const REFUSAL: Answers = Answers {
    gate: [GateVerdict::Closed, GateVerdict::Held, GateVerdict::Held],
    ..FROM_VIP
};
const WHO_HAS_VIP: Answers = Answers {
    copied: false,
    ..TO_VIP
};
const VIP_IS_AT: Answers = Answers {
    caught: [XdpVerdict::Other; 3],
    gate: FROM_VIP.gate,
    ..WHO_HAS_VIP
};
const FOREIGN: Answers = Answers {
    caught: [XdpVerdict::Other; 3],
    ..WHO_HAS_VIP
};
const HEARTBEAT: Answers = Answers {
    caught: [XdpVerdict::Heartbeat; 3],
    ..FOREIGN
};
const TAGGED: Answers = Answers {
    caught: [XdpVerdict::Tagged; 3],
    ..FOREIGN
};
/// The gate fails closed: it may be the VIP's.
const MALFORMED: Answers = Answers {
    caught: [XdpVerdict::Malformed; 3],
    gate: FROM_VIP.gate,
    ..FOREIGN
};

pub type Row = (&'static str, Vec<u8>, Answers);

fn data() -> Vec<u8> {
    tcp_to_vip(ACK, b"hello")
}

fn reply() -> Vec<u8> {
    tcp_from_vip(ACK, b"hi")
}

pub fn fin() -> Vec<u8> {
    tcp_from_vip(FIN | ACK, b"")
}

fn who_has_vip() -> Vec<u8> {
    arp(1, CLIENT, VIP, &[])
}

fn vip_is_at() -> Vec<u8> {
    arp(2, VIP, CLIENT, &[])
}

/// Flags and fragment offset in units of eight bytes (RFC 791 section 3.1).
fn fragment(frame: Vec<u8>, more: bool, offset: u16) -> Vec<u8> {
    let field = u16::from(more) << 13 | offset;
    with(frame, 20, &field.to_be_bytes())
}

fn protocol(number: u8, frame: Vec<u8>) -> Vec<u8> {
    with(frame, 23, &[number])
}

fn link_rows() -> Vec<Row> {
    let elsewhere = Answers {
        copied: false,
        ..TO_VIP_TCP
    };
    vec![
        (
            "an Ethernet header of IPv4",
            data()[..14].to_vec(),
            MALFORMED,
        ),
        (
            "an Ethernet header of ARP",
            vip_is_at()[..14].to_vec(),
            MALFORMED,
        ),
        ("an Ethernet header of IPv6", ethernet(0x86dd, &[]), FOREIGN),
        (
            "an Ethernet header of a VLAN",
            tagged(0, &data())[..14].to_vec(),
            MALFORMED,
        ),
        (
            "cut in the VLAN tag",
            tagged(0, &data())[..17].to_vec(),
            MALFORMED,
        ),
        (
            "cut behind the VLAN tag",
            tagged(0, &data())[..18].to_vec(),
            MALFORMED,
        ),
        ("IPv6", ethernet(0x86dd, &[0x60; 40]), FOREIGN),
        ("a length for a type", ethernet(46, &data()[14..]), FOREIGN),
        ("an unknown type", ethernet(0x88cc, &data()[14..]), FOREIGN),
        ("priority tag", tagged(0, &data()), TO_VIP_TCP),
        (
            "priority tag, priority 7",
            tagged(0xe000, &data()),
            TO_VIP_TCP,
        ),
        (
            "priority tag, drop eligible",
            tagged(0x1000, &data()),
            TO_VIP_TCP,
        ),
        (
            "priority tag, 802.1ad",
            tagged_as(0x88a8, 0, &data()),
            TO_VIP_TCP,
        ),
        ("priority tag, output", tagged(0, &reply()), FROM_VIP_TCP),
        ("priority tag, FIN", tagged(0, &fin()), FAREWELL),
        (
            "priority tag, refusal",
            tagged(0, &refusal(SERVICE)),
            REFUSAL,
        ),
        (
            "priority tag, who has the VIP",
            tagged(0, &who_has_vip()),
            WHO_HAS_VIP,
        ),
        (
            "priority tag, ARP of the VIP",
            tagged(0, &vip_is_at()),
            VIP_IS_AT,
        ),
        (
            "priority tag, IPv6",
            tagged(0, &ethernet(0x86dd, &[0x60; 40])),
            FOREIGN,
        ),
        ("priority tag, heartbeat", tagged(0, &heartbeat()), FOREIGN),
        ("VLAN 1", tagged(1, &data()), TAGGED),
        ("VLAN 4095", tagged(0x0fff, &data()), TAGGED),
        ("VLAN 5, 802.1ad", tagged_as(0x88a8, 5, &data()), TAGGED),
        ("VLAN 5, output", tagged(5, &fin()), TAGGED),
        ("VLAN 5, malformed", tagged(5, &data()[..14]), TAGGED),
        ("VLAN 3, heartbeat", tagged(3, &heartbeat()), TAGGED),
        ("two tags", tagged(0, &tagged(7, &data())), TAGGED),
        ("two priority tags", tagged(0, &tagged(0, &data())), TAGGED),
        (
            "priority tag in 802.1ad",
            tagged_as(0x88a8, 0, &tagged(0, &data())),
            TAGGED,
        ),
        (
            "to another hardware address",
            with(data(), 5, &[0x77]),
            elsewhere,
        ),
        (
            "to all hardware addresses",
            with(data(), 0, &[0xff; 6]),
            elsewhere,
        ),
    ]
}

fn arp_rows() -> Vec<Row> {
    let other_host = Ipv4Addr::new(192, 168, 1, 77);
    let peer = Ipv4Addr::new(192, 168, 1, 2);
    let trailer = |bytes: &[u8]| arp(1, OWN, peer, bytes);
    vec![
        (
            "ARP without its last byte",
            vip_is_at()[..41].to_vec(),
            MALFORMED,
        ),
        ("who has the VIP", who_has_vip(), WHO_HAS_VIP),
        (
            "who has the VIP, padded",
            padded(who_has_vip(), 60),
            WHO_HAS_VIP,
        ),
        (
            "a probe for the VIP",
            arp(1, Ipv4Addr::UNSPECIFIED, VIP, &[]),
            WHO_HAS_VIP,
        ),
        ("who has another", arp(1, CLIENT, other_host, &[]), FOREIGN),
        ("a reply to the VIP", arp(2, CLIENT, VIP, &[]), FOREIGN),
        ("operation 0 for the VIP", arp(0, CLIENT, VIP, &[]), FOREIGN),
        (
            "operation 257 for the VIP",
            with(who_has_vip(), 20, &[1]),
            FOREIGN,
        ),
        ("a reply from the VIP", vip_is_at(), VIP_IS_AT),
        ("a request from the VIP", arp(1, VIP, VIP, &[]), VIP_IS_AT),
        (
            "operation 3 from the VIP",
            arp(3, VIP, CLIENT, &[]),
            VIP_IS_AT,
        ),
        (
            "another kind of hardware",
            with(who_has_vip(), 15, &[6]),
            FOREIGN,
        ),
        (
            "another protocol",
            with(who_has_vip(), 16, &[0x86, 0xdd]),
            FOREIGN,
        ),
        (
            "hardware addresses of 8",
            with(who_has_vip(), 18, &[8]),
            FOREIGN,
        ),
        (
            "protocol addresses of 16",
            with(who_has_vip(), 19, &[16]),
            FOREIGN,
        ),
        ("heartbeat", heartbeat(), HEARTBEAT),
        ("heartbeat, long", padded(heartbeat(), 700), HEARTBEAT),
        (
            "heartbeat for the VIP",
            with(heartbeat(), 38, &VIP.octets()),
            HEARTBEAT,
        ),
        ("magic and no more", trailer(&MAGIC), HEARTBEAT),
        ("three bytes of magic", trailer(&MAGIC[..3]), FOREIGN),
        ("no trailer", trailer(&[]), FOREIGN),
        ("another magic", with(heartbeat(), 42, &[0]), FOREIGN),
        (
            "another magic, last byte",
            with(heartbeat(), 45, &[0]),
            FOREIGN,
        ),
        ("heartbeat to all", with(heartbeat(), 21, &[2]), HEARTBEAT),
        ("heartbeat as RARP", with(heartbeat(), 21, &[3]), FOREIGN),
        (
            "heartbeat in the name of the VIP",
            with(heartbeat(), 28, &VIP.octets()),
            VIP_IS_AT,
        ),
    ]
}

fn ipv4_rows() -> Vec<Row> {
    let other_host = Ipv4Addr::new(192, 168, 1, 77);
    let between = |from, to| ethernet(0x0800, &ipv4(6, from, to, &segment(9, 9, FIN, b"")));
    let headers = |words| with_ip_options(udp_to_vip(), words);
    vec![
        ("cut in the IPv4 header", data()[..33].to_vec(), MALFORMED),
        (
            "cut in a tagged IPv4 header",
            tagged(0, &data())[..37].to_vec(),
            MALFORMED,
        ),
        (
            "cut in the IP options",
            with_ip_options(data(), 10)[..70].to_vec(),
            MALFORMED,
        ),
        (
            "cut before the IP options",
            with_ip_options(data(), 10)[..34].to_vec(),
            MALFORMED,
        ),
        (
            "IP options, one word",
            with_ip_options(data(), 1),
            TO_VIP_TCP,
        ),
        (
            "IP options, ten words",
            with_ip_options(data(), 10),
            TO_VIP_TCP,
        ),
        ("IP options and FIN", with_ip_options(fin(), 10), FAREWELL),
        ("IP options and nothing", shortened(headers(10), 60), TO_VIP),
        (
            "IP options where TCP should be",
            shortened(with_ip_options(data(), 10), 60),
            MALFORMED,
        ),
        ("header length 0", with(data(), 14, &[0x40]), MALFORMED),
        ("header length 16", with(data(), 14, &[0x44]), MALFORMED),
        (
            "header longer than the packet",
            with(udp_to_vip(), 14, &[0x4f]),
            MALFORMED,
        ),
        (
            "header as long as TCP and it",
            with(tcp_to_vip(ACK, b""), 14, &[0x4a]),
            MALFORMED,
        ),
        ("version 0", with(data(), 14, &[0x05]), MALFORMED),
        ("version 5", with(data(), 14, &[0x55]), MALFORMED),
        ("version 6", with(data(), 14, &[0x65]), MALFORMED),
        ("version 15", with(data(), 14, &[0xf5]), MALFORMED),
        ("version 6, output", with(fin(), 14, &[0x65]), MALFORMED),
        ("total length 0", with(data(), 16, &[0, 0]), MALFORMED),
        ("total length 19", with(data(), 16, &[0, 19]), MALFORMED),
        (
            "total length 20, UDP",
            with(udp_to_vip(), 16, &[0, 20]),
            TO_VIP,
        ),
        (
            "total length one too much",
            with(data(), 16, &[0, 46]),
            MALFORMED,
        ),
        (
            "total length far too much",
            with(data(), 16, &[0xff, 0xff]),
            MALFORMED,
        ),
        (
            "total length too much, output",
            with(fin(), 16, &[0, 41]),
            MALFORMED,
        ),
        (
            "total length less than the frame",
            with(data(), 16, &[0, 41]),
            TO_VIP_TCP,
        ),
        ("one byte of padding", padded(data(), 60), TO_VIP_TCP),
        ("padded, FIN", padded(fin(), 60), FAREWELL),
        ("padded beyond any frame", padded(data(), 1600), TO_VIP_TCP),
        ("data cut off", data()[..58].to_vec(), MALFORMED),
        (
            "a wrong IP checksum, hop limit 0",
            with(data(), 22, &[0, 6, 9, 9]),
            TO_VIP_TCP,
        ),
        (
            "may not be fragmented",
            with(data(), 20, &[0x40]),
            TO_VIP_TCP,
        ),
        ("the reserved flag", with(data(), 20, &[0x80]), TO_VIP_TCP),
        ("first fragment", fragment(data(), true, 0), TO_VIP_TCP),
        ("first fragment, output", fragment(fin(), true, 0), FAREWELL),
        (
            "first fragment without a TCP header",
            fragment(shortened(data(), 28), true, 0),
            MALFORMED,
        ),
        ("later fragment", fragment(data(), true, 1), TO_VIP),
        ("last fragment", fragment(data(), false, 0x1fff), TO_VIP),
        ("later fragment, output", fragment(fin(), true, 1), FROM_VIP),
        (
            "later fragment of 8 bytes",
            fragment(shortened(data(), 28), false, 3),
            TO_VIP,
        ),
        (
            "first fragment of UDP",
            fragment(udp_to_vip(), true, 0),
            TO_VIP,
        ),
        (
            "later fragment of UDP, output",
            fragment(udp_from_vip(), false, 9),
            FROM_VIP,
        ),
        ("between others", between(CLIENT, other_host), FOREIGN),
        ("from the host itself", between(OWN, CLIENT), FOREIGN),
        ("to the host itself", between(CLIENT, OWN), FOREIGN),
        (
            "malformed, between others",
            with(between(CLIENT, OWN), 14, &[0x60]),
            FOREIGN,
        ),
        (
            "from the VIP to itself",
            with(data(), 26, &VIP.octets()),
            FROM_VIP,
        ),
    ]
}

fn transport_rows() -> Vec<Row> {
    let to_port = |port: u16| with(data(), 36, &port.to_be_bytes());
    let icmp = |kind: u8, code| with(refusal(SERVICE), 34, &[kind, code]);
    let mut rows = vec![
        ("data", data(), TO_VIP_TCP),
        (
            "the shortest frame",
            padded(tcp_to_vip(ACK, b""), 60),
            TO_VIP_TCP,
        ),
        (
            "the longest frame without jumbo",
            tcp_to_vip(ACK, &[7; 1460]),
            TO_VIP_TCP,
        ),
        ("output", reply(), FROM_VIP_TCP),
        (
            "output, the longest",
            tcp_from_vip(ACK, &[7; 1460]),
            FROM_VIP_TCP,
        ),
        (
            "another port of the client",
            with(data(), 34, &[1, 1]),
            TO_VIP,
        ),
        ("another client", with(data(), 29, &[51]), TO_VIP),
        ("no service's port", to_port(9999), TO_VIP),
        (
            "RST of no service's port",
            tcp_from_port(9999, RST, b""),
            FROM_VIP,
        ),
        (
            "FIN for another client",
            with(fin(), 33, &[51]),
            Answers {
                gate: REFUSAL.gate,
                ..FROM_VIP
            },
        ),
        ("cut in the TCP header", data()[..53].to_vec(), MALFORMED),
        ("a TCP header of 19", shortened(data(), 39), MALFORMED),
        ("a TCP header of 0", shortened(data(), 20), MALFORMED),
        (
            "a TCP header of 19, output",
            shortened(fin(), 39),
            MALFORMED,
        ),
        ("data offset 0", with(data(), 46, &[0x00]), TO_VIP_TCP),
        ("data offset 4", with(data(), 46, &[0x40]), TO_VIP_TCP),
        ("data offset 15", with(data(), 46, &[0xf0]), TO_VIP_TCP),
        ("data offset 15, FIN", with(fin(), 46, &[0xf0]), FAREWELL),
        ("data offset 0, FIN", with(fin(), 46, &[0x00]), FAREWELL),
        (
            "TCP option of length 0",
            option(&[8, 0, 1, 1], ACK),
            FROM_VIP_TCP,
        ),
        (
            "TCP option of length 1",
            option(&[5, 1, 1, 1], ACK),
            FROM_VIP_TCP,
        ),
        (
            "TCP option beyond the header",
            option(&[5, 34, 1, 1], FIN),
            FAREWELL,
        ),
        ("UDP", udp_to_vip(), TO_VIP),
        ("UDP, output", udp_from_vip(), FROM_VIP),
        (
            "cut in the UDP header",
            udp_to_vip()[..41].to_vec(),
            MALFORMED,
        ),
        ("a UDP header of 7", shortened(udp_to_vip(), 27), TO_VIP),
        (
            "a UDP header of 0, output",
            shortened(udp_from_vip(), 20),
            FROM_VIP,
        ),
        ("refusal of a service", refusal(SERVICE), REFUSAL),
        (
            "refusal behind IP options",
            with_ip_options(refusal(SERVICE), 10),
            REFUSAL,
        ),
        ("refusal of no service", refusal(9999), FROM_VIP),
        (
            "refusal cut before the port",
            shortened(refusal(SERVICE), 51),
            FROM_VIP,
        ),
        ("refusal of TCP", with(refusal(SERVICE), 51, &[6]), FROM_VIP),
        ("host unreachable", icmp(3, 1), FROM_VIP),
        ("an answer to a ping", icmp(0, 0), FROM_VIP),
    ];
    for flags in [FIN, RST, FIN | ACK, RST | ACK, SYN | FIN, 0xff] {
        rows.push(("a farewell", tcp_from_vip(flags, b""), FAREWELL));
        rows.push((
            "a farewell with data",
            tcp_from_vip(flags, b"bye"),
            FAREWELL,
        ));
        rows.push(("a client's farewell", tcp_to_vip(flags, b""), TO_VIP_TCP));
    }
    for flags in [0, ACK, SYN, ECE | ACK, !(FIN | RST)] {
        rows.push(("no farewell", tcp_from_vip(flags, b""), FROM_VIP_TCP));
    }
    for number in [0, 1, 2, 50, 132, 255] {
        rows.push(("another protocol", protocol(number, data()), TO_VIP));
        rows.push((
            "another protocol, output",
            protocol(number, fin()),
            FROM_VIP,
        ));
    }
    rows
}

/// A segment of the VIP's with an option of four bytes.
fn option(option: &[u8; 4], flags: u8) -> Vec<u8> {
    let mut tcp = segment(SERVICE, CLIENT_PORT, flags, option);
    tcp[12] = 0x60;
    ethernet(0x0800, &ipv4(6, VIP, CLIENT, &tcp))
}

/// All of them.
pub fn rows() -> Vec<Row> {
    [link_rows(), arp_rows(), ipv4_rows(), transport_rows()].concat()
}
