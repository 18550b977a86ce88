//! The programs in the kernel: verdicts, rings, attaching and leaving no trace. Needs root.
//!
//! Each test has a network namespace of its own: that of its thread, gone with it.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use nix::time::{ClockId, clock_gettime};
use rfsis_agent::bpf::{self, BpfError, LoadParams, Programs, XdpMode};
use rfsis_agent::netif::{Netif, NetifError, VipAddress};
use rfsis_common::frame::tcp_flags::{ACK, FIN, RST, SYN};
use rfsis_common::heartbeat::MAGIC;
use rfsis_common::maps::{
    Direction, FRAME_HEADER_LEN, FRAME_SLOTS, FlowKey, FrameHeader, HEARTBEAT_CAPTURE,
    HeartbeatEvent, HeldEvent, NodeState, State,
};
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

const VIP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 50);
const SERVICE: u16 = 7;
const CLIENT_PORT: u16 = 40_000;
const FLOW: FlowKey = FlowKey {
    client_addr: u32::from_be_bytes(CLIENT.octets()),
    client_port: CLIENT_PORT,
    service_port: SERVICE,
};

/// Runs a test in a network namespace of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let result = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root: `cargo xtask test`");
        test();
    })
    .join();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// A veth pair, both ends here and up; `eth0` has the node's own address.
fn veth(mtu: u32) {
    run(&format!(
        "ip link add eth0 mtu {mtu} type veth peer name peer0 mtu {mtu}"
    ));
    run(&format!("ip addr add {OWN}/24 dev eth0"));
    run("ip link set eth0 up");
    run("ip link set peer0 up");
}

/// What a clean stop must leave as it was; counters and lifetimes left out.
fn snapshot() -> String {
    [
        "tc qdisc show",
        "tc filter show dev eth0 ingress",
        "tc filter show dev eth0 egress",
        "ip addr",
    ]
    .map(run)
    .join("---\n")
}

fn gates() -> usize {
    let filters = run("tc filter show dev eth0 egress");
    filters
        .lines()
        .filter(|line| line.contains("rfsis_gate"))
        .count()
}

fn wait(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(future);
}

fn load() -> Programs {
    load_with_ring(1 << 20)
}

fn load_with_ring(frame_ring_bytes: u32) -> Programs {
    let params = LoadParams {
        vip: VIP,
        service_ports: &[SERVICE],
        frame_ring_bytes,
        max_live_flows: 16,
    };
    Programs::load(params).unwrap_or_else(|error| panic!("{error}"))
}

fn now_ns() -> u64 {
    Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()).as_nanos() as u64
}

fn set_state(programs: &Programs, state: State, lease_ns: u64) {
    let node = NodeState {
        state: state as u64,
        lease_ns,
    };
    let writer = programs.state_map().unwrap();
    writer.write(node).unwrap();
    assert_eq!(writer.read().unwrap(), node);
}

/// A packet socket on an interface, protocol ETH_P_ALL.
fn packet_socket(interface: &str) -> OwnedFd {
    let address: LinkAddr = nix::ifaddrs::getifaddrs()
        .unwrap()
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .unwrap();
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    bind(fd.as_raw_fd(), &address).unwrap();
    fd
}

/// The next frame that fits, or `None` after the time given.
fn receive(fd: &OwnedFd, within: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    use std::os::fd::AsFd as _;
    let deadline = Instant::now() + within;
    let mut buffer = vec![0; 70_000];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap();
        if poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 0 {
            return None;
        }
        let len = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        if fits(&buffer[..len]) {
            return Some(buffer[..len].to_vec());
        }
    }
}

fn from_vip(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(26..30) == Some(&VIP.octets())
}

// Frames. ----------------------------------------------------------------------------------------

fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

fn ipv4(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let total = (20 + payload.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&total.to_be_bytes());
    packet.extend_from_slice(&[0, 1, 0, 0, 64, protocol, 0, 0]);
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(payload);
    packet
}

fn segment(source: u16, destination: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend_from_slice(&source.to_be_bytes());
    segment.extend_from_slice(&destination.to_be_bytes());
    segment.extend_from_slice(&1000_u32.to_be_bytes());
    segment.extend_from_slice(&2000_u32.to_be_bytes());
    segment.extend_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(payload);
    segment
}

