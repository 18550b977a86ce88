//! The ACK gate: what leaves with which numbers, what is held, and that nothing else changes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rfsis_agent::bpf::{Program, SkbContext};
use rfsis_common::ack_gate::{AckGateVerdict, Confirmation, Guarded, RELEASE_MARK, Sent, release};
use rfsis_common::frame::tcp_flags::{ACK, FIN, RST, SYN};
use rfsis_common::maps::MirrorPeer;
use rfsis_common::mirror::MirrorVerdict;
use tests::patience::{PATIENCE, slowed, wait_until};

use crate::frames::{CLIENT, FLOW, SERVICE, STANDBY, VIP, from_vip, tagged, with, with_ip_options};
use crate::gate::{Gate, QUIET, UNSPEC};
use crate::host::{
    in_namespace, load, load_guarded, load_guarded_mirror, now_ns, packet_socket, receive, run,
    transmit, veth,
};
use crate::segments::{
    FIRST, FIRST_EDGE, NEXT, SHIFT, SLOT, STAMPS, SYN_OPTIONS, Segment, folded, nops,
    pseudo_header, pure, sack, sack_of,
};

#[test]
fn a_client_is_told_what_is_confirmed_and_checksums_stay_right() {
    use AckGateVerdict::{Held, Lowered, Passed};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let approvals = gate.programs.approvals().unwrap();
        approvals.approve(FLOW).unwrap();
        // 1000 bytes, and room for 100,000.
        let confirmed = Confirmation::new(FIRST + 1000, FIRST + 100_000);
        let (held, ahead) = (FIRST + 1000, FIRST + 3001);
        let odd = b"odd number";
        // Name, what the kernel sends, what leaves.
        let mut table = vec![
            (
                "ACK of what is confirmed",
                pure(held, 9000),
                Passed,
                Some(pure(held, 9000)),
            ),
            (
                "ACK of less",
                pure(held - 1, 9000),
                Passed,
                Some(pure(held - 1, 9000)),
            ),
            ("ACK of one more", pure(held + 1, 9000), Held, None),
            (
                "ACK ahead with timestamps",
                pure(ahead, 9000).options(&[STAMPS]),
                Held,
                None,
            ),
            (
                "data",
                pure(held, 9000).data(odd),
                Passed,
                Some(pure(held, 9000).data(odd)),
            ),
            // 2001 bytes are 500 units of four.
            (
                "data ahead",
                pure(ahead, 9000).data(odd),
                Lowered,
                Some(pure(held, 9500).data(odd)),
            ),
            (
                "data ahead with timestamps",
                pure(ahead, 9000).data(b"1").options(&[STAMPS]),
                Lowered,
                Some(pure(held, 9500).data(b"1").options(&[STAMPS])),
            ),
            (
                "FIN ahead",
                pure(ahead, 9000).flags(ACK | FIN),
                Lowered,
                Some(pure(held, 9500).flags(ACK | FIN)),
            ),
            (
                "RST ahead",
                pure(ahead, 0).flags(ACK | RST),
                Lowered,
                Some(pure(held, 500).flags(ACK | RST)),
            ),
            (
                "RST without ACK",
                pure(0, 0).flags(RST).seq(1),
                Passed,
                Some(pure(0, 0).flags(RST).seq(1)),
            ),
            (
                "window probe ahead",
                pure(ahead, 9000).seq(NEXT - 1),
                Lowered,
                Some(pure(held, 9500).seq(NEXT - 1)),
            ),
            (
                "more room than the standby has",
                pure(held, 60_000),
                Passed,
                Some(pure(held, 24_750)),
            ),
            (
                "more room than the standby has, ahead",
                pure(ahead, 60_000).data(b"12"),
                Lowered,
                Some(pure(held, 24_750).data(b"12")),
            ),
        ];
        for blocks in 1..=4 {
            let (option, erased) = (sack(blocks), nops(4 + 8 * usize::from(blocks)));
            table.push((
                "SACK alone",
                pure(held, 9000).options(&[&option]),
                Passed,
                Some(pure(held, 9000).options(&[&erased])),
            ));
            if blocks == 4 {
                break;
            }
            for payload in [&b""[..], b"odd"] {
                table.push((
                    "SACK behind timestamps",
                    pure(held, 9000).options(&[STAMPS, &option]).data(payload),
                    Passed,
                    Some(pure(held, 9000).options(&[STAMPS, &erased]).data(payload)),
                ));
            }
            table.push((
                "SACK on data ahead",
                pure(ahead, 9000).options(&[STAMPS, &option]).data(odd),
                Lowered,
                Some(pure(held, 9500).options(&[STAMPS, &erased]).data(odd)),
            ));
        }
        // What has come twice says nothing new, as far as it is confirmed.
        let twice = (held - 500, held);
        let (ahead_of_it, told) = (
            (FIRST + 50_000, FIRST + 50_100),
            [&sack_of(&[twice])[..], &nops(8)].concat(),
        );
        for (name, blocks, left) in [
            ("a repetition", &[twice][..], sack_of(&[twice])),
            ("a repetition and more", &[twice, ahead_of_it], told),
            ("a part of it ahead", &[(held - 500, held + 1)], nops(12)),
            ("a repetition behind", &[ahead_of_it, twice], nops(20)),
        ] {
            let option = sack_of(blocks);
            for (kernel, verdict, leaves) in [
                (pure(held, 9000), Passed, pure(held, 9000)),
                (
                    pure(ahead, 9000).data(odd),
                    Lowered,
                    pure(held, 9500).data(odd),
                ),
            ] {
                let leaves = leaves.options(&[&left]);
                table.push((name, kernel.options(&[&option]), verdict, Some(leaves)));
            }
        }
        for (name, kernel, verdict, leaves) in &table {
            gate.open_flow(confirmed);
            let frame = leaves.as_ref().map(Segment::frame);
            gate.expect(name, &kernel.frame(), 0, *verdict, frame.as_deref());
            // Behind IP options, and behind a priority tag.
            let behind_options = |segment: &Segment| with_ip_options(segment.frame(), 1);
            gate.open_flow(confirmed);
            let frame = leaves.as_ref().map(behind_options);
            let input = behind_options(kernel);
            gate.expect(name, &input, 0, *verdict, frame.as_deref());
            gate.open_flow(confirmed);
            let frame = leaves.as_ref().map(|segment| tagged(0, &segment.frame()));
            let input = tagged(0, &kernel.frame());
            gate.expect(name, &input, 0, *verdict, frame.as_deref());
        }
    });
}

