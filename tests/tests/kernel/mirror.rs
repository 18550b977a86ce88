//! Tap `mirror`: what is copied to the standby, with which addresses, and that originals go on as they
//! were.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rfsis_agent::bpf::{self, Programs};
use rfsis_common::frame::tcp_flags::{ACK, FIN, RST, SYN};
use rfsis_common::maps::{MirrorPeer, State};
use rfsis_common::mirror::{MirrorEgress, MirrorVerdict};
use rfsis_common::verdict::GateVerdict;

use crate::frames::{
    CLIENT, FLOW, OWN, SERVICE, STANDBY, VIP, arp, ethernet, ipv4, segment, tagged, tcp_from_vip,
    tcp_to_vip, udp_to_vip, with,
};
use crate::host::{
    in_namespace, load, load_mirror, mac_of, now_ns, packet_socket, receive, run, set_state,
    snapshot, transmit, veth, wait,
};

/// Whom the frames of this test are addressed to.
const OWN_MAC: &str = "02:00:00:00:00:01";
/// Nothing comes within this time: it was not sent.
const QUIET: Duration = Duration::from_millis(60);

/// An active node whose mirror leaves by an interface, and the LAN end of its cable.
struct Node {
    programs: Programs,
    lan: OwnedFd,
}

impl Node {
    fn new(copies_by: &str, egress: MirrorEgress) -> Self {
        run(&format!("ip link set eth0 address {OWN_MAC}"));
        let mut programs = load_mirror(copies_by, egress);
        programs.attach_gate("eth0").unwrap();
        programs.attach_mirror("eth0").unwrap();
        set_state(&programs, State::Active, u64::MAX);
        let node = Self {
            programs,
            lan: packet_socket("peer0"),
        };
        node.copy_to(STANDBY);
        node
    }

    fn copy_to(&self, mac: [u8; 6]) {
        let mirror = self.programs.mirror().unwrap();
        mirror.write(MirrorPeer::at(mac)).unwrap();
    }

    /// Verdicts that moved while `body` ran, once for each count.
    fn verdicts(&self, body: impl FnOnce()) -> Vec<MirrorVerdict> {
        let counters = self.programs.counters().unwrap();
        let before = counters.mirror().unwrap();
        body();
        let after = counters.mirror().unwrap();
        let moved = |verdict| after.get(verdict) - before.get(verdict);
        MirrorVerdict::ALL
            .into_iter()
            .flat_map(|verdict| (0..moved(verdict)).map(move |_| verdict))
            .collect()
    }
}

/// What comes until it is quiet, but for what the kernel says of its own accord.
fn heard(socket: &OwnedFd) -> Vec<Vec<u8>> {
    let of_test =
        |frame: &[u8]| frame.get(..2) == Some(&[2, 0]) && frame.get(12..14) != Some(&[0x86, 0xdd]);
    std::iter::from_fn(|| receive(socket, QUIET, of_test)).collect()
}

fn copy_of(frame: &[u8], from: [u8; 6]) -> Vec<u8> {
    let addresses = [STANDBY, from].concat();
    with(frame.to_vec(), 0, &addresses)
}

fn fragment(frame: Vec<u8>) -> Vec<u8> {
    with(frame, 20, &[0x20, 1])
}

#[test]
fn input_is_copied_to_the_standby_and_goes_on_unchanged() {
    in_namespace(|| {
        veth(1500);
        let node = Node::new("eth0", MirrorEgress::Handshake);
        // What a bridge takes from its port comes behind the mirror.
        run("ip link add br0 type bridge");
        run("ip link set br0 up");
        // br_netfilter, where the kernel has it, drops what has no IP checksum.
        std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0").ok();
        run("ip link set eth0 master br0");
        let deadline = Instant::now() + Duration::from_secs(5);
        while !run("bridge link show dev eth0").contains("state forwarding") {
            assert!(
                Instant::now() < deadline,
                "the bridge does not take its port"
            );
            std::thread::yield_now();
        }
        let behind = packet_socket("br0");
        let long: Vec<u8> = (0..1400).map(|byte| (byte % 251) as u8).collect();
        let other = ethernet(0x0800, &ipv4(6, CLIENT, OWN, &segment(1, 2, ACK, b"")));
        let elsewhere = with(tcp_to_vip(ACK, b"x"), 5, &[0x77]);
        use MirrorVerdict::Cloned;
        let table = [
            ("data", tcp_to_vip(ACK, &long), Some(Cloned)),
            ("SYN", tcp_to_vip(SYN, b""), Some(Cloned)),
            ("RST", tcp_to_vip(RST, b""), Some(Cloned)),
            ("UDP", udp_to_vip(), Some(Cloned)),
            ("fragment", fragment(tcp_to_vip(ACK, b"x")), Some(Cloned)),
            ("who has the VIP", arp(1, CLIENT, VIP, &[]), None),
            ("for the host itself", other, None),
            ("to another hardware address", elsewhere, None),
            ("VLAN 5", tagged(5, &tcp_to_vip(ACK, b"x")), None),
            ("malformed", with(tcp_to_vip(ACK, b"x"), 16, &[9, 9]), None),
        ];
        for (name, frame, expected) in table {
            let verdicts = node.verdicts(|| transmit(&node.lan, &frame));
            assert_eq!(verdicts, Vec::from_iter(expected), "{name}");
            let copies = heard(&node.lan);
            let copy = expected.map(|_| copy_of(&frame, mac_of("eth0")));
            assert_eq!(copies, Vec::from_iter(copy), "{name}");
            if expected.is_some() {
                assert_eq!(heard(&behind), [frame], "{name}: behind the mirror");
            }
            heard(&behind);
        }
    });
}

