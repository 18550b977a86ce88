//! What the programs do with a frame, by `BPF_PROG_TEST_RUN`.

use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::gettid;
use rfsis_agent::bpf::{Programs, XdpMode};
use rfsis_common::frame::tcp_flags::{ACK, FIN, RST, SYN};
use rfsis_common::maps::{
    Direction, FRAME_HEADER_LEN, FRAME_SLOTS, FrameHeader, HEARTBEAT_CAPTURE, HeartbeatEvent,
    HeldEvent, NodeState, State,
};
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};
use rfsis_common::verdict::{GateVerdict, XdpVerdict};
use tests::patience::{PATIENCE, wait_until};

use crate::frames::{
    CLIENT, CLIENT_PORT, FLOW, OWN, SERVICE, VIP, arp, ethernet, heartbeat, ipv4, malformed_frames,
    segment, tagged, tcp_from_port, tcp_from_vip, tcp_to_vip, udp_to_vip, with,
};
use crate::host::{in_namespace, load, load_with_ring, now_ns, set_state};

/// Runs the program that catches frames and gives what it did: whether the frame goes on, and the one
/// verdict that was counted.
fn catch(programs: &mut Programs, hook: XdpMode, name: &str, frame: &[u8]) -> (Fate, XdpVerdict) {
    let counters = programs.counters().unwrap();
    let before = counters.xdp().unwrap();
    let fate = match hook {
        // `enum xdp_action`: XDP_DROP, XDP_PASS.
        XdpMode::Native => match programs.test_xdp(frame) {
            Ok(1) => Fate::Dropped,
            Ok(2) => Fate::Passed,
            other => panic!("{name}: {other:?}"),
        },
        XdpMode::Tc => match programs.test_ingress(frame) {
            Ok(STOLEN) => Fate::Dropped,
            Ok(UNSPEC) => Fate::Passed,
            other => panic!("{name}: {other:?}"),
        },
    };
    let after = counters.xdp().unwrap();
    let moved: Vec<XdpVerdict> = XdpVerdict::ALL
        .into_iter()
        .filter(|verdict| after.get(*verdict) != before.get(*verdict))
        .collect();
    let [verdict] = moved[..] else {
        panic!("{name}: counters moved: {moved:?}");
    };
    assert_eq!(after.get(verdict), before.get(verdict) + 1, "{name}");
    (fate, verdict)
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Dropped,
    Passed,
}

/// Runs a test with programs of their own for each way to catch frames.
fn on_each_hook(test: fn(XdpMode)) {
    in_namespace(move || XdpMode::ALL.into_iter().for_each(test));
}

