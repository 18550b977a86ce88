//! Connections that open under the ACK gate: SYN-ACKs that wait for the standby, and what is said of them.

use aya::maps::{MapData, RingBuf};
use rfsis_agent::bpf::{Program, SkbContext};
use rfsis_common::ack_gate::{
    AckGateVerdict, Confirmation, OPENING_CAPTURE, OpeningEvent, OpeningKind, RELEASE_MARK,
};
use rfsis_common::frame::tcp_flags::{ACK, RST, SYN};
use rfsis_common::maps::MirrorPeer;
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};

use crate::frames::{FLOW, STANDBY, tagged, with};
use crate::gate::{Gate, QUIET, STOLEN};
use crate::host::{
    in_namespace, index_of, load_guarded, load_guarded_mirror, mac_of, now_ns, packet_socket,
    receive, run, transmit, veth,
};
use crate::rings::Reader;
use crate::segments::{
    FIRST, FIRST_EDGE, NEXT, SYN_OPTIONS, Segment, folded, nops, pseudo_header, pure,
};

fn next_opening(ring: &mut RingBuf<MapData>) -> OpeningEvent {
    OpeningEvent::parse(&ring.next().unwrap()).unwrap()
}

#[test]
fn a_syn_ack_is_held_and_reported_until_the_standby_knows_the_flow() {
    use AckGateVerdict::{Open, Opening, Passed};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let mut ring = gate.programs.take_openings().unwrap();
        let syn_ack = pure(FIRST, 64_000)
            .flags(SYN | ACK)
            .seq(NEXT - 1)
            .options(&[SYN_OPTIONS]);
        let frame = syn_ack.frame();
        gate.expect("unknown", &frame, 0, Opening, None);
        let event = next_opening(&mut ring);
        assert_eq!(event.flow, FLOW);
        assert_eq!(event.kind, OpeningKind::Held as u32);
        assert_eq!(event.packet(), &frame[14..]);
        assert!(now_ns() - event.at_ns < 1_000_000_000);

        // The longest headers that there are, and data behind them, which is left out.
        let longest = syn_ack.clone().options(&[&nops(40)]).data(b"fast open");
        let mut long = longest.frame();
        long.splice(34..34, nops(40));
        long[14] = 0x4f;
        long[17] += 40;
        gate.expect("longest", &tagged(0, &long), 0, Opening, None);
        assert_eq!(
            next_opening(&mut ring).packet(),
            &long[14..14 + OPENING_CAPTURE]
        );

        // The agent lets it go: the standby has no room for it.
        let released = AckGateVerdict::Released;
        gate.expect("let go", &frame, RELEASE_MARK, released, Some(&frame));
        assert!(ring.next().is_none());

        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.expect("known", &frame, 0, Passed, Some(&frame));
        assert!(ring.next().is_none());
        // The agent's own, should it send one.
        gate.expect("marked", &frame, RELEASE_MARK, released, Some(&frame));
        assert_eq!(gate.sent().told_edge, FIRST_EDGE, "not scaled");

        // A later connection of the same addresses and ports.
        let later = Segment {
            ack: FIRST + 1,
            ..syn_ack
        };
        gate.expect("later", &later.frame(), 0, Opening, None);
        assert_eq!(next_opening(&mut ring).flow, FLOW);
        let data = pure(FIRST + 9000, 1).frame();
        let unguarded = AckGateVerdict::Unguarded;
        gate.expect("forgotten", &data, 0, unguarded, Some(&data));

        gate.maps.set_mode(false).unwrap();
        gate.expect("open", &frame, 0, Open, Some(&frame));
        let event = next_opening(&mut ring);
        assert_eq!(event.flow, FLOW);
        assert_eq!(event.kind, OpeningKind::Passed as u32);

        gate.maps.set_mode(true).unwrap();
        let released = AckGateVerdict::Released;
        gate.expect("not taken", &frame, RELEASE_MARK, released, Some(&frame));
        assert!(ring.next().is_none());
    });
}

#[test]
fn the_agent_is_woken_by_a_syn_ack_unless_the_standby_tells_it_and_by_no_syn() {
    in_namespace(|| {
        veth(1500);
        // Without a standby that gets copies the agent has it from the ring alone.
        for (is_copied, guards, wakes) in [
            (false, true, true),
            (true, true, false),
            (false, false, true),
            (true, false, true),
        ] {
            let mut gate = Gate::new(load_guarded_mirror("eth0"));
            gate.maps.set_mode(guards).unwrap();
            if is_copied {
                let mirror = gate.programs.mirror().unwrap();
                mirror.write(MirrorPeer::at(STANDBY)).unwrap();
            }
            let reader = Reader::new(gate.programs.take_openings().unwrap());
            reader.asleep();
            let context = SkbContext {
                mark: 0,
                ifindex: index_of("eth0"),
            };
            let syn = with(pure(0, 1).flags(SYN).to_vip(), 0, &mac_of("eth0"));
            let programs = &mut gate.programs;
            programs.test_run(Program::Mirror, &syn, context).unwrap();
            reader.sleeps_on();
            gate.run(&pure(FIRST, 1).flags(SYN | ACK).frame(), 0);
            let name = format!("copied: {is_copied}, guards: {guards}");
            if wakes {
                assert_eq!(reader.woken(), 2, "{name}: the SYN as well");
            } else {
                reader.sleeps_on();
            }
        }
    });
}

