//! The rings to the agent: what is in them whole, what is cut, who is woken, and what is said when they are full.

use std::os::fd::AsFd as _;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, gettid};
use rfsis_agent::bpf::{Program, Programs, SkbContext, XdpMode};
use rfsis_common::frame::tcp_flags::{ACK, SYN};
use rfsis_common::maps::{
    FRAME_HEADER_LEN, FRAME_SLOTS, FrameHeader, HEARTBEAT_CAPTURE, HeartbeatEvent,
};
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};
use rfsis_common::verdict::XdpVerdict;
use tests::patience::{PATIENCE, slowed, wait_until};

use crate::frames::{FLOW, heartbeat, tcp_from_vip, tcp_to_vip, udp_to_vip, with};
use crate::host::{in_namespace, load, load_with_ring, now_ns};

/// Runs the program that catches frames and gives what it did: whether the frame goes on, and the one
/// verdict that was counted.
fn catch(programs: &mut Programs, hook: XdpMode, name: &str, frame: &[u8]) -> (Fate, XdpVerdict) {
    let counters = programs.counters().unwrap();
    let before = counters.xdp().unwrap();
    let program = match hook {
        XdpMode::Native => Program::Xdp,
        XdpMode::Tc => Program::Ingress,
    };
    // `enum xdp_action`: XDP_DROP, XDP_PASS; TC_ACT_STOLEN, TC_ACT_UNSPEC (include/uapi/linux).
    let fate = match (
        hook,
        programs.test_run(program, frame, SkbContext::default()),
    ) {
        (XdpMode::Native, Ok((1, _))) | (XdpMode::Tc, Ok((4, _))) => Fate::Dropped,
        (XdpMode::Native, Ok((2, _))) | (XdpMode::Tc, Ok((-1, _))) => Fate::Passed,
        (_, other) => panic!("{name}: {other:?}"),
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

/// Somebody who waits for a ring, reads it empty when woken, and waits again.
pub struct Reader {
    wakes: mpsc::Receiver<(Pid, usize)>,
}

impl Reader {
    pub fn new(mut ring: RingBuf<MapData>) -> Self {
        let (tell, wakes) = mpsc::channel();
        thread::spawn(move || {
            // Who asks while something lies in the ring does not wait: main waits until this one does.
            while tell.send((gettid(), 0)).is_ok() {
                let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                let read = std::iter::from_fn(|| ring.next().map(drop)).count();
                if tell.send((gettid(), read)).is_err() {
                    return;
                }
            }
        });
        Self { wakes }
    }

    /// Waits until it waits.
    pub fn asleep(&self) {
        let (reader, _) = self.wakes.recv().unwrap();
        let stat = || std::fs::read_to_string(format!("/proc/self/task/{reader}/stat")).unwrap();
        wait_until("the reader to wait", stat, |stat| stat.contains(") S "));
    }

    /// How many entries it found when it was woken.
    pub fn woken(&self) -> usize {
        self.wakes.recv_timeout(slowed(PATIENCE)).unwrap().1
    }

    pub fn sleeps_on(&self) {
        let silence = self.wakes.recv_timeout(Duration::from_millis(100));
        assert!(silence.is_err(), "{silence:?}");
    }
}

#[test]
fn a_reader_that_rests_is_woken_by_data_and_a_held_syn_ack_and_by_nothing_else() {
    on_each_hook(|hook| {
        let mut programs = load();
        let reader = Reader::new(programs.take_frames().unwrap());
        let rest = programs.rest().unwrap();
        let mut send = |frame: &[u8]| {
            let (_, verdict) = catch(&mut programs, hook, "TCP", frame);
            assert_eq!(verdict, XdpVerdict::Mirrored);
        };
        let (small, data) = (tcp_to_vip(ACK, b""), tcp_to_vip(ACK, &[7; 64]));
        for until in [0, now_ns()] {
            rest.write(until).unwrap();
            reader.asleep();
            send(&small);
            assert_eq!(reader.woken(), 1, "{hook:?}: it does not rest");
        }
        reader.asleep();
        rest.write(u64::MAX).unwrap();
        send(&small);
        reader.sleeps_on();
        send(&data);
        assert_eq!(reader.woken(), 2, "{hook:?}: and what had come before");
        reader.asleep();
        send(&small);
        assert_eq!(
            reader.woken(),
            1,
            "{hook:?}: the one with data has ended the rest"
        );
        reader.asleep();
        rest.write(u64::MAX).unwrap();
        // Urgent pointer of a plain SYN-ACK, and of the copy of one that is held.
        for urgent in [[0; 2], HELD_URGENT.to_be_bytes()] {
            send(&with(
                tcp_from_vip(SYN | ACK, b""),
                34 + URGENT_OFFSET,
                &urgent,
            ));
        }
        assert_eq!(
            reader.woken(),
            2,
            "{hook:?}: a client waits for the held one"
        );
        // The thread ends when it finds nobody listening.
        drop(reader);
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
