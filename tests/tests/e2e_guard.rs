//! What the ACK gate promises, at the instants that matter: each is brought about by a LAN that loses
//! all frames of one kind, and recognised by what the gate counts.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tests::agent::port;
use tests::capture::Segment;
use tests::client::{
    Noise, begin_connect, connect, echo_exactly, hears, parts, says, unacknowledged,
};
use tests::faults::{Fault, Traffic};
use tests::forge::denial;
use tests::metrics::Metrics;
use tests::patience::{PATIENCE, slowed, wait_at_most, wait_until};
use tests::pulse::Pulse;
use tests::wire::Wire;
use tests::{Agent, Capture, Death, Host, Lab, Pair, Settings, VIP, Wiring};

const GATE: &str = "rfsis_ack_gate_packets_total";
const FRAMES: &str = "rfsis_frames_total";

/// The gate stays closed until an instant has come, however long that takes.
fn patient(wiring: Wiring) -> Settings {
    Settings {
        protect_timeout: Some("20s".into()),
        ..wiring.settings()
    }
}

fn deaf_to(traffic: &[Traffic]) -> Vec<Fault> {
    let lost = traffic.iter().map(|&traffic| Fault::loses(traffic, 100));
    lost.collect()
}

/// Packets that the ACK gate has judged so.
fn judged(scrape: &Metrics, verdicts: &[&str]) -> f64 {
    let counts = verdicts
        .iter()
        .map(|verdict| scrape.sum(GATE, &[("verdict", verdict)]));
    counts.sum()
}

/// Waits until the gate has withheld an acknowledgement that it had not before.
fn wait_withheld(active: &Agent, before: &Metrics) {
    const WITHHELD: [&str; 2] = ["held", "lowered"];
    wait_until(
        "an acknowledgement to be withheld",
        || judged(&active.metrics(), &WITHHELD),
        |&count| count > judged(before, &WITHHELD),
    );
}

// ---- the worst instants ------------------------------------------------------------------------

/// What both nodes counted before the instant.
struct Before {
    active: Metrics,
    standby: Metrics,
}

/// Kills the active when the instant has come, and expects nothing of it to be seen.
struct Scene {
    lab: Lab,
    pair: Pair,
    capture: Capture,
}

impl Scene {
    fn set() -> Self {
        let lab = Wiring::Mirror.lab();
        let pair = Pair::start_guarding(&lab, &patient(Wiring::Mirror));
        let capture = Capture::start(&lab);
        Self { lab, pair, capture }
    }

    fn loses(&self, traffic: &[Traffic]) -> Before {
        let before = Before {
            active: self.pair.primary.metrics(),
            standby: self.pair.backup.metrics(),
        };
        self.lab.suffer(&deaf_to(traffic));
        before
    }

    fn dies(&self) {
        self.pair.primary_dies(&self.lab, Death::Kill9);
    }

    /// The stream goes on with what was said last, and ends.
    fn goes_on(self, stream: &TcpStream) {
        self.pair.wait_takeover();
        for seed in 100..103 {
            says(stream, seed).unwrap();
            hears(stream, seed).unwrap();
        }
        parts(stream).unwrap();
        let trace = self.capture.stop();
        trace.no_reset_from_vip().unwrap();
        trace.no_byte_from_vip_changed().unwrap();
        trace
            .dead_host_is_silent(Host::A.mac(), Host::B.mac())
            .unwrap();
    }
}

/// The active dies while a connection opens, when it has come to `instant`.
fn opening_survives(lost: &[Traffic], instant: fn(&Scene, &Before)) {
    let scene = Scene::set();
    let before = scene.loses(lost);
    let connecting = begin_connect(&scene.lab, port::ECHO).unwrap();
    instant(&scene, &before);
    scene.dies();
    let stream = connecting.finish().unwrap();
    scene.goes_on(&stream);
}

#[test]
fn a_connection_opens_though_the_active_dies_after_the_syn_that_it_alone_has_seen() {
    opening_survives(&[Traffic::Copies, Traffic::Openings], |scene, _| {
        scene
            .pair
            .primary
            .wait_metric(GATE, &[("verdict", "opening")], 1.0);
    });
}

