//! Whatever the frame and whatever the state: the programs do in the kernel what the functions of
//! `rfsis-common` say in user space, and nothing besides.

use std::cell::RefCell;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestError, TestRunner};
use rfsis_common::ack_gate::{Confirmation, Guarded, RELEASE_MARK, Sent, sent_flags};
use rfsis_common::frame::tcp_flags::{ACK, ECE, FIN, RST, SYN};
use rfsis_common::maps::MirrorPeer;
use rfsis_common::mirror::MirrorEgress;
use tests::patience::slowness;

use crate::frames::{
    CLIENT, CLIENT_PORT, OBSERVED, OWN, SERVICE, STANDBY, VIP, arp, ethernet, heartbeat, ipv4,
    refusal, tagged, udp_from_vip, udp_to_vip, with, with_ip_options,
};
use crate::host::{GUARD, in_namespace};
use crate::model::expected;
use crate::rig::{Known, PROGRAMS, Rig, Setup, World, runs};
use crate::segments::{FIRST, FIRST_EDGE, NEXT, SHIFT, SLOT, STAMPS, Segment, nops, sack, sack_of};

/// Frames for each set-up on real hardware.
const CASES: u32 = 3000;

/// A number near one that matters.
fn near(number: u32) -> impl Strategy<Value = u32> {
    let distance = prop_oneof![Just(0), -2..3_i32, -70_000..140_000_i32];
    prop_oneof![
        20 => distance.prop_map(move |distance| number.wrapping_add_signed(distance)),
        1 => any::<u32>(),
    ]
}

fn window() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), Just(u16::MAX), any::<u16>()]
}

/// TCP options, most of them sound.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => Just(STAMPS.to_vec()),
        2 => (1..=4_u8).prop_map(sack),
        2 => vec((near(FIRST), near(FIRST)), 1..=4).prop_map(|blocks| sack_of(&blocks)),
        1 => (0..8_usize).prop_map(nops),
        // Kind and length: of some length that Linux never writes, 0 and 1 included.
        2 => (select(vec![0, 1, 2, 5, 8, 19, 254]), 0..44_u8).prop_map(|(kind, length)| {
            let mut option = vec![kind, length];
            option.resize(usize::from(length.clamp(2, 12)), 0xb5);
            option
        }),
    ];
    vec(piece, 0..4).prop_map(|pieces| {
        let mut options = pieces.concat();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 1);
        options
    })
}

fn segment() -> impl Strategy<Value = Segment> {
    let flags = prop_oneof![
        6 => Just(ACK),
        4 => select(vec![SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, ECE | ACK]),
        1 => any::<u8>(),
    ];
    let seq = prop_oneof![near(NEXT), Just(NEXT - 1)];
    let payload = vec(any::<u8>(), 0..40);
    (flags, seq, near(FIRST), window(), options(), payload).prop_map(
        |(flags, seq, ack, window, options, payload)| Segment {
            flags,
            seq,
            ack,
            window,
            options,
            payload,
        },
    )
}

/// TCP between the client and the VIP, most of it the flow's.
fn tcp() -> impl Strategy<Value = Vec<u8>> {
    let ports = (
        prop_oneof![8 => Just(SERVICE), 2 => Just(OBSERVED), 1 => Just(9999)],
        prop_oneof![8 => Just(CLIENT_PORT), 1 => any::<u16>()],
    );
    (segment(), ports, any::<bool>()).prop_map(|(segment, (service, client), to_vip)| {
        let packet = if to_vip {
            ipv4(6, CLIENT, VIP, &segment.tcp(client, service))
        } else {
            ipv4(6, VIP, CLIENT, &segment.tcp(service, client))
        };
        ethernet(0x0800, &packet)
    })
}

fn other() -> impl Strategy<Value = Vec<u8>> {
    let address = || select(vec![VIP, CLIENT, OWN]);
    let packet = (any::<u8>(), address(), address(), vec(any::<u8>(), 0..60));
    let question = (0..4_u8, address(), address(), vec(any::<u8>(), 0..60));
    prop_oneof![
        packet.prop_map(|(protocol, from, to, payload)| {
            ethernet(0x0800, &ipv4(protocol, from, to, &payload))
        }),
        question.prop_map(|(operation, from, to, rest)| arp(operation, from, to, &rest)),
        select(vec![udp_to_vip(), udp_from_vip(), heartbeat()]),
        select(vec![refusal(SERVICE), refusal(9999)]),
        vec(any::<u8>(), 14..120),
    ]
}

/// A frame, and what may have happened to it.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let sound = prop_oneof![5 => tcp(), 3 => other()];
    let words = prop_oneof![6 => Just(0), 1 => 1..=10_u8];
    let tags = prop_oneof![
        8 => Just(vec![]),
        2 => Just(vec![0]),
        1 => vec(any::<u16>(), 1..3),
    ];
    let standby = prop_oneof![9 => Just(false), 1 => Just(true)];
    // In the headers, where they matter.
    let damage = prop_oneof![
        4 => Just(vec![]),
        1 => vec((0..80_usize, any::<u8>()), 1..4),
    ];
    let end = prop_oneof![
        6 => Just(End::AsItIs),
        1 => any::<Index>().prop_map(End::Cut),
        1 => (1..60_usize).prop_map(End::Padded),
    ];
    (sound, words, tags, standby, damage, end).prop_map(
        |(mut frame, words, tags, standby, damage, end)| {
            if words > 0 && frame.len() >= 34 && frame[12..15] == [8, 0, 0x45] {
                frame = with_ip_options(frame, words);
            }
            for tci in tags {
                frame = tagged(tci, &frame);
            }
            if standby {
                frame = with(frame, 0, &STANDBY);
            }
            for (at, value) in damage {
                if let Some(byte) = frame.get_mut(at) {
                    *byte = value;
                }
            }
            match end {
                End::AsItIs => {}
                End::Cut(index) => frame.truncate(14 + index.index(frame.len() - 13)),
                End::Padded(more) => frame.resize(frame.len() + more, 0),
            }
            frame
        },
    )
}