fn tcp_to_vip(flags: u8, payload: &[u8]) -> Vec<u8> {
    let segment = segment(CLIENT_PORT, SERVICE, flags, payload);
    ethernet(0x0800, &ipv4(6, CLIENT, VIP, &segment))
}

fn tcp_from_vip(flags: u8, payload: &[u8]) -> Vec<u8> {
    tcp_from_port(SERVICE, flags, payload)
}

fn tcp_from_port(port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let segment = segment(port, CLIENT_PORT, flags, payload);
    ethernet(0x0800, &ipv4(6, VIP, CLIENT, &segment))
}

fn udp_to_vip() -> Vec<u8> {
    ethernet(0x0800, &ipv4(17, CLIENT, VIP, &[156, 64, 0, 7, 0, 8, 0, 0]))
}

fn arp(operation: u8, sender: Ipv4Addr, target: Ipv4Addr, trailer: &[u8]) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 2];
    packet.extend_from_slice(&sender.octets());
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&target.octets());
    packet.extend_from_slice(trailer);
    ethernet(0x0806, &packet)
}

fn heartbeat() -> Vec<u8> {
    let mut trailer = [0x5a; 88];
    trailer[..4].copy_from_slice(&MAGIC);
    arp(1, OWN, Ipv4Addr::new(192, 168, 1, 2), &trailer)
}

fn tagged(vlan: u16, frame: &[u8]) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend_from_slice(&[0x81, 0]);
    tagged.extend_from_slice(&vlan.to_be_bytes());
    tagged.extend_from_slice(&frame[12..]);
    tagged
}