#[test]
fn a_connection_opens_though_the_active_dies_with_the_syn_ack_in_its_hands() {
    opening_survives(&[Traffic::Confirmations], |scene, _| {
        scene
            .pair
            .primary
            .wait_metric(GATE, &[("verdict", "opening")], 1.0);
        scene.pair.backup.wait_flows("handshake", 1);
    });
}

#[test]
fn a_connection_opens_though_the_active_dies_while_the_syn_ack_leaves() {
    opening_survives(&[Traffic::Answers], |scene, _| {
        let guarded = [("condition", "guarded")];
        scene
            .pair
            .primary
            .wait_metric("rfsis_guarded_flows", &guarded, 1.0);
    });
}

#[test]
fn a_connection_goes_on_though_the_active_dies_after_a_syn_ack_that_the_client_alone_answered() {
    let scene = Scene::set();
    let before = scene.loses(&[Traffic::Copies]);
    let stream = connect(&scene.lab, port::ECHO).unwrap();
    says(&stream, 1).unwrap();
    wait_withheld(&scene.pair.primary, &before.active);
    scene.dies();
    hears(&stream, 1).unwrap();
    scene.goes_on(&stream);
}

/// The active dies when data of a running connection has come to `instant`.
fn data_survives(lost: &[Traffic], instant: fn(&Scene, &Before)) {
    let scene = Scene::set();
    let stream = connect(&scene.lab, port::ECHO).unwrap();
    says(&stream, 1).unwrap();
    hears(&stream, 1).unwrap();
    scene.pair.backup.wait_flows("lockstep", 1);
    let before = scene.loses(lost);
    says(&stream, 2).unwrap();
    instant(&scene, &before);
    scene.dies();
    hears(&stream, 2).unwrap();
    scene.goes_on(&stream);
}

#[test]
fn data_survives_the_death_of_the_active_between_it_and_its_copy() {
    data_survives(&[Traffic::Copies], |scene, before| {
        wait_withheld(&scene.pair.primary, &before.active);
    });
}

#[test]
fn data_survives_the_death_of_the_active_between_copy_and_confirmation() {
    data_survives(&[Traffic::Confirmations], |scene, before| {
        wait_withheld(&scene.pair.primary, &before.active);
        let fed = before.standby.sum(FRAMES, &[("result", "ok")]);
        scene
            .pair
            .backup
            .wait_metric(FRAMES, &[("result", "ok")], fed + 1.0);
    });
}

#[test]
fn data_survives_the_death_of_the_active_between_confirmation_and_released_ack() {
    // The confirmation may not come before the ACK is held, nor the ACK get out.
    data_survives(
        &[Traffic::Confirmations, Traffic::Answers],
        |scene, before| {
            wait_withheld(&scene.pair.primary, &before.active);
            scene.loses(&[Traffic::Answers]);
            let released = judged(&before.active, &["released"]);
            scene
                .pair
                .primary
                .wait_metric(GATE, &[("verdict", "released")], released + 1.0);
        },
    );
}

#[test]
fn a_stream_survives_the_death_of_the_active_between_much_data_and_its_copies() {
    const TOTAL: u64 = 64 << 20;
    let scene = Scene::set();
    let stream = connect(&scene.lab, port::ECHO).unwrap();
    let progress = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| echo_exactly(&stream, TOTAL, 1, &progress));
        let echoed = || progress.load(Ordering::Relaxed);
        wait_until("some echo", echoed, |&bytes| bytes > TOTAL / 8);
        let before = scene.loses(&[Traffic::Copies]);
        wait_withheld(&scene.pair.primary, &before.active);
        scene.dies();
        assert!(echoed() < TOTAL, "it died in the middle");
        transfer.join().unwrap().unwrap();
    });
    scene.pair.wait_takeover();
    let trace = scene.capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}

/// Sequence numbers are used again after 4 GiB, and those that lie 2 GiB apart cannot be compared.
#[test]
fn a_stream_of_more_bytes_than_there_are_sequence_numbers_is_guarded_and_survives() {
    const AROUND: u64 = 1 << 32;
    const TOTAL: u64 = AROUND + (256 << 20);
    let lab = Wiring::MirrorOffloaded.lab();
    let pair = Pair::start_guarding(&lab, &patient(Wiring::MirrorOffloaded));
    let stream = connect(&lab, port::ECHO).unwrap();
    let progress = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| echo_exactly(&stream, TOTAL, 1, &progress));
        wait_at_most(
            Duration::from_secs(120),
            "all sequence numbers to be used",
            || progress.load(Ordering::Relaxed),
            |&bytes| bytes > AROUND + (64 << 20) || transfer.is_finished(),
        );
        assert!(!transfer.is_finished(), "it was to die in the middle");
        let guarded = [("condition", "guarded")];
        let metrics = pair.primary.metrics();
        assert_eq!(metrics.sum("rfsis_guarded_flows", &guarded), 1.0);
        pair.primary_dies(&lab, Death::Kill9);
        transfer.join().unwrap().unwrap();
    });
    pair.wait_takeover();
}