#[test]
fn options_that_linux_does_not_write_are_left_alone() {
    use AckGateVerdict::{Lowered, Passed};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let held = FIRST + 1000;
        let confirmed = Confirmation::new(held, FIRST + 100_000);
        let mut cut = sack(4);
        cut.truncate(8);
        let unknown = [254, 4, 0, 0];
        // Name, options that the kernel sends, those that leave.
        type Options<'a> = &'a [&'a [u8]];
        let table: [(&str, Options<'_>, Options<'_>); 9] = [
            ("SACK of length 0", &[&[5, 0, 1, 1]], &[&[5, 0, 1, 1]]),
            ("SACK of length 1", &[&[1, 1, 5, 1]], &[&[1, 1, 5, 1]]),
            ("SACK beyond the header", &[&cut], &[&cut]),
            ("SACK without blocks", &[&[1, 1, 5, 2]], &[&nops(4)]),
            ("timestamps of length 0", &[&[8, 0, 1, 1]], &[&[8, 0, 1, 1]]),
            (
                "timestamps beyond the header",
                &[&STAMPS[..8]],
                &[&STAMPS[..8]],
            ),
            (
                "SACK behind the end of the list",
                &[&[0; 4], &sack(1)],
                &[&[0; 4], &sack(1)],
            ),
            (
                "SACK behind an unknown option",
                &[&unknown, &sack(1)],
                &[&unknown, &nops(12)],
            ),
            (
                "SACK behind two",
                &[&unknown, STAMPS, &sack(1)],
                &[&unknown, STAMPS, &nops(12)],
            ),
        ];
        for (name, kernel, leaves) in table {
            for (segment, verdict, expected) in [
                (pure(held, 9000), Passed, pure(held, 9000)),
                (
                    pure(held + 2001, 9000).data(b"x"),
                    Lowered,
                    pure(held, 9500).data(b"x"),
                ),
            ] {
                gate.open_flow(confirmed);
                let (segment, expected) = (segment.options(kernel), expected.options(leaves));
                gate.expect(name, &segment.frame(), 0, verdict, Some(&expected.frame()));
            }
            let has_stamps = name == "SACK behind two";
            assert_eq!(gate.sent().tsval, if has_stamps { 7 } else { 0 }, "{name}");
        }
        // Options that are said to be where the data is, and behind the frame.
        let segment = pure(held, 9000).data(b"no options here").frame();
        for offset in [0x00, 0x40, 0xf0] {
            gate.open_flow(confirmed);
            let frame = with(segment.clone(), 46, &[offset]);
            gate.expect("data offset", &frame, 0, Passed, Some(&frame));
        }
        // A SACK option of which the frame has the head only cannot be erased: nothing leaves.
        gate.open_flow(confirmed);
        let frame = pure(held, 9000).data(&sack(4)[..20]).frame();
        let frame = with(frame, 46, &[0xf0]);
        gate.expect("half an option", &frame, 0, AckGateVerdict::Held, None);
        assert_eq!(gate.sent().told, FIRST, "nobody was told");
    });
}