fn with(mut frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

fn malformed_frames() -> Vec<(&'static str, Vec<u8>)> {
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

// Verdicts. --------------------------------------------------------------------------------------

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

/// Runs the XDP program and gives what it did: action and the one verdict that was counted.
fn xdp(programs: &mut Programs, name: &str, frame: &[u8]) -> (u32, XdpVerdict) {
    let counters = programs.counters().unwrap();
    let before = counters.xdp().unwrap();
    let action = programs
        .test_xdp(frame)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let after = counters.xdp().unwrap();
    let moved: Vec<XdpVerdict> = XdpVerdict::ALL
        .into_iter()
        .filter(|verdict| after.get(*verdict) != before.get(*verdict))
        .collect();
    let [verdict] = moved[..] else {
        panic!("{name}: counters moved: {moved:?}");
    };
    assert_eq!(after.get(verdict), before.get(verdict) + 1, "{name}");
    (action, verdict)
}

#[test]
fn xdp_verdicts_follow_class_state_and_live_flows() {
    use XdpVerdict::{Heartbeat, Malformed, Mirrored, Other, PassVip, Tagged};
    in_namespace(|| {
        let mut programs = load();
        let mut frames = programs.take_frames().unwrap();
        let other_host = Ipv4Addr::new(192, 168, 1, 77);
        let tcp = || tcp_to_vip(ACK, b"hello");
        let fragment = |offset| with(tcp(), 20, &[0x20, offset]);
        let options = {
            let mut packet = ipv4(6, CLIENT, VIP, &segment(CLIENT_PORT, SERVICE, ACK, b"x"));
            packet.splice(20..20, [1, 1, 1, 0]);
            packet[0] = 0x46;
            packet[3] += 4;
            ethernet(0x0800, &packet)
        };
        // Name, frame, verdict on the standby, on the active, on the active with the flow live.
        let mut table = vec![
            ("TCP to the VIP", tcp(), Mirrored, PassVip, Mirrored),
            (
                "TCP from the VIP",
                tcp_from_vip(ACK, b"hi"),
                Mirrored,
                PassVip,
                Mirrored,
            ),
            (
                "IP options before TCP",
                options,
                Mirrored,
                PassVip,
                Mirrored,
            ),
            ("UDP to the VIP", udp_to_vip(), Mirrored, PassVip, PassVip),
            ("first fragment", fragment(0), Mirrored, PassVip, Mirrored),
            ("later fragment", fragment(1), Mirrored, PassVip, PassVip),
            (
                "data offset 0",
                with(tcp(), 46, &[0x00]),
                Mirrored,
                PassVip,
                Mirrored,
            ),
            (
                "priority tag",
                tagged(0, &tcp()),
                Mirrored,
                PassVip,
                Mirrored,
            ),
            (
                "who has the VIP",
                arp(1, CLIENT, VIP, &[]),
                Mirrored,
                PassVip,
                PassVip,
            ),
            ("VLAN 5", tagged(5, &tcp()), Tagged, Tagged, Tagged),
            (
                "two tags",
                tagged(0, &tagged(7, &tcp())),
                Tagged,
                Tagged,
                Tagged,
            ),
            (
                "the VIP's own ARP",
                arp(2, VIP, CLIENT, &[]),
                Other,
                Other,
                Other,
            ),
            (
                "ARP for another",
                arp(1, CLIENT, other_host, &[]),
                Other,
                Other,
                Other,
            ),
            (
                "ARP reply to the VIP",
                arp(2, CLIENT, VIP, &[]),
                Other,
                Other,
                Other,
            ),
            (
                "IPv4 between others",
                ethernet(0x0800, &ipv4(6, CLIENT, other_host, &[0; 20])),
                Other,
                Other,
                Other,
            ),
            ("IPv6", ethernet(0x86dd, &[0x60; 40]), Other, Other, Other),
            ("heartbeat", heartbeat(), Heartbeat, Heartbeat, Heartbeat),
            (
                "tagged heartbeat",
                tagged(3, &heartbeat()),
                Tagged,
                Tagged,
                Tagged,
            ),
            (
                "heartbeat as a reply",
                with(heartbeat(), 21, &[2]),
                Other,
                Other,
                Other,
            ),
        ];
        for (name, frame) in malformed_frames() {
            table.push((name, frame, Malformed, Malformed, Malformed));
        }
        let live = programs.live_flows().unwrap();
        for (name, frame, standby, active, active_live) in &table {
            for (state, is_live, expected) in [
                (State::Standby, false, standby),
                (State::Standby, true, standby),
                (State::TakingOver, false, standby),
                (State::Fenced, false, standby),
                (State::Active, false, active),
                (State::Active, true, active_live),
            ] {
                set_state(&programs, state, 0);
                if is_live {
                    live.insert(FLOW).unwrap();
                }
                let name = format!("{name}, {state:?}, live: {is_live}");
                let (action, verdict) = xdp(&mut programs, &name, frame);
                live.remove(&FLOW).unwrap();
                assert_eq!(verdict, *expected, "{name}");
                let dropped = matches!(verdict, Mirrored | Heartbeat);
                assert_eq!(action, if dropped { XDP_DROP } else { XDP_PASS }, "{name}");
                let entry = frames.next();
                assert_eq!(entry.is_some(), verdict == Mirrored, "{name}: copies");
                if let Some(entry) = entry {
                    let (header, copy) = FrameHeader::split(&entry).unwrap();
                    assert_eq!(copy, frame, "{name}");
                    let from = frame.ends_with(b"hi");
                    let direction = if from {
                        Direction::FromVip
                    } else {
                        Direction::ToVip
                    };
                    assert_eq!(header.direction, direction as u32, "{name}");
                    let l3_offset = if name.starts_with("priority tag") {
                        18
                    } else {
                        14
                    };
                    assert_eq!(header.l3_offset, l3_offset, "{name}");
                    assert!(now_ns() - header.arrival_ns < 1_000_000_000, "{name}");
                }
            }
        }
    });
}

#[test]
fn an_unknown_state_reads_as_standby_and_closed() {
    in_namespace(|| {
        let mut programs = load();
        let node = NodeState {
            state: 99,
            lease_ns: u64::MAX,
        };
        programs.state_map().unwrap().write(node).unwrap();
        let (_, verdict) = xdp(&mut programs, "TCP", &tcp_to_vip(ACK, b""));
        assert_eq!(verdict, XdpVerdict::Mirrored);
        let (_, verdict) = gate(&mut programs, "TCP", &tcp_from_vip(ACK, b""));
        assert_eq!(verdict, GateVerdict::Closed);
    });
}

#[test]
fn frames_of_every_length_are_copied_whole() {
    in_namespace(|| {
        let mut programs = load();
        let mut frames = programs.take_frames().unwrap();
        let mut lengths = vec![54, 55, 60, 1514, 9014, 65_000, 65_549];
        for slot in &FRAME_SLOTS[..3] {
            let room = slot - FRAME_HEADER_LEN;
            lengths.extend([room - 1, room, room + 1]);
        }
        for length in lengths {
            let payload: Vec<u8> = (0..length - 54).map(|byte| (byte % 251) as u8).collect();
            let frame = tcp_to_vip(ACK, &payload);
            assert_eq!(frame.len(), length);
            let (_, verdict) = xdp(&mut programs, &format!("{length} bytes"), &frame);
            assert_eq!(verdict, XdpVerdict::Mirrored, "{length} bytes");
            let entry = frames.next().unwrap();
            let (header, copy) = FrameHeader::split(&entry).unwrap();
            assert_eq!(header.len as usize, length);
            assert!(copy == frame, "{length} bytes: the copy differs");
        }
    });
}

#[test]
fn a_full_frame_ring_is_counted_and_the_flow_named() {
    in_namespace(|| {
        let mut programs = load_with_ring(4096);
        let lost = programs.lost_flows().unwrap();
        assert_eq!(lost.drain().unwrap(), []);
        let mut mirrored = 0;
        let frame = tcp_to_vip(ACK, &[7; 1000]);
        while xdp(&mut programs, "TCP", &frame) == (XDP_DROP, XdpVerdict::Mirrored) {
            mirrored += 1;
            assert!(mirrored < 10, "a ring of 4096 bytes took {mirrored} frames");
        }
        assert!(mirrored > 0);
        let noted = lost.drain().unwrap();
        assert_eq!(noted.len(), 1);
        assert_eq!(noted[0].0, FLOW);
        assert!(now_ns() - noted[0].1 < 1_000_000_000);
        assert_eq!(lost.drain().unwrap(), [], "drained entries stay out");

        let (action, verdict) = xdp(&mut programs, "UDP", &[udp_to_vip(), vec![0; 900]].concat());
        assert_eq!((action, verdict), (XDP_DROP, XdpVerdict::MirrorLost));
        assert_eq!(lost.drain().unwrap(), [], "only TCP flows are noted");
    });
}

#[test]
fn heartbeats_reach_their_ring_cut_to_the_captured_length_and_a_full_ring_is_counted() {
    in_namespace(|| {
        let mut programs = load();
        let mut ring = programs.take_heartbeats().unwrap();
        let long = [heartbeat(), vec![9; 500]].concat();
        for frame in [heartbeat(), long.clone()] {
            xdp(&mut programs, "heartbeat", &frame);
            let event = HeartbeatEvent::parse(&ring.next().unwrap()).unwrap();
            assert_eq!(event.frame(), &frame[..frame.len().min(HEARTBEAT_CAPTURE)]);
            assert!(now_ns() - event.arrival_ns < 1_000_000_000);
        }
        let mut taken = 0;
        while xdp(&mut programs, "heartbeat", &long).1 == XdpVerdict::Heartbeat {
            taken += 1;
            assert!(taken < 100_000);
        }
        assert!(
            taken > 900,
            "the ring holds {taken}: less than a second at 1 ms"
        );
        let (action, verdict) = xdp(&mut programs, "heartbeat", &long);
        assert_eq!((action, verdict), (XDP_DROP, XdpVerdict::HeartbeatLost));
    });
}

const UNSPEC: i32 = -1;
const STOLEN: i32 = 4;

fn gate(programs: &mut Programs, name: &str, frame: &[u8]) -> (i32, GateVerdict) {
    let counters = programs.counters().unwrap();
    let before = counters.gate().unwrap();
    let code = programs
        .test_gate(frame)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let after = counters.gate().unwrap();
    let moved: Vec<GateVerdict> = GateVerdict::ALL
        .into_iter()
        .filter(|verdict| after.get(*verdict) != before.get(*verdict))
        .collect();
    let [verdict] = moved[..] else {
        panic!("{name}: counters moved: {moved:?}");
    };
    (code, verdict)
}

#[test]
fn the_gate_follows_state_lease_and_approval() {
    use GateVerdict::{Closed, Held, Other, Passed};
    in_namespace(|| {
        let mut programs = load();
        let approvals = programs.approvals().unwrap();
        let later = now_ns() + 3_600_000_000_000;
        let from_own = ethernet(
            0x0800,
            &ipv4(6, OWN, CLIENT, &segment(22, 1, FIN | ACK, b"")),
        );
        let tcp = |flags| tcp_from_vip(flags, b"");
        let fragment = with(tcp(FIN | ACK), 20, &[0x20, 1]);
        let total_lies = with(tcp(ACK), 16, &[0xff, 0xff]);
        let udp = ethernet(0x0800, &ipv4(17, VIP, CLIENT, &[0, 7, 156, 64, 0, 8, 0, 0]));
        // Name, frame, verdict while closed, while open, while open with the flow approved.
        let table = [
            ("data", tcp_from_vip(ACK, b"data"), Closed, Passed, Passed),
            ("FIN", tcp(FIN | ACK), Closed, Held, Passed),
            ("RST", tcp(RST), Closed, Held, Passed),
            ("RST+ACK", tcp(RST | ACK), Closed, Held, Passed),
            (
                "FIN with data",
                tcp_from_vip(FIN | ACK, b"bye"),
                Closed,
                Held,
                Passed,
            ),
            (
                "FIN behind a priority tag",
                tagged(0, &tcp(FIN | ACK)),
                Closed,
                Held,
                Passed,
            ),
            (
                "RST of no service's port",
                tcp_from_port(9999, RST, b""),
                Closed,
                Passed,
                Passed,
            ),
            ("UDP", udp, Closed, Passed, Passed),
            ("later fragment", fragment, Closed, Passed, Passed),
            (
                "ARP reply for the VIP",
                arp(2, VIP, CLIENT, &[]),
                Closed,
                Passed,
                Passed,
            ),
            (
                "gratuitous ARP",
                arp(1, VIP, VIP, &[]),
                Closed,
                Passed,
                Passed,
            ),
            ("length that lies", total_lies, Closed, Passed, Passed),
            ("FIN of the host itself", from_own, Other, Other, Other),
            ("TCP to the VIP", tcp_to_vip(FIN, b""), Other, Other, Other),
            ("heartbeat", heartbeat(), Other, Other, Other),
            (
                "ARP request of the host",
                arp(1, OWN, CLIENT, &[]),
                Other,
                Other,
                Other,
            ),
            ("IPv6", ethernet(0x86dd, &[0x60; 40]), Other, Other, Other),
        ];
        for (name, frame, closed, open, approved) in &table {
            for (state, lease, approve, expected) in [
                (State::Standby, later, true, closed),
                (State::TakingOver, later, true, closed),
                (State::Fenced, later, true, closed),
                (State::Active, 0, true, closed),
                (State::Active, now_ns() - 1, true, closed),
                (State::Active, later, false, open),
                (State::Active, later, true, approved),
            ] {
                set_state(&programs, state, lease);
                if approve {
                    approvals.approve(FLOW).unwrap();
                }
                let name = format!("{name}, {state:?}, lease {lease}, approved: {approve}");
                let (code, verdict) = gate(&mut programs, &name, frame);
                approvals.revoke(&FLOW).unwrap();
                assert_eq!(verdict, *expected, "{name}");
                let stolen = matches!(verdict, Closed | Held);
                assert_eq!(code, if stolen { STOLEN } else { UNSPEC }, "{name}");
            }
        }
    });
}

#[test]
fn a_held_fin_is_reported_with_its_flow_and_numbers() {
    in_namespace(|| {
        let mut programs = load();
        let mut held = programs.take_held().unwrap();
        set_state(&programs, State::Active, u64::MAX);
        gate(&mut programs, "FIN", &tcp_from_vip(FIN | ACK, b""));
        let event = HeldEvent::parse(&held.next().unwrap()).unwrap();
        assert_eq!(event.flow, FLOW);
        assert_eq!((event.seq, event.ack), (1000, 2000));
        assert_eq!(event.flags, u32::from(FIN | ACK));
        assert!(now_ns() - event.at_ns < 1_000_000_000);
        assert!(held.next().is_none());
    });
}

#[test]
fn a_new_connection_does_not_inherit_an_approval() {
    in_namespace(|| {
        let mut programs = load();
        set_state(&programs, State::Active, u64::MAX);
        let approvals = programs.approvals().unwrap();
        approvals.approve(FLOW).unwrap();
        let fin = tcp_from_vip(FIN | ACK, b"");
        assert_eq!(gate(&mut programs, "FIN", &fin).1, GateVerdict::Passed);
        assert_eq!(
            gate(&mut programs, "FIN again", &fin).1,
            GateVerdict::Passed
        );
        let syn_ack = tcp_from_vip(SYN | ACK, b"");
        assert_eq!(
            gate(&mut programs, "SYN-ACK", &syn_ack).1,
            GateVerdict::Passed
        );
        assert_eq!(
            gate(&mut programs, "FIN of the new one", &fin).1,
            GateVerdict::Held
        );
    });
}

// Attaching. -------------------------------------------------------------------------------------

/// Helper process of the test below: attaches a gate and dies like an agent by `kill -9`.
#[test]
#[ignore = "helper process of other tests"]
fn attach_the_gate_and_die() {
    let lease_ms = std::env::var("RFSIS_TEST_LEASE_MS").expect("not for running by hand");
    let lease_ns = lease_ms.parse::<u64>().unwrap() * 1_000_000;
    let mut programs = load();
    programs.attach_gate("eth0").unwrap();
    programs.attach_xdp("eth0").unwrap();
    set_state(&programs, State::Active, now_ns() + lease_ns);
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn attach_in_a_process_that_dies(lease_ms: u32) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "attach_the_gate_and_die"])
        .env("RFSIS_TEST_LEASE_MS", lease_ms.to_string())
        .output()
        .unwrap();
    use std::os::unix::process::ExitStatusExt as _;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(9), "{text}");
}