/// While nothing is lost the standby speaks only to the active's programs, and its agent hears of nothing.
#[test]
fn an_upload_of_more_bytes_than_there_are_sequence_numbers_does_not_stand_still() {
    const TOTAL: u64 = (1 << 32) + (64 << 20);
    const AFTER: u64 = 64 << 20;
    let lab = Wiring::MirrorOffloaded.lab();
    let pair = Pair::start_guarding(&lab, &patient(Wiring::MirrorOffloaded));
    // What is lost, or comes in another order, the agent hears of: so it is sent from one CPU, and by what loses nothing.
    let reno = ("ipv4/tcp_congestion_control", "reno");
    lab.client().sysctl(reno.0, reno.1).unwrap();
    let stream = connect(&lab, port::DISCARD).unwrap();
    let chunk = vec![0x5a; 1 << 16];
    let send = |total: u64| {
        for sent in (0..total).step_by(chunk.len()) {
            let written = (&stream).write_all(&chunk);
            assert!(written.is_ok(), "{written:?} after {sent} bytes");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = CpuSet::new();
            first.set(0).unwrap();
            sched_setaffinity(Pid::from_raw(0), &first).unwrap();
            send(TOTAL);
        });
    });
    pair.primary_dies(&lab, Death::Kill9);
    send(AFTER);
    pair.wait_takeover();
    parts(&stream).unwrap();
}

// ---- what the standby's kernel confirms for its agent -----------------------------------------------

const BY_KERNEL: [(&str, &str); 2] = [("direction", "sent"), ("result", "by_kernel")];

/// The client is told of bytes that lie in the frame ring of an agent that does not run, and who takes over has them.
#[test]
fn what_the_standbys_kernel_has_confirmed_while_its_agent_stood_still_survives() {
    const BLOCK: usize = 300_000;
    /// How long the kernel may speak for its agent, less what is gone of it when that stands still.
    const MEANWHILE: Duration = Duration::from_millis(150);
    let lab = Wiring::MirrorOffloaded.lab();
    let pair = Pair::start_guarding(&lab, &patient(Wiring::MirrorOffloaded));
    let stream = connect(&lab, port::ECHO).unwrap();
    let mut noise = Noise::new(1);
    let mut block = vec![0; BLOCK];
    let mut says = |block: &mut [u8]| {
        noise.fill(block);
        (&stream).write_all(block).unwrap();
    };
    let hears = |block: &[u8]| {
        let mut heard = vec![0; BLOCK];
        (&stream).read_exact(&mut heard).unwrap();
        assert!(heard == block, "another echo");
    };
    // Until it has the agent's pledge.
    wait_until(
        "the standby's kernel to confirm something",
        || {
            says(&mut block);
            hears(&block);
            pair.backup.metrics()
        },
        |scrape| scrape.sum("rfsis_sync_datagrams_total", &BY_KERNEL) > 0.0,
    );
    // A machine that is busy elsewhere may let that time pass.
    let in_time = (0..20).any(|_| {
        pair.backup.stop();
        says(&mut block);
        let until = Instant::now() + MEANWHILE;
        let left = || unacknowledged(lab.client(), VIP, &stream);
        while left() != Some(0) && Instant::now() < until {
            std::thread::yield_now();
        }
        let is_told = left() == Some(0);
        if !is_told {
            pair.backup.cont();
            hears(&block);
        }
        is_told
    });
    assert!(in_time, "nobody confirms while the agent stands still");
    pair.primary_dies(&lab, Death::Kill9);
    pair.backup.cont();
    hears(&block);
    pair.wait_takeover();
    for _ in 0..3 {
        says(&mut block);
        hears(&block);
    }
    parts(&stream).unwrap();
}