#[derive(Clone, Copy, Debug)]
enum End {
    AsItIs,
    Cut(Index),
    Padded(usize),
}

fn known() -> impl Strategy<Value = Known> {
    let slot = prop_oneof![9 => Just(SLOT), 1 => Just(GUARD.slots)];
    let shift = prop_oneof![4 => Just(SHIFT), 1 => 0..=16_u32];
    let isn = prop_oneof![4 => Just(FIRST - 1), 1 => any::<u32>()];
    let confirmation = prop_oneof![
        9 => (near(FIRST), near(FIRST_EDGE)).prop_map(|(ack, edge)| Confirmation::new(ack, edge)),
        1 => Just(Confirmation::OPEN),
    ];
    let numbers = (near(NEXT), near(FIRST), near(FIRST_EDGE));
    let told = (near(FIRST), near(FIRST_EDGE));
    let flags = prop_oneof![4 => Just(0), 1 => 0..16_u32];
    // Odd as well: two segments of a flow that pass at once may leave it so in between.
    let version = any::<u32>();
    (
        slot,
        shift,
        isn,
        confirmation,
        numbers,
        told,
        (flags, version),
    )
        .prop_map(
            |(slot, shift, client_isn, confirmation, numbers, told, (flags, version))| Known {
                guarded: Guarded {
                    slot,
                    client_isn,
                    shift,
                },
                confirmation,
                sent: Sent {
                    at_ns: 0,
                    version: version & !1,
                    next: numbers.0,
                    ack: numbers.1,
                    edge: numbers.2,
                    told: told.0,
                    told_edge: told.1,
                    flags: flags
                        & (sent_flags::TIMESTAMPS | sent_flags::FIN_SENT | sent_flags::ECE),
                    ..Sent::default()
                },
            },
        )
}

fn world() -> impl Strategy<Value = World> {
    let state = prop_oneof![6 => Just(1), 4 => 0..6_u64];
    let mostly = || prop_oneof![6 => Just(true), 1 => Just(false)];
    let standby = mostly().prop_map(|is_heard| {
        if is_heard {
            MirrorPeer::at(STANDBY)
        } else {
            MirrorPeer::NOBODY
        }
    });
    let guarded = prop_oneof![3 => known().prop_map(Some), 1 => Just(None)];
    let named = (any::<bool>(), any::<bool>());
    (state, mostly(), named, standby, mostly(), guarded).prop_map(
        |(state, leased, (live, approved), standby, guards, guarded)| World {
            state,
            leased,
            live,
            approved,
            standby,
            guards,
            guarded,
        },
    )
}

fn holds(setup: Setup) {
    in_namespace(move || {
        let rig = RefCell::new(Rig::new(setup));
        let mut runner = TestRunner::new(Config {
            cases: CASES / slowness(),
            failure_persistence: None,
            ..Config::default()
        });
        let mark = prop_oneof![4 => Just(0), 1 => Just(RELEASE_MARK), 1 => any::<u32>()];
        let case = (world(), frame(), mark, select(PROGRAMS.to_vec()));
        let result = runner.run(&case, |(world, frame, mark, program)| {
            prop_assume!(runs(program, &frame));
            let mut rig = rig.borrow_mut();
            rig.set(&world);
            let found = rig.run(program, &frame, mark);
            let ifindex = rig.ifindex(program);
            let expected = expected(setup, &world, program, &frame, mark, ifindex);
            let differences = found.differences(&expected);
            prop_assert!(differences.is_empty(), "{differences:#?}");
            Ok(())
        });
        match result {
            Ok(()) => {}
            Err(TestError::Fail(reason, (world, frame, mark, program))) => {
                panic!("{program:?} with mark {mark:#x} on {frame:02x?}\nin {world:#?}: {reason}")
            }
            Err(error) => panic!("{error}"),
        }
    });
}

#[test]
fn with_tap_lan_and_without_an_ack_gate() {
    holds(Setup {
        mirror: None,
        ack_gate: false,
    });
}

#[test]
fn with_tap_lan_and_an_ack_gate() {
    holds(Setup {
        mirror: None,
        ack_gate: true,
    });
}

#[test]
fn with_a_mirror_and_without_an_ack_gate() {
    for egress in MirrorEgress::ALL {
        holds(Setup {
            mirror: Some(egress),
            ack_gate: false,
        });
    }
}

#[test]
fn with_a_mirror_and_an_ack_gate() {
    for egress in MirrorEgress::ALL {
        holds(Setup {
            mirror: Some(egress),
            ack_gate: true,
        });
    }
}