#[test]
fn verdicts_follow_class_state_and_live_flows() {
    use XdpVerdict::{Heartbeat, Malformed, Mirrored, Other, PassVip, Tagged};
    on_each_hook(|hook| {
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
        // Test runs of TC programs take no IPv4 frame without a whole header.
        table.retain(|(_, frame, ..)| hook == XdpMode::Native || frame.len() >= 34);
        let live = programs.live_flows().unwrap();
        for (name, frame, standby, active, active_live) in &table {
            for (state, is_live, expected) in [
                (State::Standby, false, standby),
                (State::Standby, true, standby),
                (State::TakingOver, false, standby),
                (State::Fenced, false, standby),
                (State::HandingOver, true, standby),
                (State::Active, false, active),
                (State::Active, true, active_live),
            ] {
                set_state(&programs, state, 0);
                if is_live {
                    live.insert(FLOW).unwrap();
                }
                let name = format!("{hook:?}: {name}, {state:?}, live: {is_live}");
                let (fate, verdict) = catch(&mut programs, hook, &name, frame);
                live.remove(&FLOW).unwrap();
                assert_eq!(verdict, *expected, "{name}");
                let dropped = matches!(verdict, Mirrored | Heartbeat);
                let expected = if dropped { Fate::Dropped } else { Fate::Passed };
                assert_eq!(fate, expected, "{name}");
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
                    assert_eq!(header.direction, direction as u16, "{name}");
                    assert_eq!(header.state, state as u16, "{name}");
                    let l3_offset = if name.contains("priority tag") {
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
    on_each_hook(|hook| {
        let mut programs = load();
        let node = NodeState {
            state: 99,
            lease_ns: u64::MAX,
        };
        programs.state_map().unwrap().write(node).unwrap();
        let (_, verdict) = catch(&mut programs, hook, "TCP", &tcp_to_vip(ACK, b""));
        assert_eq!(verdict, XdpVerdict::Mirrored);
        let (_, verdict) = gate(&mut programs, "TCP", &tcp_from_vip(ACK, b""));
        assert_eq!(verdict, GateVerdict::Closed);
    });
}

#[test]
fn frames_of_every_length_are_copied_whole() {
    on_each_hook(|hook| {
        let mut programs = load();
        let mut frames = programs.take_frames().unwrap();
        let mut lengths = vec![54, 55, 60, 1514, 9014, 65_000, 65_549];
        for slot in &FRAME_SLOTS[..3] {
            let room = slot - FRAME_HEADER_LEN;
            lengths.extend([room - 1, room, room + 1]);
        }
        // Test runs of TC programs get no more than a page (`bpf_prog_test_run_skb`, net/bpf/test_run.c).
        lengths.retain(|length| hook == XdpMode::Native || *length < 3000);
        for length in lengths {
            let payload: Vec<u8> = (0..length - 54).map(|byte| (byte % 251) as u8).collect();
            let frame = tcp_to_vip(ACK, &payload);
            assert_eq!(frame.len(), length);
            let (_, verdict) = catch(&mut programs, hook, &format!("{length} bytes"), &frame);
            assert_eq!(verdict, XdpVerdict::Mirrored, "{length} bytes");
            let entry = frames.next().unwrap();
            let (header, copy) = FrameHeader::split(&entry).unwrap();
            assert_eq!(header.len as usize, length);
            assert!(copy == frame, "{length} bytes: the copy differs");
        }
    });
}

#[test]
fn a_reader_that_rests_is_woken_by_a_long_frame_and_a_held_syn_ack_and_by_no_other() {
    on_each_hook(|hook| {
        let mut programs = load();
        let mut ring = programs.take_frames().unwrap();
        let rest = programs.rest().unwrap();
        let (tell, wakes) = mpsc::channel();
        thread::spawn(move || {
            loop {
                // Who asks while something lies in the ring does not wait: main waits until this one does.
                tell.send((gettid(), 0)).unwrap();
                let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                let read = std::iter::from_fn(|| ring.next().map(drop)).count();
                if tell.send((gettid(), read)).is_err() {
                    return;
                }
            }
        });
        let asleep = || {
            let (reader, _) = wakes.recv().unwrap();
            let stat =
                || std::fs::read_to_string(format!("/proc/self/task/{reader}/stat")).unwrap();
            wait_until("the reader to wait", stat, |stat| stat.contains(") S "));
        };
        let woken = || wakes.recv_timeout(PATIENCE).unwrap().1;
        let mut send = |frame: &[u8]| {
            let (_, verdict) = catch(&mut programs, hook, "TCP", frame);
            assert_eq!(verdict, XdpVerdict::Mirrored);
        };
        let (small, long) = (tcp_to_vip(ACK, &[7; 64]), tcp_to_vip(ACK, &[7; 1000]));
        for until in [0, now_ns()] {
            rest.write(until).unwrap();
            asleep();
            send(&small);
            assert_eq!(woken(), 1, "{hook:?}: it does not rest");
        }
        asleep();
        rest.write(u64::MAX).unwrap();
        send(&small);
        let silence = wakes.recv_timeout(Duration::from_millis(100));
        assert!(silence.is_err(), "{hook:?}: {silence:?}");
        send(&long);
        assert_eq!(woken(), 2, "{hook:?}: and what had come before");
        asleep();
        send(&small);
        assert_eq!(woken(), 1, "{hook:?}: the long one has ended the rest");
        asleep();
        rest.write(u64::MAX).unwrap();
        // Urgent pointer of a plain SYN-ACK, and of the copy of one that is held.
        for urgent in [[0; 2], HELD_URGENT.to_be_bytes()] {
            send(&with(
                tcp_from_vip(SYN | ACK, b""),
                34 + URGENT_OFFSET,
                &urgent,
            ));
        }
        assert_eq!(woken(), 2, "{hook:?}: a client waits for the held one");
        // The thread ends when it finds nobody listening.
        drop(wakes);
        send(&small);
    });
}

#[test]
fn a_full_frame_ring_is_counted_and_the_flow_named() {
    on_each_hook(|hook| {
        let mut programs = load_with_ring(4096);
        let lost = programs.lost_flows().unwrap();
        assert_eq!(lost.drain().unwrap(), []);
        let mut mirrored = 0;
        let frame = tcp_to_vip(ACK, &[7; 1000]);
        while catch(&mut programs, hook, "TCP", &frame) == (Fate::Dropped, XdpVerdict::Mirrored) {
            mirrored += 1;
            assert!(mirrored < 10, "a ring of 4096 bytes took {mirrored} frames");
        }
        assert!(mirrored > 0);
        let noted = lost.drain().unwrap();
        assert_eq!(noted.len(), 1);
        assert_eq!(noted[0].0, FLOW);
        assert!(now_ns() - noted[0].1 < 1_000_000_000);
        assert_eq!(lost.drain().unwrap(), [], "drained entries stay out");

        let (fate, verdict) = catch(
            &mut programs,
            hook,
            "UDP",
            &[udp_to_vip(), vec![0; 900]].concat(),
        );
        assert_eq!((fate, verdict), (Fate::Dropped, XdpVerdict::MirrorLost));
        assert_eq!(lost.drain().unwrap(), [], "only TCP flows are noted");
    });
}

#[test]
fn heartbeats_reach_their_ring_cut_to_the_captured_length_and_a_full_ring_is_counted() {
    on_each_hook(|hook| {
        let mut programs = load();
        let mut ring = programs.take_heartbeats().unwrap();
        let long = [heartbeat(), vec![9; 500]].concat();
        for frame in [heartbeat(), long.clone()] {
            catch(&mut programs, hook, "heartbeat", &frame);
            let event = HeartbeatEvent::parse(&ring.next().unwrap()).unwrap();
            assert_eq!(event.frame(), &frame[..frame.len().min(HEARTBEAT_CAPTURE)]);
            assert!(now_ns() - event.arrival_ns < 1_000_000_000);
        }
        let mut taken = 0;
        while catch(&mut programs, hook, "heartbeat", &long).1 == XdpVerdict::Heartbeat {
            taken += 1;
            assert!(taken < 100_000);
        }
        assert!(
            taken > 900,
            "the ring holds {taken}: less than a second at 1 ms"
        );
        let (fate, verdict) = catch(&mut programs, hook, "heartbeat", &long);
        assert_eq!((fate, verdict), (Fate::Dropped, XdpVerdict::HeartbeatLost));
    });
}

const UNSPEC: i32 = -1;
const STOLEN: i32 = 4;

fn gate(programs: &mut Programs, name: &str, frame: &[u8]) -> (i32, GateVerdict) {
    let counters = programs.counters().unwrap();
    let before = counters.gate().unwrap();
    let (code, output) = programs
        .test_gate(frame, 0)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let after = counters.gate().unwrap();
    let moved: Vec<GateVerdict> = GateVerdict::ALL
        .into_iter()
        .filter(|verdict| after.get(*verdict) != before.get(*verdict))
        .collect();
    let [verdict] = moved[..] else {
        panic!("{name}: counters moved: {moved:?}");
    };
    assert_eq!(output, frame, "{name}: rewritten without an ACK gate");
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
        // ICMP port unreachable with the head of the datagram that is refused.
        let refusal = |port: u16| {
            let [high, low] = port.to_be_bytes();
            let refused = ipv4(17, CLIENT, VIP, &[156, 64, high, low, 0, 8, 0, 0]);
            let icmp = [&[3, 3, 0, 0, 0, 0, 0, 0], &refused[..]].concat();
            ethernet(0x0800, &ipv4(1, VIP, CLIENT, &icmp))
        };
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
            ("refusal of a service", refusal(SERVICE), Closed, Held, Held),
            (
                "refusal of no service",
                refusal(9999),
                Closed,
                Passed,
                Passed,
            ),
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
                (State::HandingOver, later, true, closed),
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