// ---- what the kernels agree on -----------------------------------------------------------------

/// Where TC catches the frames. On one of the LANs all checksums are left to devices, on the other some cables finish them.
#[test]
fn connections_that_the_kernels_open_alone_are_guarded_and_survive() {
    const COUNT: u64 = 20;
    for wiring in [Wiring::MirrorOffloaded, Wiring::MirrorOverSyncLink] {
        let lab = wiring.lab();
        let pair = Pair::start_guarding(&lab, &patient(wiring));
        let capture = Capture::start(&lab);
        let agreed = || judged(&pair.primary.metrics(), &["agreed"]);
        // From when the standby's agent has let its program answer.
        let tries = || parts(&connect(&lab, port::ECHO).unwrap()).unwrap();
        wait_until(
            "the kernels to agree",
            || (tries(), agreed()).1,
            |&n| n > 0.0,
        );
        let before = agreed();
        let streams: Vec<TcpStream> = (0..COUNT)
            .map(|_| connect(&lab, port::ECHO).unwrap())
            .collect();
        // One that finds the standby's agent late is opened by the agents.
        let by_kernels = agreed() - before;
        assert!(by_kernels > COUNT as f64 / 2.0, "{wiring:?}: {by_kernels}");
        let ports: Vec<u16> = streams
            .iter()
            .map(|stream| stream.local_addr().unwrap().port())
            .collect();
        for (stream, seed) in streams.iter().zip(0..) {
            says(stream, seed).unwrap();
            hears(stream, seed).unwrap();
        }
        let exposed = [("condition", "exposed")];
        pair.primary
            .wait_metric("rfsis_guarded_flows", &exposed, 0.0);
        pair.primary_dies(&lab, Death::Kill9);
        pair.wait_takeover();
        for (stream, seed) in streams.iter().zip(100..) {
            says(stream, seed).unwrap();
            hears(stream, seed).unwrap();
            parts(stream).unwrap();
        }
        let trace = capture.stop();
        // A SYN-ACK that does not come, or is wrong, makes its client repeat itself.
        let segments = trace.frames.iter().filter_map(|frame| frame.tcp());
        let syns = segments.filter(|segment| segment.syn && ports.contains(&segment.source.1));
        assert!(syns.count() < ports.len() * 3 / 2, "{wiring:?}");
        trace.no_reset_from_vip().unwrap();
        trace.no_byte_from_vip_changed().unwrap();
    }
}

// ---- what the client is told -------------------------------------------------------------------

#[test]
fn a_client_is_told_of_no_byte_that_the_standby_lacks() {
    const TOTAL: u64 = 1 << 20;
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &patient(Wiring::Mirror));
    let capture = Capture::start(&lab);
    let stream = connect(&lab, port::ECHO).unwrap();
    says(&stream, 1).unwrap();
    hears(&stream, 1).unwrap();
    pair.backup.wait_flows("lockstep", 1);
    lab.suffer(&deaf_to(&[Traffic::Copies]));
    let before = pair.primary.metrics();
    let progress = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| echo_exactly(&stream, TOTAL, 2, &progress));
        let port = stream.local_addr().unwrap().port();
        // Its data is answered, though not acknowledged, and it repeats it.
        let echoed = || progress.load(Ordering::Relaxed);
        wait_until("an echo", echoed, |&bytes| bytes > 0);
        wait_until(
            "acknowledgements to be withheld",
            || judged(&pair.primary.metrics(), &["held", "lowered"]),
            |&count| count > judged(&before, &["held", "lowered"]) + 5.0,
        );
        let trace = capture.stop();
        let syn = trace.frames.iter().filter_map(|frame| frame.tcp());
        let mut syn = syn.filter(|segment| segment.syn && segment.source.1 == port);
        let held = syn.next().unwrap().seq.wrapping_add(1 + 16);
        let mut said = trace.segments_from_vip();
        let ahead = said.find(|segment| {
            let blocks = segment.sack.iter().map(|&(_, end)| end);
            let mut told = blocks.chain([segment.ack]);
            told.any(|told| told.wrapping_sub(held).cast_signed() > 0)
        });
        assert_eq!(ahead, None, "the standby holds up to {held}");

        lab.heal();
        transfer.join().unwrap().unwrap();
    });
    assert_eq!(progress.load(Ordering::Relaxed), TOTAL);
}

