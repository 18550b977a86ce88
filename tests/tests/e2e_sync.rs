//! `protect: sync` on a LAN that loses, doubles and delays what the nodes tell each other.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tests::agent::port;
use tests::client::{chargen_exactly, connect, echo_exactly, hears, parts, says};
use tests::faults::{Fault, Traffic};
use tests::patience::wait_at_most;
use tests::{Capture, Death, Pair, Settings, Wiring};

/// A transfer may take this long to its middle on a slow, shared machine.
const TO_THE_MIDDLE: Duration = Duration::from_secs(120);

/// A silence of the standby is not what is tested here: a stall of the machine must not open the gate.
fn patient(wiring: Wiring) -> Settings {
    Settings {
        protect_timeout: Some("20s".into()),
        ..wiring.settings()
    }
}

const MIRROR: [Traffic; 1] = [Traffic::Copies];
const SYNC: [Traffic; 2] = [Traffic::Openings, Traffic::Confirmations];
const BOTH: [Traffic; 3] = [Traffic::Copies, Traffic::Openings, Traffic::Confirmations];

/// Streams of so many bytes each, with other data each and in both directions: all come whole although the
/// active dies when half of all has come.
fn exact_with(wiring: Wiring, faults: &[Fault], each: u64) {
    const STREAMS: [(u16, u64); 3] = [(port::ECHO, 1), (port::ECHO, 2), (port::CHARGEN, 0)];
    let lab = wiring.lab();
    let pair = Pair::start_guarding(&lab, &patient(wiring));
    lab.suffer(faults);
    let progress = AtomicU64::new(0);
    let streams = STREAMS.map(|(port, seed)| (port, seed, connect(&lab, port).unwrap()));
    std::thread::scope(|scope| {
        let transfers = streams.each_ref().map(|(port, seed, stream)| {
            let progress = &progress;
            scope.spawn(move || match *port {
                port::ECHO => echo_exactly(stream, each, *seed, progress),
                _ => chargen_exactly(stream, 0, each, progress),
            })
        });
        wait_at_most(
            TO_THE_MIDDLE,
            "the middle of the transfers",
            || progress.load(Ordering::Relaxed),
            |&bytes| bytes >= each * STREAMS.len() as u64 / 2,
        );
        for fault in faults {
            // Of the openings there are few.
            let least = u64::from(fault.traffic != Traffic::Openings);
            assert!(lab.struck(*fault) >= least, "{fault:?} struck nothing");
        }
        pair.primary_dies(&lab, Death::Kill9);
        for transfer in transfers {
            transfer.join().unwrap().unwrap();
        }
    });
    pair.wait_takeover();
}

fn exact_with_loss(of: &[Traffic], percent: u32, each: u64) {
    let faults: Vec<_> = of
        .iter()
        .map(|&traffic| Fault::loses(traffic, percent))
        .collect();
    exact_with(Wiring::Mirror, &faults, each);
}

macro_rules! lossy {
    ($($name:ident: $traffic:ident, $percent:literal, $mib:literal;)+) => {
        $(#[test]
        fn $name() {
            exact_with_loss(&$traffic, $percent, $mib << 20);
        })+
    };
}

lossy! {
    streams_are_exact_across_a_kill_with_1_percent_of_the_copies_lost: MIRROR, 1, 64;
    streams_are_exact_across_a_kill_with_5_percent_of_the_copies_lost: MIRROR, 5, 64;
    streams_are_exact_across_a_kill_with_20_percent_of_the_copies_lost: MIRROR, 20, 4;
    streams_are_exact_across_a_kill_with_1_percent_of_the_sync_datagrams_lost: SYNC, 1, 64;
    streams_are_exact_across_a_kill_with_5_percent_of_the_sync_datagrams_lost: SYNC, 5, 64;
    streams_are_exact_across_a_kill_with_20_percent_of_the_sync_datagrams_lost: SYNC, 20, 4;
    streams_are_exact_across_a_kill_with_1_percent_of_both_lost: BOTH, 1, 64;
    streams_are_exact_across_a_kill_with_5_percent_of_both_lost: BOTH, 5, 64;
    streams_are_exact_across_a_kill_with_20_percent_of_both_lost: BOTH, 20, 4;
}

#[test]
fn streams_are_exact_across_a_kill_with_copies_and_sync_datagrams_doubled_and_late() {
    let faults: Vec<_> = BOTH
        .iter()
        .flat_map(|&traffic| [Fault::doubles(traffic, 5), Fault::delays(traffic, 1)])
        .collect();
    exact_with(Wiring::Mirror, &faults, 32 << 20);
}

#[test]
fn streams_are_exact_across_a_kill_with_1_percent_of_copied_super_frames_lost() {
    let lost = [Fault::loses(Traffic::Copies, 1)];
    exact_with(Wiring::MirrorOffloaded, &lost, 32 << 20);
}

#[test]
fn connections_that_open_while_20_percent_of_both_are_lost_survive_the_kill() {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &patient(Wiring::Mirror));
    let faults = BOTH.map(|traffic| Fault::loses(traffic, 20));
    lab.suffer(&faults);
    let capture = Capture::start(&lab);
    let connections = 0..200_u64;
    let streams: Vec<_> = connections
        .map(|seed| (seed, connect(&lab, port::ECHO).unwrap()))
        .collect();
    // All at once, so that the kill finds many of which a copy was lost.
    for (seed, stream) in &streams {
        says(stream, *seed).unwrap();
    }
    for (seed, stream) in &streams {
        hears(stream, *seed).unwrap();
    }
    for fault in faults {
        assert!(lab.struck(fault) > 0, "{fault:?} struck nothing");
    }
    pair.primary_dies(&lab, Death::Kill9);
    for (seed, stream) in &streams {
        says(stream, seed + 1).unwrap();
    }
    for (seed, stream) in &streams {
        hears(stream, seed + 1).unwrap_or_else(|error| panic!("connection {seed}: {error:#}"));
        parts(stream).unwrap();
    }
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}
