//! What becomes of each kind of frame, sound or not, in each state of a node: a table, one row a frame.

use rfsis_agent::bpf::Program;
use rfsis_common::frame::tcp_flags::{ACK, SYN};
use rfsis_common::maps::{Direction, FlowKey, FrameHeader, HEARTBEAT_CAPTURE, HeldEvent, State};
use rfsis_common::mirror::{MirrorEgress, MirrorVerdict};
use rfsis_common::verdict::{GateVerdict, XdpVerdict};
use tests::patience::wait_until;

use crate::frames::{FLOW, OWN_MAC, STANDBY, tcp_from_vip, tcp_to_vip};
use crate::host::{in_namespace, packet_socket, transmit};
use crate::kinds::{Row, fin, rows};
use crate::rig::{Effects, PROGRAMS, Rig, Setup, World, runs};

/// Each state and a number that is none, within the lease and past it; the flow live and approved or not.
fn worlds() -> Vec<World> {
    let mut worlds = Vec::new();
    for state in (0..State::ALL.len() as u64).chain([99]) {
        for (leased, named) in [(true, false), (true, true), (false, false), (false, true)] {
            worlds.push(World {
                state,
                leased,
                live: named,
                approved: named,
                ..World::of(State::Standby)
            });
        }
    }
    worlds
}

/// What a row says of a run.
fn expected(row: &Row, program: Program, world: &World, ifindex: u32) -> Effects {
    let (_, frame, answers) = row;
    let is_active = world.state == State::Active as u64;
    let speaks = is_active && world.leased;
    let l3_offset = match frame[12..14] {
        [0x81, 0] | [0x88, 0xa8] => 18,
        _ => 14,
    };
    let mut effects = Effects::default();
    let mut goes_on = true;
    if matches!(program, Program::Xdp | Program::Ingress) {
        let verdict = answers.caught[usize::from(is_active) + usize::from(is_active && world.live)];
        effects.xdp.push(verdict);
        goes_on = !matches!(verdict, XdpVerdict::Mirrored | XdpVerdict::Heartbeat);
        if verdict == XdpVerdict::Mirrored {
            let header = FrameHeader {
                arrival_ns: 0,
                len: frame.len() as u32,
                ifindex,
                direction: answers.direction as u16,
                state: State::from_u8(world.state as u8).unwrap_or(State::Standby) as u16,
                l3_offset: l3_offset as u16,
                flags: 0,
            };
            effects.frames.push((header, frame.clone()));
        }
        if verdict == XdpVerdict::Heartbeat {
            let captured = &frame[..frame.len().min(HEARTBEAT_CAPTURE)];
            effects.heartbeats.push((ifindex, captured.to_vec()));
        }
    }
    if program == Program::Gate {
        let verdict = answers.gate[usize::from(speaks) + usize::from(speaks && world.approved)];
        effects.gate.push(verdict);
        goes_on = matches!(verdict, GateVerdict::Other | GateVerdict::Passed);
        const TCP: u8 = 6;
        if verdict == GateVerdict::Held && frame[l3_offset + 9] == TCP {
            let tcp = l3_offset + 4 * usize::from(frame[l3_offset] & 15);
            let client: [u8; 4] = *frame[l3_offset + 16..].first_chunk().unwrap();
            effects.held.push(HeldEvent {
                at_ns: 0,
                flow: FlowKey {
                    client_addr: u32::from_be_bytes(client),
                    ..FLOW
                },
                seq: 1000,
                ack: 2000,
                flags: frame[tcp + 13].into(),
                reserved: 0,
            });
        }
    }
    let way = match program {
        Program::Xdp => None,
        Program::Ingress | Program::Mirror => Some(Direction::ToVip),
        Program::Gate => Some(Direction::FromVip),
    };
    if goes_on && answers.copied && way == Some(answers.direction) {
        let hands_over = world.state == State::HandingOver as u64 && program != Program::Gate;
        if speaks || (hands_over && world.leased) {
            effects.mirror.push(MirrorVerdict::Cloned);
            let copy = [&STANDBY[..], &OWN_MAC, &frame[12..]].concat();
            effects.copies.push(copy);
        } else {
            effects.mirror.push(MirrorVerdict::Closed);
        }
    }
    effects.output = goes_on.then(|| frame.clone());
    effects
}