#[test]
fn the_gate_outlives_its_process_closed() {
    in_namespace(|| {
        veth(1500);
        let (sender, receiver) = (packet_socket("eth0"), packet_socket("peer0"));
        let frame = tcp_from_vip(ACK, b"x");
        let passes = || {
            send(sender.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
            receive(&receiver, Duration::from_millis(100), from_vip).is_some()
        };
        assert!(passes(), "without a gate the frame arrives");
        attach_in_a_process_that_dies(300);
        assert_eq!(gates(), 1);
        let deadline = Instant::now() + Duration::from_secs(5);
        // The lease of the dead agent runs out by itself.
        while passes() {
            assert!(Instant::now() < deadline, "the gate stays open");
        }
        for _ in 0..3 {
            assert!(!passes(), "the gate opened again");
        }
        assert!(
            !run("ip link show dev eth0").contains("xdp"),
            "XDP goes with its process"
        );
    });
}

#[test]
fn a_gate_is_replaced_without_a_gap_and_never_stacked() {
    in_namespace(|| {
        veth(1500);
        let receiver = packet_socket("peer0");
        attach_in_a_process_that_dies(0);
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let hammer = thread::spawn({
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            let sender = packet_socket("eth0");
            let frame = tcp_from_vip(ACK, b"x");
            move || {
                while !stop.load(Ordering::Relaxed) {
                    send(sender.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..20 {
            let before = sent.load(Ordering::Relaxed);
            let mut programs = load();
            programs.attach_gate("eth0").unwrap();
            assert_eq!(gates(), 1);
            drop(programs);
            assert_eq!(
                gates(),
                1,
                "a gate is left when its agent's handles are dropped"
            );
            while sent.load(Ordering::Relaxed) == before {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        hammer.join().unwrap();
        let leaked = receive(&receiver, Duration::from_millis(100), from_vip);
        assert!(leaked.is_none(), "a frame from the VIP got past the gate");
        assert!(sent.load(Ordering::Relaxed) > 1000);
    });
}

#[test]
fn the_gate_opens_and_closes_with_the_state_and_leaves_other_filters_running() {
    in_namespace(|| {
        veth(1500);
        run("tc qdisc add dev eth0 clsact");
        // Drops what goes to 192.168.1.51, the address at offset 30; direct action 2 is TC_ACT_SHOT.
        let drops = "4,32 0 0 30,21 0 1 3232235827,6 0 0 2,6 0 0 0";
        let words = "filter add dev eth0 egress prio 50 protocol all bpf da bytecode";
        let added = Command::new("tc")
            .args(words.split(' '))
            .arg(drops)
            .status();
        assert!(added.unwrap().success());
        let before = snapshot();
        let (sender, receiver) = (packet_socket("eth0"), packet_socket("peer0"));
        let passes = |frame: &[u8]| {
            match send(sender.as_raw_fd(), frame, MsgFlags::empty()) {
                // ENOBUFS is how a packet socket hears of TC_ACT_SHOT.
                Ok(_) | Err(nix::errno::Errno::ENOBUFS) => {}
                Err(error) => panic!("{error}"),
            }
            receive(&receiver, Duration::from_millis(100), from_vip).is_some()
        };
        let mut programs = load();
        programs.attach_gate("eth0").unwrap();
        let frame = tcp_from_vip(ACK, b"x");
        assert!(!passes(&frame), "a new gate is closed");
        set_state(&programs, State::Active, u64::MAX);
        assert!(passes(&frame));
        let elsewhere = with(frame.clone(), 33, &[51]);
        assert!(!passes(&elsewhere), "the host's own filter still drops");
        set_state(&programs, State::Standby, u64::MAX);
        assert!(!passes(&frame));
        wait(async { programs.detach().await.unwrap() });
        assert_eq!(snapshot(), before, "the host's own clsact and filter stay");
        assert!(passes(&frame));
    });
}

#[test]
fn a_clean_stop_leaves_the_interface_as_it_was() {
    in_namespace(|| {
        veth(1500);
        let before = snapshot();
        wait(async {
            let mut programs = load();
            programs.attach_gate("eth0").unwrap();
            let netif = Netif::new("eth0").await.unwrap();
            assert_eq!(netif.add_vip(VIP, 24).await.unwrap(), VipAddress::Added);
            programs.attach_xdp("eth0").unwrap();
            assert!(run("ip link show dev eth0").contains("xdp"));
            assert_ne!(snapshot(), before);
            assert!(netif.remove_vip_if_ours(VIP).await.unwrap());
            programs.detach().await.unwrap();
        });
        assert_eq!(snapshot(), before);
        assert!(!run("ip link show dev eth0").contains("xdp"));
    });
}

#[test]
fn cleanup_after_a_crash_leaves_the_interface_as_it_was() {
    in_namespace(|| {
        veth(1500);
        let before = snapshot();
        attach_in_a_process_that_dies(0);
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            netif.add_vip(VIP, 24).await.unwrap();
            // What a run after the crash does: it has not added the VIP, and still knows whose it is.
            let netif = Netif::new("eth0").await.unwrap();
            assert_eq!(
                netif.add_vip(VIP, 24).await.unwrap(),
                VipAddress::AlreadyThere
            );
            assert!(netif.remove_vip_if_ours(VIP).await.unwrap());
            bpf::cleanup("eth0").await.unwrap();
            assert_eq!(snapshot(), before);
            bpf::cleanup("eth0").await.unwrap();
        });
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn cleanup_refuses_to_take_the_program_of_a_running_agent() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        programs.attach_xdp("eth0").unwrap();
        let mut second = load();
        let error = second.attach_xdp("eth0").unwrap_err();
        assert!(matches!(error, BpfError::XdpBusy { .. }), "{error:?}");
        wait(async {
            let error = bpf::cleanup("eth0").await.unwrap_err();
            assert!(matches!(error, BpfError::XdpBusy { .. }), "{error:?}");
        });
        assert!(run("ip link show dev eth0").contains("xdp"));
    });
}

#[test]
fn xdp_attaches_natively_and_falls_back_to_generic() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        assert_eq!(programs.attach_xdp("eth0").unwrap(), XdpMode::Native);
        drop(programs);
        let mut programs = load();
        programs.attach_xdp_as("eth0", XdpMode::Generic).unwrap();
        assert!(run("ip link show dev eth0").contains("xdpgeneric"));

        // A bridge has no native mode.
        run("ip link add bridge0 type bridge");
        let mut programs = load();
        assert_eq!(programs.attach_xdp("bridge0").unwrap(), XdpMode::Generic);
    });
}

#[test]
fn jumbo_frames_are_mirrored_whole_in_both_modes() {
    in_namespace(|| {
        for mode in [XdpMode::Native, XdpMode::Generic] {
            veth(9000);
            let mut programs = load();
            programs.attach_xdp_as("eth0", mode).unwrap();
            let ring = programs.take_frames().unwrap();
            let sender = packet_socket("peer0");
            let payload: Vec<u8> = (0..8900).map(|byte| (byte % 251) as u8).collect();
            let frame = tcp_to_vip(ACK, &payload);
            send(sender.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
            let ready = {
                use std::os::fd::AsFd as _;
                let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, 2000_u16).unwrap()
            };
            assert_eq!(
                ready,
                1,
                "{mode:?}: {:?}",
                programs.counters().unwrap().xdp()
            );
            let mut ring = ring;
            let entry = ring.next().unwrap();
            let (header, copy) = FrameHeader::split(&entry).unwrap();
            assert!(copy == frame, "{mode:?}: the copy differs");
            let index = nix::net::if_::if_nametoindex("eth0").unwrap();
            assert_eq!(header.ifindex, index);
            drop(programs);
            run("ip link del eth0");
        }
    });
}

#[test]
fn a_missing_interface_is_named_with_those_that_exist() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        for error in [
            programs.attach_gate("eth7").unwrap_err(),
            programs.attach_xdp("eth7").unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("eth7") && text.contains("eth0"), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
        wait(async {
            let error = Netif::new("eth7").await.unwrap_err();
            let text = error.to_string();
            assert!(text.contains("eth7") && text.contains("eth0"), "{text}");
            let error = Netif::new("lo").await.unwrap_err();
            assert!(matches!(error, NetifError::NotEthernet { .. }), "{error:?}");
        });
    });
}

#[test]
fn an_interface_is_found_with_its_addresses() {
    in_namespace(|| {
        veth(1400);
        run("ip link set eth0 address 02:00:00:00:00:aa");
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            assert_eq!(netif.mac, [2, 0, 0, 0, 0, 0xaa]);
            assert_eq!(netif.mtu, 1400);
            assert_eq!(netif.addresses.len(), 1);
            let peer = Ipv4Addr::new(192, 168, 1, 2);
            assert_eq!(netif.own_node(&[OWN, peer]).await.unwrap(), 0);
            assert_eq!(netif.own_node(&[peer, OWN]).await.unwrap(), 1);
            let error = netif.own_node(&[peer, CLIENT]).await.unwrap_err();
            assert!(error.to_string().contains("192.168.1.1"), "{error}");
            assert_eq!(error.exit_code(), 2);
            netif.check_vip(VIP).unwrap();
            let error = netif.check_vip(Ipv4Addr::new(10, 0, 0, 1)).unwrap_err();
            assert!(
                error.to_string().contains("outside any subnet of eth0"),
                "{error}"
            );

            // An address that an operator configured is not ours to remove.
            run(&format!("ip addr add {VIP}/24 dev eth0"));
            assert!(!netif.remove_vip_if_ours(VIP).await.unwrap());
            assert!(run("ip addr show dev eth0").contains("192.168.1.100/24"));
        });
    });
}

#[test]
fn warming_asks_for_the_next_hop_in_the_hosts_own_name() {
    in_namespace(|| {
        veth(1500);
        run("ip route add default via 192.168.1.254");
        let receiver = packet_socket("peer0");
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            netif.add_vip(VIP, 24).await.unwrap();
            for (client, next_hop) in [
                (CLIENT, CLIENT),
                (Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(192, 168, 1, 254)),
            ] {
                assert_eq!(netif.warm_next_hop(client).await.unwrap(), next_hop);
                let asked = receive(&receiver, Duration::from_secs(2), |frame| {
                    frame.get(12..14) == Some(&[8, 6])
                        && frame.get(38..42) == Some(&next_hop.octets())
                });
                let asked = asked.unwrap_or_else(|| panic!("no ARP request for {next_hop}"));
                assert_eq!(asked[28..32], OWN.octets(), "asked as the VIP");
            }
        });
    });
}