#[test]
fn a_full_ring_of_openings_is_counted_and_the_syn_ack_is_held_all_the_same() {
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let frame = pure(FIRST, 64_000).flags(SYN | ACK).frame();
        let mut taken = 0;
        loop {
            let (code, _, verdicts) = gate.run(&frame, 0);
            assert_eq!(code, STOLEN);
            if verdicts != [AckGateVerdict::Opening] {
                assert_eq!(verdicts, [AckGateVerdict::OpeningLost]);
                break;
            }
            taken += 1;
            assert!(taken < 100_000);
        }
        assert!(taken > 6000, "the ring holds {taken}");
    });
}

#[test]
fn a_syn_that_comes_in_is_reported_whether_or_not_the_gate_guards() {
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut gate = Gate::new(load_guarded());
        gate.programs.attach_gate("eth0").unwrap();
        gate.programs.attach_mirror("eth0").unwrap();
        let mut ring = gate.programs.take_openings().unwrap();
        let lan = packet_socket("peer0");
        let syn = pure(0, 64_000).flags(SYN).options(&[SYN_OPTIONS]).to_vip();
        transmit(&lan, &syn);
        let event = next_opening(&mut ring);
        assert_eq!(event.flow, FLOW);
        assert_eq!(event.kind, OpeningKind::Syn as u32);
        assert_eq!(event.packet(), &syn[14..]);

        let mut to_other_port = syn.clone();
        to_other_port[36..38].copy_from_slice(&9999_u16.to_be_bytes());
        let mut to_other_host = syn.clone();
        to_other_host[5] = 0x77;
        for (name, frame) in [
            ("no service", to_other_port),
            ("another host", to_other_host),
            ("VLAN 5", tagged(5, &syn)),
            ("SYN-ACK", pure(1, 1).flags(SYN | ACK).to_vip()),
            ("SYN with RST", pure(1, 1).flags(SYN | RST).to_vip()),
            ("ACK", pure(1, 1).to_vip()),
        ] {
            transmit(&lan, &frame);
            assert!(ring.next().is_none(), "{name}");
        }
        gate.maps.set_mode(false).unwrap();
        transmit(&lan, &syn);
        assert_eq!(next_opening(&mut ring).kind, OpeningKind::Syn as u32);
    });
}

#[test]
fn the_standby_gets_a_held_syn_ack_marked_so_and_the_released_one_not_again() {
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut gate = Gate::new(load_guarded_mirror("eth0"));
        gate.programs.attach_gate("eth0").unwrap();
        let mirror = gate.programs.mirror().unwrap();
        mirror.write(MirrorPeer::at(STANDBY)).unwrap();
        let lan = packet_socket("peer0");
        let copy = || receive(&lan, QUIET, |frame| frame.starts_with(&STANDBY));
        let frame = pure(FIRST, 64_000)
            .flags(SYN | ACK)
            .seq(NEXT - 1)
            .options(&[SYN_OPTIONS])
            .frame();
        gate.expect("held", &frame, 0, AckGateVerdict::Opening, None);
        let found = copy().unwrap();
        let tcp = &found[34..];
        let sum = folded(&[&pseudo_header(tcp.len())[..], tcp].concat());
        assert_eq!(sum, 0xffff, "the checksum is right");
        let marked = HELD_URGENT.to_be_bytes();
        assert_eq!(tcp[URGENT_OFFSET..][..2], marked);
        let mut rest = found[14..].to_vec();
        rest[20 + 16..20 + 20].copy_from_slice(&frame[50..54]);
        assert_eq!(rest, frame[14..], "nothing else differs");

        let released = AckGateVerdict::Released;
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.expect("released", &frame, RELEASE_MARK, released, Some(&frame));
        assert_eq!(copy(), None);
        // While the gate is open nobody has held it, and the copy says so.
        gate.maps.withdraw(&FLOW).unwrap();
        gate.maps.set_mode(false).unwrap();
        gate.expect("open", &frame, 0, AckGateVerdict::Open, Some(&frame));
        assert_eq!(copy().unwrap()[14..], frame[14..]);
        gate.expect("let go", &frame, RELEASE_MARK, released, Some(&frame));
        assert_eq!(copy().unwrap()[14..], frame[14..]);
    });
}