const COPYING: Setup = Setup {
    mirror: Some(MirrorEgress::Full),
    ack_gate: false,
};

#[test]
fn every_kind_of_frame_has_its_verdict_in_every_state() {
    in_namespace(|| {
        let mut rig = Rig::new(COPYING);
        let rows = rows();
        for world in worlds() {
            for row in &rows {
                for program in PROGRAMS {
                    if !runs(program, &row.1) {
                        continue;
                    }
                    rig.set(&world);
                    let found = rig.run(program, &row.1, 0);
                    let expected = expected(row, program, &world, rig.ifindex(program));
                    let differences = found.differences(&expected);
                    assert!(
                        differences.is_empty(),
                        "{}: {program:?}, {world:?}: {differences:#?}",
                        row.0
                    );
                }
            }
        }
    });
}

/// What the kernel does not take for a test run, and tags, which it puts beside the frame when it comes in.
fn wants_a_wire((name, frame, _): &Row) -> bool {
    let has_tag = name.starts_with("VLAN ") || *name == "two tags";
    // The kernel drops a tag without a type behind it.
    !runs(Program::Gate, frame) || (has_tag && frame.len() > 18)
}

#[test]
fn frames_that_end_in_a_header_and_tagged_ones_have_the_same_verdicts_off_the_wire() {
    in_namespace(|| {
        let mut rig = Rig::new(COPYING);
        rig.attach();
        let (host, lan) = (packet_socket("eth0"), packet_socket("peer0"));
        let rows: Vec<Row> = rows().into_iter().filter(wants_a_wire).collect();
        assert!(rows.len() > 8);
        for state in [State::Standby, State::Active] {
            let world = World::of(state);
            rig.set(&world);
            for row in &rows {
                let (name, frame, _) = row;
                let before = rig.counts();
                for socket in [&host, &lan] {
                    transmit(socket, frame);
                }
                let seen = || rig.verdicts_since(&before);
                let verdicts = wait_until("both verdicts", seen, |(caught, gate)| {
                    !caught.is_empty() && !gate.is_empty()
                });
                let caught = expected(row, Program::Ingress, &world, 0).xdp;
                let gate = expected(row, Program::Gate, &world, 0).gate;
                assert_eq!(verdicts, (caught, gate), "{name}, {state:?}");
            }
        }
    });
}

#[test]
fn a_new_connection_does_not_inherit_an_approval() {
    in_namespace(|| {
        let mut rig = Rig::new(COPYING);
        let approved = World {
            approved: true,
            ..World::of(State::Active)
        };
        let (syn, syn_ack) = (tcp_to_vip(SYN, b""), tcp_from_vip(SYN | ACK, b""));
        // Also where nobody answers it but the kernel of a dead agent.
        let begins = [
            (Program::Gate, syn_ack, Some(GateVerdict::Passed)),
            (Program::Ingress, syn.clone(), None),
            (Program::Mirror, syn, None),
        ];
        for (program, begin, verdict) in begins {
            rig.set(&approved);
            for (name, program, frame, expected) in [
                ("FIN", Program::Gate, fin(), Some(GateVerdict::Passed)),
                ("FIN again", Program::Gate, fin(), Some(GateVerdict::Passed)),
                ("it begins", program, begin, verdict),
                ("its FIN", Program::Gate, fin(), Some(GateVerdict::Held)),
            ] {
                let found = rig.run(program, &frame, 0);
                assert_eq!(found.gate, Vec::from_iter(expected), "{name}, {program:?}");
            }
        }
    });
}