#[test]
fn headers_outside_the_linear_part_of_a_buffer_are_rewritten_too() {
    in_namespace(|| {
        veth(9000);
        let mut gate = Gate::new(load_guarded());
        gate.programs.attach_gate("eth0").unwrap();
        // Of a frame longer than a page a packet socket puts the Ethernet header alone into the linear
        // part (`packet_alloc_skb`, net/packet/af_packet.c).
        let (host, lan) = (packet_socket("eth0"), packet_socket("peer0"));
        let payload = [7; 8000];
        let held = FIRST + 1000;
        gate.open_flow(Confirmation::new(held, FIRST + 100_000));
        let ahead = pure(held + 2001, 9000).data(&payload);
        transmit(&host, &ahead.options(&[STAMPS, &sack(3)]).frame());
        let lowered = pure(held, 9500).data(&payload);
        let lowered = lowered.options(&[STAMPS, &nops(28)]).frame();
        let found = receive(&lan, QUIET, from_vip).unwrap();
        assert!(found == lowered, "found {:02x?}", &found[..100]);
        assert_eq!(gate.sent().next, NEXT + 8000);
    });
}

#[test]
fn a_version_is_odd_while_its_slot_is_being_written() {
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        let (maps, over) = (gate.maps.clone(), AtomicBool::new(false));
        let (frame, context) = (pure(FIRST, 9000).frame(), SkbContext::default());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let programs = &mut gate.programs;
                    programs
                        .test_runs(Program::Gate, &frame, context, 10_000)
                        .unwrap();
                }
            });
            let deadline = Instant::now() + slowed(PATIENCE);
            let is_odd = || maps.glimpse(SLOT).unwrap().version % 2 == 1;
            let mut looks = std::iter::repeat_with(is_odd);
            let seen = looks.any(|is_odd| is_odd || Instant::now() > deadline);
            over.store(true, Ordering::Relaxed);
            assert!(seen && Instant::now() <= deadline, "never odd");
        });
        assert_eq!(gate.sent().version % 2, 0);
    });
}

#[test]
fn what_is_held_is_released_by_the_agents_mark_and_the_next_segment_goes_on_from_there() {
    use AckGateVerdict::{Held, Passed, Released};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let edge = FIRST + 200_000;
        gate.open_flow(Confirmation::new(FIRST, edge));
        let ahead = pure(FIRST + 1448, 20_000).options(&[STAMPS]);
        gate.expect("ahead", &ahead.frame(), 0, Held, None);
        let sent = gate.sent();
        assert_eq!((sent.ack, sent.told), (FIRST + 1448, FIRST));
        assert_eq!(sent.edge, FIRST + 1448 + 80_000);
        assert_eq!((sent.told_edge, sent.next), (FIRST_EDGE, NEXT));
        assert_eq!((sent.tsval, sent.tsecr), (7, 9));
        assert_eq!(sent.version % 2, 0);
        assert!(now_ns() - sent.at_ns < 1_000_000_000);

        let confirmed = Confirmation::new(FIRST + 1448, edge);
        assert!(gate.maps.confirm(SLOT, confirmed));
        let pending = release(&sent, confirmed, SHIFT).unwrap();
        assert_eq!(pending.timestamp, Some((7, 9)));
        // The agent's SACK blocks are the standby's: they stay.
        let blocks = sack(1);
        let released = pure(pending.ack, pending.window).options(&[STAMPS, &blocks]);
        let frame = released.frame();
        gate.expect("released", &frame, RELEASE_MARK, Released, Some(&frame));
        let sent = gate.sent();
        assert_eq!((sent.told, sent.told_edge), (sent.ack, sent.edge));
        assert_eq!(release(&sent, confirmed, SHIFT), None);
        let again = ahead.frame();
        gate.expect("again", &again, 0, Passed, Some(&again));
        // Data is counted in `next`.
        let long = pure(FIRST + 1448, 20_000).data(&[7; 3001]);
        gate.expect("data", &long.frame(), 0, Passed, Some(&long.frame()));
        assert_eq!(gate.sent().next, NEXT + 3001);
        assert_eq!(gate.maps.sent(16), None, "there is no such slot");
    });
}