// ---- a standby that dies -----------------------------------------------------------------------

/// Two CPUs may look for a connection while one of them puts it in the place of its request, and then the kernel
/// answers the other's segment as that of a stranger.
#[test]
fn a_client_hears_only_the_second_time_that_there_is_no_such_connection() {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let wire = Wire::open(lab.client()).unwrap();
    let mut stream = connect(&lab, port::ECHO).unwrap();
    let answer = |frame: &[u8]| {
        Segment::of(frame).filter(|segment| segment.syn && segment.source == (VIP, port::ECHO))
    };
    let answer = wire.hear(slowed(PATIENCE), answer).unwrap().unwrap();
    says(&stream, 1).unwrap();
    hears(&stream, 1).unwrap();
    let kernel = Wire::open(lab.host(Host::A)).unwrap();
    let deny = |heard: u32| {
        let seq = answer.seq.wrapping_add(1 + heard);
        let denial = denial(Host::A, answer.destination.1, seq);
        kernel.send(&denial).unwrap();
    };
    deny(16);
    pair.primary
        .wait_metric("rfsis_held_doubted_total", &[], 1.0);
    says(&stream, 2).unwrap();
    hears(&stream, 2).unwrap();
    deny(32);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // It is counted behind its sending.
    pair.primary
        .wait_metric("rfsis_held_released_total", &[], 1.0);
}

#[test]
fn clients_do_not_wait_for_a_dead_standby_and_the_next_one_guards_new_connections() {
    const SHARE: u64 = 4 << 20;
    let lab = Wiring::Mirror.lab();
    let settings = Wiring::Mirror.settings();
    let mut pair = Pair::start_guarding(&lab, &settings);
    let mut pulse = Some(Pulse::start(&lab).unwrap());
    let (moved, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        // One transfer after the other: some open while nobody answers the active.
        let load = scope.spawn(|| {
            let mut seed = 0;
            // A test that fails must end, too.
            let begun = Instant::now();
            while begun.elapsed() < slowed(5 * PATIENCE) && !over.load(Ordering::Relaxed) {
                seed += 1;
                let stream = connect(&lab, port::ECHO)?;
                echo_exactly(&stream, SHARE, seed, &moved)?;
            }
            anyhow::Ok(())
        });
        let goes_on = |pulse: &Option<Pulse>| {
            pulse.as_ref().unwrap().beat_on(200);
            let goal = moved.load(Ordering::Relaxed) + 4 * SHARE;
            let bytes = || moved.load(Ordering::Relaxed);
            wait_until("the transfers to go on", bytes, |&bytes| bytes >= goal);
        };
        goes_on(&pulse);
        is_truthful(&pair.primary, "sync");

        pair.backup.kill9();
        pair.backup.await_exit();
        goes_on(&pulse);
        pair.primary.wait_protection("degraded");
        goes_on(&pulse);
        is_truthful(&pair.primary, "degraded");
        let guarded =
            |scrape: &Metrics| scrape.sum("rfsis_guarded_flows", &[("condition", "guarded")]);
        let scrapes = || guarded(&pair.primary.metrics());
        wait_until("nothing to be called guarded", scrapes, |&count| {
            count == 0.0
        });

        pair.backup = Agent::start(&lab, Host::B, "backup", &settings);
        pair.primary.wait_protection("sync");
        goes_on(&pulse);
        is_truthful(&pair.primary, "sync");
        over.store(true, Ordering::Relaxed);
        load.join().unwrap().unwrap();
        let blackout = pulse.take().unwrap().finish().unwrap();
        println!("longest silence of an echo: {:?}", blackout.longest);
    });

    let stream = connect(&lab, port::ECHO).unwrap();
    says(&stream, 1).unwrap();
    hears(&stream, 1).unwrap();
    pair.primary_dies(&lab, Death::Kill9);
    says(&stream, 2).unwrap();
    hears(&stream, 2).unwrap();
    parts(&stream).unwrap();
}

/// The metrics say this mode and no other.
fn is_truthful(active: &Agent, mode: &str) {
    let scrape = active.metrics();
    assert_eq!(scrape.sum("rfsis_protection", &[("mode", mode)]), 1.0);
    assert_eq!(scrape.sum("rfsis_protection", &[]), 1.0);
}