#[test]
fn nothing_is_copied_but_by_an_active_within_its_lease_to_a_standby_that_is_heard() {
    in_namespace(|| {
        veth(1500);
        let node = Node::new("eth0", MirrorEgress::Full);
        let frame = tcp_to_vip(ACK, b"x");
        let verdicts = || node.verdicts(|| transmit(&node.lan, &frame));
        for (state, lease) in [
            (State::Standby, u64::MAX),
            (State::TakingOver, u64::MAX),
            (State::Fenced, u64::MAX),
            (State::HandingOver, now_ns() - 1),
            (State::Active, now_ns() - 1),
        ] {
            set_state(&node.programs, state, lease);
            assert_eq!(verdicts(), [MirrorVerdict::Closed], "{state:?}");
        }
        set_state(&node.programs, State::HandingOver, u64::MAX);
        assert_eq!(verdicts(), [MirrorVerdict::Cloned]);
        assert_eq!(heard(&node.lan).len(), 1);
        set_state(&node.programs, State::Active, u64::MAX);
        node.copy_to([0; 6]);
        assert_eq!(verdicts(), [MirrorVerdict::NoStandby]);
        assert_eq!(heard(&node.lan), Vec::<Vec<u8>>::new());
        node.copy_to(STANDBY);
        assert_eq!(verdicts(), [MirrorVerdict::Cloned]);
        assert_eq!(heard(&node.lan).len(), 1);
    });
}

#[test]
fn output_that_the_gate_passes_is_copied_as_far_as_asked_and_leaves_unchanged() {
    in_namespace(|| {
        use MirrorVerdict::{Cloned, Spared};
        for egress in MirrorEgress::ALL {
            veth(1500);
            let node = Node::new("eth0", egress);
            let approvals = node.programs.approvals().unwrap();
            let host = packet_socket("eth0");
            let full = egress == MirrorEgress::Full;
            let data = if full { Cloned } else { Spared };
            let udp = ethernet(0x0800, &ipv4(17, VIP, CLIENT, &[0, 7, 156, 64, 0, 8, 0, 0]));
            // Name, frame, approved, what becomes of its copy; held frames have none.
            let table = [
                ("data", tcp_from_vip(ACK, b"data"), false, Some(data)),
                ("SYN-ACK", tcp_from_vip(SYN | ACK, b""), false, Some(Cloned)),
                ("FIN", tcp_from_vip(FIN | ACK, b""), false, None),
                (
                    "FIN approved",
                    tcp_from_vip(FIN | ACK, b""),
                    true,
                    Some(Cloned),
                ),
                ("RST approved", tcp_from_vip(RST, b""), true, Some(Cloned)),
                ("UDP", udp, false, Some(Cloned)),
            ];
            for (name, frame, approve, expected) in table {
                if approve {
                    approvals.approve(FLOW).unwrap();
                }
                let counters = node.programs.counters().unwrap();
                let before = counters.gate().unwrap();
                let verdicts = node.verdicts(|| transmit(&host, &frame));
                let after = counters.gate().unwrap();
                approvals.revoke(&FLOW).unwrap();
                let moved = |verdict| after.get(verdict) - before.get(verdict);
                assert_eq!(verdicts, Vec::from_iter(expected), "{name}, {egress:?}");
                let mut seen = Vec::new();
                if expected == Some(Cloned) {
                    seen.push(copy_of(&frame, mac_of("eth0")));
                }
                assert_eq!(moved(GateVerdict::Copy), seen.len() as u64, "{name}");
                assert_eq!(moved(GateVerdict::Held), u64::from(expected.is_none()));
                if expected.is_some() {
                    assert_eq!(moved(GateVerdict::Passed), 1, "{name}: never taken again");
                    seen.push(frame);
                }
                assert_eq!(heard(&node.lan), seen, "{name}, {egress:?}");
            }
            run("ip link del eth0");
        }
    });
}