#[test]
fn an_open_gate_changes_nothing_and_remembers_what_it_told() {
    use AckGateVerdict::{Lowered, Open};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.maps.set_mode(false).unwrap();
        let blocks = sack(2);
        let ahead = pure(FIRST + 5000, 40_000).options(&[STAMPS, &blocks]);
        gate.expect("open", &ahead.frame(), 0, Open, Some(&ahead.frame()));
        let sent = gate.sent();
        assert_eq!((sent.told, sent.ack), (FIRST + 5000, FIRST + 5000));
        assert_eq!(sent.told_edge, FIRST + 5000 + 160_000);
        // What was told is not taken back: neither the ACK nor the edge.
        gate.maps.set_mode(true).unwrap();
        let data = pure(FIRST + 6000, 39_750).data(b"x");
        let lowered = pure(FIRST + 5000, 40_000).data(b"x");
        gate.expect("shut", &data.frame(), 0, Lowered, Some(&lowered.frame()));
        // Nor is the flow waited for that is let go alone.
        assert!(gate.maps.confirm(SLOT, Confirmation::OPEN));
        gate.expect("let go", &data.frame(), 0, Open, Some(&data.frame()));
    });
}

#[test]
fn what_the_standby_does_not_know_passes_and_no_services_port_is_counted() {
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let blocks = sack(1);
        let data = pure(FIRST + 5000, 1).options(&[&blocks]).data(b"x").frame();
        let unguarded = AckGateVerdict::Unguarded;
        gate.expect("unknown flow", &data, 0, unguarded, Some(&data));
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.maps.withdraw(&FLOW).unwrap();
        gate.maps.withdraw(&FLOW).unwrap();
        gate.expect("withdrawn", &data, 0, unguarded, Some(&data));
        let mut other = pure(FIRST + 5000, 1).frame();
        other[34..36].copy_from_slice(&9999_u16.to_be_bytes());
        assert_eq!(gate.run(&other, 0), (UNSPEC, other, vec![]));
        // A slot that is not there guards nothing.
        let guarded = Guarded {
            slot: 16,
            ..Guarded::default()
        };
        gate.maps.publish(FLOW, guarded).unwrap();
        gate.expect("slot 16", &data, 0, unguarded, Some(&data));
        assert!(!gate.maps.confirm(16, Confirmation::default()));
    });
}

#[test]
fn without_an_ack_gate_nothing_is_held_or_counted() {
    in_namespace(|| {
        let mut gate = Gate::new(load());
        let mut ring = gate.programs.take_openings().unwrap();
        for segment in [
            pure(FIRST, 1).flags(SYN | ACK),
            pure(FIRST + 5000, 1).data(b"x"),
        ] {
            let frame = segment.frame();
            assert_eq!(gate.run(&frame, 0), (UNSPEC, frame, vec![]));
        }
        assert!(ring.next().is_none());
    });
}

#[test]
fn a_client_that_acknowledges_what_was_not_sent_is_not_copied() {
    use MirrorVerdict::{BeyondSent, Cloned};
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut gate = Gate::new(load_guarded_mirror("eth0"));
        gate.programs.attach_gate("eth0").unwrap();
        gate.programs.attach_mirror("eth0").unwrap();
        let standby = MirrorPeer::at(STANDBY);
        gate.programs.mirror().unwrap().write(standby).unwrap();
        let lan = packet_socket("peer0");
        let from_client = |ack, flags| pure(ack, 1).flags(flags).seq(FIRST).to_vip();
        let table = |gate: &Gate, cases: &[(u32, u8, MirrorVerdict)]| {
            for (ack, flags, expected) in cases {
                let before = gate.counters.mirror().unwrap();
                transmit(&lan, &from_client(*ack, *flags));
                let after = gate.counters.mirror().unwrap();
                let moved = |verdict| after.get(verdict) - before.get(verdict);
                let verdicts = MirrorVerdict::ALL.into_iter().filter(|it| moved(*it) > 0);
                assert!(verdicts.eq([*expected]), "ack {ack}, flags {flags:#x}");
            }
        };
        table(&gate, &[(NEXT + 1, ACK, Cloned)]);
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        table(
            &gate,
            &[
                (NEXT, ACK, Cloned),
                (NEXT + 1, ACK, BeyondSent),
                (NEXT + 1, ACK | FIN, BeyondSent),
                (NEXT + 1, SYN, Cloned),
            ],
        );
        // The active sends ten bytes.
        let data = pure(FIRST, 1).data(&[7; 10]).frame();
        gate.run(&data, 0);
        table(
            &gate,
            &[
                (NEXT + 1, ACK, Cloned),
                (NEXT + 10, ACK, Cloned),
                (NEXT + 11, ACK, BeyondSent),
            ],
        );
    });
}