#[test]
fn what_is_addressed_to_the_standby_passes_the_gate_like_everything_else() {
    in_namespace(|| {
        veth(1500);
        let node = Node::new("eth0", MirrorEgress::Full);
        let host = packet_socket("eth0");
        let to_standby = |frame| with(frame, 0, &STANDBY);
        let data = to_standby(tcp_from_vip(ACK, b"forged copy"));
        let verdicts = node.verdicts(|| transmit(&host, &data));
        assert_eq!(verdicts, [], "it gets there by itself");
        assert_eq!(heard(&node.lan), std::slice::from_ref(&data));
        // Nobody approved it.
        transmit(&host, &to_standby(tcp_from_vip(FIN | ACK, b"")));
        assert_eq!(heard(&node.lan), Vec::<Vec<u8>>::new());
        set_state(&node.programs, State::Active, now_ns() - 1);
        transmit(&host, &data);
        assert_eq!(heard(&node.lan), Vec::<Vec<u8>>::new());
    });
}

/// A second cable, `sync0` to `sync1`.
fn sync_link() -> OwnedFd {
    run("ip link add sync0 type veth peer name sync1");
    run("ip link set sync0 up");
    run("ip link set sync1 up");
    packet_socket("sync1")
}

#[test]
fn copies_leave_by_the_sync_interface_in_its_name() {
    in_namespace(|| {
        veth(1500);
        let sync = sync_link();
        let mut node = Node::new("sync0", MirrorEgress::Full);
        node.programs.attach_gate("sync0").unwrap();
        let host = packet_socket("eth0");
        let (input, output) = (tcp_to_vip(ACK, b"in"), tcp_from_vip(ACK, b"out"));
        transmit(&node.lan, &input);
        transmit(&host, &output);
        let own = mac_of("sync0");
        assert_eq!(heard(&sync), [copy_of(&input, own), copy_of(&output, own)]);
        assert_eq!(
            heard(&node.lan),
            std::slice::from_ref(&output),
            "the original alone"
        );
        // The gate of the sync link is as tight as the other.
        let on_sync = packet_socket("sync0");
        transmit(&on_sync, &tcp_from_vip(FIN | ACK, b""));
        set_state(&node.programs, State::Standby, u64::MAX);
        transmit(&on_sync, &output);
        transmit(&on_sync, &arp(2, VIP, CLIENT, &[]));
        assert_eq!(heard(&sync), Vec::<Vec<u8>>::new());
    });
}

#[test]
fn a_copy_that_cannot_be_sent_is_counted_and_its_original_goes_on() {
    in_namespace(|| {
        veth(1500);
        sync_link();
        let node = Node::new("sync0", MirrorEgress::Full);
        run("ip link set sync0 down");
        let host = packet_socket("eth0");
        let frame = tcp_from_vip(ACK, b"original");
        let verdicts = node.verdicts(|| transmit(&host, &frame));
        assert_eq!(verdicts, [MirrorVerdict::Failed]);
        assert_eq!(heard(&node.lan), [frame]);
    });
}

fn mirrors() -> usize {
    let filters = run("tc filter show dev eth0 ingress");
    let lines = filters.lines();
    lines.filter(|line| line.contains("rfsis_mirror")).count()
}

#[test]
fn a_mirror_is_replaced_never_stacked_and_goes_with_a_stop_or_a_cleanup() {
    in_namespace(|| {
        veth(1500);
        run(&format!("ip link set eth0 address {OWN_MAC}"));
        let before = snapshot();
        let left_behind = Node::new("eth0", MirrorEgress::Full);
        drop(left_behind);
        assert_eq!(mirrors(), 1, "it outlives its agent");
        let second = Node::new("eth0", MirrorEgress::Full);
        assert_eq!(mirrors(), 1);
        wait(async { second.programs.detach().await.unwrap() });
        assert_eq!(snapshot(), before);

        drop(Node::new("eth0", MirrorEgress::Full));
        wait(async { bpf::cleanup("eth0").await.unwrap() });
        assert_eq!(snapshot(), before);

        // An agent with another tap takes it off at its start.
        drop(Node::new("eth0", MirrorEgress::Full));
        let mut lan = load();
        lan.attach_gate("eth0").unwrap();
        lan.remove_mirror("eth0").unwrap();
        assert_eq!(mirrors(), 0);
        wait(async { lan.detach().await.unwrap() });
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn with_tap_lan_the_gate_copies_nothing() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        programs.attach_gate("eth0").unwrap();
        set_state(&programs, State::Active, u64::MAX);
        let standby = MirrorPeer::at(STANDBY);
        programs.mirror().unwrap().write(standby).unwrap();
        let (host, lan) = (packet_socket("eth0"), packet_socket("peer0"));
        let frame = tcp_from_vip(ACK, b"x");
        assert_eq!(frame[34..36], SERVICE.to_be_bytes());
        transmit(&host, &frame);
        assert_eq!(heard(&lan), [frame]);
    });
}