/// Sequence number, acknowledgement and options of a frame of this length, all headers plain.
fn numbers(frame: &[u8]) -> (u32, u32, &[u8]) {
    let word = |at: usize| u32::from_be_bytes(*frame[at..].first_chunk().unwrap());
    let header_len = usize::from(frame[46] >> 4) * 4;
    (word(38), word(42), &frame[54..34 + header_len])
}

/// That the checksum is the pseudo-header's only: the device completes it.
fn assert_partial(frame: &[u8]) {
    let expected = folded(&pseudo_header(frame.len() - 34));
    let found = u16::from_be_bytes([frame[50], frame[51]]);
    assert_eq!(found, expected, "the device would complete it wrong");
}

#[test]
fn a_kernels_own_segments_are_told_apart_and_their_checksums_left_to_the_device() {
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        run(&format!("ip addr add {VIP}/24 dev eth0"));
        run(&format!(
            "ip neigh add {CLIENT} lladdr 02:00:00:00:00:02 dev eth0"
        ));
        let mut gate = Gate::new(load_guarded());
        gate.programs.attach_gate("eth0").unwrap();
        let listener = TcpListener::bind((VIP, SERVICE)).unwrap();
        let lan = packet_socket("peer0");
        let hear = || receive(&lan, QUIET, from_vip);
        // Without timestamps, though they were agreed on: the kernel would compare them with its own.
        let say = |seq, ack, flags, options: &[u8], data: &[u8]| {
            let segment = pure(ack, 64_000).seq(seq).flags(flags);
            transmit(&lan, &segment.options(&[options]).data(data).client_frame());
        };
        let room = Confirmation::new(FIRST, FIRST + (1 << 20));
        gate.open_flow(room);
        say(FIRST - 1, 0, SYN, SYN_OPTIONS, b"");
        let syn_ack = hear().unwrap();
        let (isn, _, options) = numbers(&syn_ack);
        let [.., 1, 3, 3, shift] = *options else {
            panic!("no window scale in {options:?}");
        };
        let next = isn.wrapping_add(1);
        let window = u16::from_be_bytes([syn_ack[48], syn_ack[49]]);
        let sent = Sent::new(FIRST - 1, isn, window);
        gate.maps.reset(SLOT, sent).unwrap();
        let guarded = Guarded {
            slot: SLOT,
            client_isn: FIRST - 1,
            shift: u32::from(shift),
        };
        gate.maps.publish(FLOW, guarded).unwrap();
        say(FIRST, next, ACK, &[], b"");
        listener.set_nonblocking(true).unwrap();
        let accept = || listener.accept().ok();
        let (mut server, _) = wait_until("connection", accept, Option::is_some).unwrap();
        server.set_nonblocking(false).unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();

        // Behind a hole: the kernel says so, and is not heard.
        say(FIRST + 1000, next, ACK, &[], &[7; 500]);
        let duplicate = hear().unwrap();
        let (_, ack, options) = numbers(&duplicate);
        assert_eq!((ack, &options[12..]), (FIRST, &nops(12)[..]));
        assert_eq!(options[..4], STAMPS[..4]);
        assert_partial(&duplicate);

        // The hole is filled. The standby has not said so, and data goes on.
        say(FIRST, next, ACK, &[], &[7; 1000]);
        server.read_exact(&mut [0; 1500]).unwrap();
        assert_eq!(hear(), None, "an ACK ahead of the standby");
        server.write_all(&[9; 5000]).unwrap();
        let data = hear().unwrap();
        let (seq, ack, _) = numbers(&data);
        assert_eq!((seq, ack), (next, FIRST));
        assert_partial(&data);
        let sent = gate.sent();
        assert_eq!((sent.ack, sent.told), (FIRST + 1500, FIRST));
        assert_eq!(sent.next, next.wrapping_add(5000));
        let counts = gate.counters.ack_gate().unwrap();
        assert!(counts.get(AckGateVerdict::Held) > 0);
        assert!(counts.get(AckGateVerdict::Lowered) > 0);
    });
}
